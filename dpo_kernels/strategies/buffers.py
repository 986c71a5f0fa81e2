"""The memory of a pass that forms gradients with the loss, and the steps that its strategies share."""

from collections.abc import Callable
from dataclasses import field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.kernel_interface import LogitsGradient, RowKernels, RowScale, RowState, SampledRows, SparseGradient
from dpo_kernels.problem import Problem
from dpo_kernels.records import dataclass
from dpo_kernels.shapes import MOST_EXPONENT, Chunk, Schedule
from dpo_kernels.strategies.row_results import RowResults
from dpo_kernels.strategies.sampled import add_products
from dpo_kernels.strategies.weight_rows import WeightRows, weight_grad


@dataclass(frozen=True)
class LossAndGradients:
    """The results of the pass. Gradients are those of ``total``; unwanted ones and one in ``main_grad`` are None."""

    total: Tensor  # () float64, sum of the losses over the denominator
    losses: Tensor  # one for each example, float64
    logps: Tensor  # (S,) float64
    stats: dict[str, Tensor]  # name -> (N,)
    token_logps: Tensor  # (N,)
    hidden: Tensor | None  # (N + 1, H), last row 0
    weight: Tensor | None  # (V, H), a sparse tensor where the sampling says so
    bias: Tensor | None  # (V,)


@dataclass(frozen=False)
class Buffers:
    """The memory of one pass: the scratch, the unfinished gradients, and the results so far.

    The gradients are allocated where they are first asked for, because a GPU waits for the first product.
    """

    kernels: RowKernels
    problem: Problem
    schedule: Schedule
    ref: Tensor  # (S,) float64 log-probs of the reference
    denominator: Tensor  # () float64
    scratch: Tensor  # memory for a tile of logits
    rows: RowResults
    written: bool  # dw and db hold values, so that products are added to them
    losses: list[Tensor] = field(default_factory=list)
    logps: list[Tensor] = field(default_factory=list)
    reducing: Callable[[], object] | None = None  # waits for the sum of dx over the ranks

    @staticmethod
    def allocate(
        kernels: RowKernels, problem: Problem, schedule: Schedule, ref_S: Tensor, denominator: Tensor
    ) -> "Buffers":
        """Allocate the memory of a pass over the problem. The arguments are those of ``chunked.loss_and_gradients``."""
        scratch = kernels.scratch(problem.hidden.device, schedule.scratch_logits)
        rows = RowResults(kernels, problem, like=scratch, sums=False)
        written = problem.main_grad is not None
        return Buffers(kernels, problem, schedule, ref_S, denominator, scratch, rows, written)

    @cached_property
    def expected(self) -> float:
        """About the largest coefficient of a token times the logit scale, as far as the host knows.

        For each nat of a log-prob a loss changes by about 1 or beta, and one that needs beta > 0 by about 1 / beta.
        What the device knows of coefficients is in ``powers``, except with ``main_grad``.
        """
        problem = self.problem
        assert problem.loss is not None, "a pass that forms gradients has a loss"
        parts = getattr(problem.loss, "parts", ())
        least = 0.0 if problem.loss.sigmoid is not None else 1.0
        slope = max([least, problem.loss.beta, *(1.0 / problem.loss.beta for part in parts if part.spec.beta_positive)])
        host = 1.0 if problem.main_grad is None else problem.main_grad.scale / problem.known_divisor
        return slope * problem.head.logit_scale * host

    @cached_property
    def powers(self) -> tuple[Tensor, Tensor] | None:
        """Powers of two, 0-d, that token weights bring into every coefficient, and that all the device knows brings.

        The gradients of weight and bias are added up without the second where they are products of float16 operands.
        None where nobody needs them.
        """
        kernels, problem = self.kernels, self.problem
        rounds = kernels.dtype == torch.float16 and kernels.rounds_operands(self.scratch)
        if not rounds or problem.main_grad is not None or problem.sampling is not None:
            return None
        of_tokens, of_pairs = problem.packed.weights, getattr(problem.loss, "tensors", {}).get("pair_weights")
        one = self.scratch.new_ones(())
        tokens = one if of_tokens is None or not of_tokens.numel() else of_tokens.abs().amax().to(one.dtype)
        pairs = one if of_pairs is None or not of_pairs.numel() else of_pairs.abs().amax().to(one.dtype)
        sizes = torch.stack([tokens, tokens * pairs / self.denominator.to(one.dtype)])
        exponents = sizes.clamp(2.0**-MOST_EXPONENT, 2.0**MOST_EXPONENT).frexp().exponent
        of_weights, of_all = torch.ldexp(torch.ones_like(sizes), exponents).unbind()
        return of_weights, of_all

    @cached_property
    def dx(self) -> Tensor | None:
        """The gradient ``(N + 1, H)`` of the packed hidden states, with a last row of 0, or None if unwanted."""
        rows, width = self.problem.packed.capacity + 1, self.problem.hidden.shape[1]
        return self.scratch.new_zeros(rows, width) if self.problem.needs_grad.hidden else None

    @cached_property
    def dw(self) -> Tensor | WeightRows | None:
        """The gradient ``(V, H)`` of the head's weight, which is the caller's buffer if there is one, or None."""
        main_grad = self.problem.main_grad
        return weight_grad(self.kernels, self.problem) if main_grad is None else main_grad.buffer

    @cached_property
    def db(self) -> Tensor | None:
        """The gradient ``(V,)`` of the bias, or None if unwanted. It begins at 0 where products are added to it."""
        if not self.problem.needs_grad.bias:
            return None
        db = self.kernels.buffer(self.problem.hidden.device, self.problem.head.vocab)
        return db if self.problem.main_grad is None else db.zero_()

    def gather(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return hidden states ``(C, H)`` in the dtype of the operands, and labels ``(C,)``, of packed tokens."""
        packed = self.problem.packed
        return packed.gather(self.problem.hidden, start, stop, self.kernels.dtype), packed.labels[start:stop]

    def close_examples(self, chunk: Chunk) -> Tensor:
        """Compute the losses of the chunk's examples, whose log-probs are known.

        Returns the derivative ``(sequences of the chunk,)`` of the total by the sequence log-probs, float64.
        """
        packed, (logp_C, weights_C, counts_S, ref_S, loss) = self.problem.packed, self._examples(chunk)
        context, sequences, invalid = self.problem.context, slice(*chunk.sequences), packed.nan_if_invalid
        if context is None:
            logps_S, losses_E, grad_S = self.kernels.sequence_loss(logp_C, weights_C, counts_S, ref_S, invalid, loss)
        else:
            logps_S = context.complete(self.kernels.segment_sum(logp_C, weights_C, counts_S) + invalid)
            losses_E, grad_S = loss.value_and_grad(logps_S, ref_S, context.counts[sequences])
            grad_S = (grad_S + invalid) * context.grad_scale  # a hinge maps a NaN margin to a finite gradient
        self.losses.append(losses_E)
        self.logps.append(logps_S)
        grad_S = grad_S / self.denominator
        return grad_S if self.problem.main_grad is None else grad_S * self.problem.main_grad.scale

    def close_chunk(self, chunk: Chunk, state: RowState) -> Tensor:
        """Do ``close_examples`` and ``row_scale`` of a chunk that fits the tile. ``state`` is that of its rows."""
        if self.problem.context is not None:
            return self.row_scale(self.close_examples(chunk), chunk, chunk.start, chunk.stop, state)
        packed, (logp_C, weights_C, counts_S, ref_S, loss) = self.problem.packed, self._examples(chunk)
        segments_C, logit_scale = packed.segments[chunk.start : chunk.stop], self.problem.head.logit_scale
        grad_scale = 1.0 if self.problem.main_grad is None else self.problem.main_grad.scale
        scale = RowScale(state, segments_C, chunk.sequences[0], logit_scale, self.denominator, grad_scale)
        logps_S, losses_E, scale_C = self.kernels.sequence_loss_and_scale(
            logp_C, weights_C, counts_S, ref_S, packed.nan_if_invalid, loss, scale
        )
        self.losses.append(losses_E)
        self.logps.append(logps_S)
        return scale_C

    def _examples(self, chunk: Chunk) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Any]:
        """Return log-probs and weights of the chunk's tokens, counts and reference of its sequences, and its loss."""
        packed, loss = self.problem.packed, self.problem.loss
        assert loss is not None, "a pass that forms gradients has a loss"
        tokens, sequences = slice(chunk.start, chunk.stop), slice(*chunk.sequences)
        weights_C = None if packed.weights is None else packed.weights[tokens]
        examples = loss.of_examples(chunk.first, chunk.last)
        return self.rows.result.logp[tokens], weights_C, packed.counts[sequences], self.ref[sequences], examples

    def row_scale(self, grad_S: Tensor, chunk: Chunk, start: int, stop: int, state: RowState) -> Tensor:
        """Return the factor ``(C,)`` of the rows of the logits' gradient for tokens ``start..stop-1`` of the chunk.

        It is minus the coefficient of the token times the logit scale, over the token's sum of exponentials.
        """
        packed = self.problem.packed
        weights_C = None if packed.weights is None else packed.weights[start:stop]
        scale = RowScale(state, packed.segments[start:stop], chunk.sequences[0], self.problem.head.logit_scale)
        return scale.factors(grad_S, weights_C)

    def forward(self, start: int, stop: int, *, keep_logits: bool = False) -> tuple[Tensor, Tensor, Tensor, RowState]:
        """Compute logits of whole rows in the scratch, and record the log-probs.

        With ``keep_logits`` the tile still holds the logits afterwards.

        Returns hidden states ``(C, H)``, labels ``(C,)``, the tile ``(C, V)`` and the state of its rows.
        """
        kernels, head = self.kernels, self.problem.head
        x_CH, labels_C = self.gather(start, stop)
        tile = kernels.tile_in(self.scratch, stop - start, head.vocab)
        # The softcap's derivative needs the logits, and so does a maximum that other ranks may raise.
        keep_logits |= head.softcap is not None or self.problem.shard is not None
        only_logps = self.problem.shard is None and not self.problem.stats and not kernels.codes_logits
        if stop > start and only_logps:
            kernels.project(x_CH, head, 0, tile)
            logp_C = self.rows.result.logp[start:stop]
            return x_CH, labels_C, tile, kernels.reduce_to_logps(tile, labels_C, logp_C, keep_logits)
        state = kernels.new_state(stop - start, x_CH.device, self.problem.stats)
        if stop > start:
            if head.vocab:
                kernels.project_and_reduce(state, x_CH, head, 0, tile, labels_C, keep_logits=keep_logits)
            self.rows.put(start, stop, state)
        return x_CH, labels_C, tile, state

    def gradient_of_logits(
        self,
        tile: Tensor,
        labels_C: Tensor,
        start: int,
        state: RowState,
        scale_C: Tensor,
        expected: float,
        power: Tensor | None = None,
    ) -> LogitsGradient | SparseGradient:
        """Return the gradient of whole rows of logits, or a sample of it. The tile may be overwritten.

        ``start`` is the packed token of the first row. ``expected`` is that of ``RowKernels.dlogits_``. With ``power``
        the products for weight and bias are without it.
        """
        kernels, head, sampling = self.kernels, self.problem.head, self.problem.sampling
        if sampling is not None:
            tokens_C = self.problem.packed.index[start : start + labels_C.shape[0]]
            of_rows = SampledRows.of(labels_C, state.max, state.others, state.sumexp, scale_C, tokens_C)
            return kernels.sampled_dlogits_of_state(tile, 0, state, of_rows, head, sampling, expected)
        if power is not None:
            scale_C = scale_C / power
        d = kernels.dlogits_of_state(tile, labels_C, 0, state, head, scale_C, expected)
        return d.with_power(power)

    def backward(
        self,
        d: LogitsGradient | SparseGradient,
        x_CH: Tensor,
        start: int,
        dw: Tensor | WeightRows | None,
        db: Tensor | None,
        accumulate: bool,
        last: bool = False,
    ) -> None:
        """Multiply the logits' gradient into the gradients of the hidden states, the weight and the bias.

        Args:
            d: gradient ``(C, V)`` of whole rows of logits.
            x_CH: hidden states of these rows.
            start: packed token of the first row.
            dw: ``(V, H)`` buffer, rows of it, or None if it is not wanted.
            db: ``(V,)`` buffer, or None if it is not wanted.
            accumulate: whether products are added to ``dw`` and ``db``, or replace them.
            last: whether no later rows change the gradient of the hidden states.

        """
        dx_CH = None if self.dx is None else self.dx[start : start + x_CH.shape[0]]
        of_tile = (self.kernels, d, self.problem.head, 0, x_CH)
        add_products(*of_tile, (dx_CH, None, None), first_columns=True, first_rows=not accumulate)
        if last:
            self._begin_reducing()
        add_products(*of_tile, (None, dw, db), first_columns=True, first_rows=not accumulate)

    def _begin_reducing(self) -> None:
        """Begin to add up the shards' parts of the hidden states' gradient. The product for dW hides it on a GPU."""
        shard = self.problem.shard
        if self.reducing is None and self.dx is not None and shard is not None and shard.reduce_hidden_grad is not None:
            self.reducing = shard.reduce_hidden_grad(self.dx)

    def result(self) -> LossAndGradients:
        """Return the results of the pass, after its last chunk."""
        self._begin_reducing()
        if self.reducing is not None:
            self.reducing()
        for grad in (self.dw, self.db):
            if not isinstance(grad, Tensor):
                continue
            if not self.written:
                grad.zero_()
            elif self.powers is not None:
                grad.mul_(self.powers[1])
        losses = _joined(self.losses) if self.losses else self.ref[:0]
        logps = _joined(self.logps) if self.logps else self.ref
        total = losses.sum() / self.denominator
        dw = self.dw.gradient() if isinstance(self.dw, WeightRows) else self.dw
        if self.problem.main_grad is not None:
            dw = None
        rows = self.rows.result
        return LossAndGradients(total, losses, logps, rows.stats, rows.logp, self.dx, dw, self.db)


def _joined(parts: list[Tensor]) -> Tensor:
    """Return the parts as one tensor, without a copy where there is one only."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
