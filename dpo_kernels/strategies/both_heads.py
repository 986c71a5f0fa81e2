"""The logits of the policy and of a reference side by side, where the KL divergence between them is wanted.

For a token let ``p`` be the policy's distribution over the vocabulary, and ``q`` the reference's. Its divergence is
``KL(q || p) = sum q log(q / p)``. Let ``g`` be the derivative of the loss by the log-prob of its label, and ``k`` that
by its divergence. Then the gradient of the policy's logits is ``g onehot - (g - k) p - k q``. It needs both
distributions at once, so the tiles of both heads lie in the scratch. Rows are whole, because a divergence needs the
sums of both.

The steps are those of ``chunked`` and of ``recompute``, with one GEMM pass more for each time that logits are computed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dpo_kernels.kernel_interface import (
    BothKernels,
    Coefficients,
    RowKernels,
    RowsAndDivergences,
    RowsOfBoth,
    RowState,
    SumsOfBoth,
)
from dpo_kernels.problem import Problem, ScoredReference
from dpo_kernels.records import dataclass
from dpo_kernels.segments import sequence_to_token
from dpo_kernels.shapes import Chunk, Schedule
from dpo_kernels.strategies.buffers import Buffers, LossAndGradients
from dpo_kernels.strategies.recompute import allocate
from dpo_kernels.strategies.row_results import RowResults
from dpo_kernels.strategies.sampled import Gradients, add_products
from dpo_kernels.strategies.weight_rows import WeightRows


class LossOfBoth(NamedTuple):
    """The results of a pass that forms gradients with the loss."""

    policy: LossAndGradients
    ref_logps: Tensor  # (S,) log-probs of the reference, float64
    kl: Tensor  # (S,) KL divergences, float64


@dataclass(frozen=False)
class ReferenceTiles:
    """The reference's logits of the tokens in the policy's tile, and its log-probs so far."""

    kernels: RowKernels
    problem: Problem  # of the reference
    scratch: Tensor  # memory for a tile of logits
    rows: RowResults

    @staticmethod
    def allocate(kernels: RowKernels, problem: Problem, schedule: Schedule, *, sums: bool) -> "ReferenceTiles":
        """Allocate the memory. ``problem`` is the policy's. With ``sums`` those of a backward pass are kept."""
        assert isinstance(problem.reference, ScoredReference), "a divergence is one from a reference that is scored"
        of_reference = problem.of_reference(problem.reference)
        scratch = kernels.scratch(problem.hidden.device, schedule.scratch_logits)
        return ReferenceTiles(
            kernels, of_reference, scratch, RowResults(kernels, of_reference, like=scratch, sums=sums)
        )

    def project(self, start: int, stop: int) -> Tensor:
        """Return the logits ``(C, V)`` of packed tokens ``start..stop-1``."""
        packed, head = self.problem.packed, self.problem.head
        x_CH = packed.gather(self.problem.hidden, start, stop, self.kernels.dtype)
        tile = self.kernels.tile_in(self.scratch, stop - start, head.vocab)
        self.kernels.project(x_CH, head, 0, tile)
        return tile

    def forward(self, start: int, stop: int) -> tuple[Tensor, RowState]:
        """Return the logits of packed tokens and the state of their rows, and record the log-probs."""
        tile, labels_C = self.project(start, stop), self.problem.packed.labels[start:stop]
        state = self.kernels.new_state(stop - start, tile.device, ())
        self.kernels.reduce(state, tile, labels_C, 0)
        self.rows.put(start, stop, state)
        return tile, state


# --- gradients with the loss ------------------------------------------------------------------------------------------


def loss_and_gradients(kernels: BothKernels, problem: Problem, schedule: Schedule, denominator: Tensor) -> LossOfBoth:
    """Compute the loss, its gradients, log-probs and KL divergences, as ``chunked`` does. No example is cut.

    Args:
        kernels: row operations of a backend for both heads.
        problem: what is computed, with a reference that is scored.
        schedule: chunks of whole examples, and a tile of whole rows, for which each head has memory.
        denominator: number that the sum of the losses is divided by, 0-d float64.

    """
    none_S = torch.zeros_like(problem.packed.counts, dtype=denominator.dtype)
    buffers = Buffers.allocate(kernels.policy, problem, schedule, none_S, denominator)
    reference = ReferenceTiles.allocate(kernels.reference, problem, schedule, sums=False)
    ref_logps, divergences = [none_S[:0]], [none_S[:0]]
    for chunk in schedule.chunks:
        ref_S, kl_S = _run(buffers, reference, chunk)
        ref_logps.append(ref_S)
        divergences.append(kl_S)
    return LossOfBoth(buffers.result(), torch.cat(ref_logps), torch.cat(divergences))


def _run(buffers: Buffers, reference: ReferenceTiles, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Compute a chunk, and return the reference's log-probs and the divergences of its sequences."""
    start, stop = chunk.start, chunk.stop
    x_CH, labels_C, tile, state = buffers.forward(start, stop, keep_logits=True)
    rows, kl_C = None, tile.new_zeros(0)
    if stop > start:
        rows = RowsOfBoth(tile, state, *reference.forward(start, stop))
        kl_C = buffers.kernels.kl_of_rows(rows)
    ref_S, kl_S, grad_S, kl_grad_S = _close(buffers, reference, chunk, kl_C)
    if rows is None:
        return ref_S, kl_S
    power = None if buffers.powers is None else buffers.powers[1]
    if kl_grad_S is None:
        scale_C = buffers.row_scale(grad_S, chunk, start, stop, state)
        d = buffers.gradient_of_logits(tile, labels_C, start, state, scale_C, buffers.expected, power)
    else:
        packed, factor = buffers.problem.packed, 1.0 if power is None else power
        segments_C = packed.segments[start:stop] - chunk.sequences[0]
        weights_C = None if packed.weights is None else packed.weights[start:stop]
        by_token = (sequence_to_token(each, segments_C, weights_C) / factor for each in (grad_S, kl_grad_S))
        of_rows = (rows, labels_C, buffers.problem.head, Coefficients(*by_token), buffers.expected)
        d = buffers.kernels.dlogits_of_both_(*of_rows).with_power(power)
    buffers.backward(d, x_CH, start, buffers.dw, buffers.db, buffers.written)
    buffers.written = True
    return ref_S, kl_S


def _close(
    buffers: Buffers, reference: ReferenceTiles, chunk: Chunk, kl_C: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute the losses of the chunk's examples.

    Returns the reference's log-probs and the divergences of its sequences. Then the derivatives of the total by the
    policy's log-probs and by the divergences, None where the loss does not read these. All are float64.
    """
    problem, packed = buffers.problem, buffers.problem.packed
    assert problem.loss is not None, "a pass that forms gradients has a loss"
    tokens, sequences = slice(chunk.start, chunk.stop), slice(*chunk.sequences)
    counts_S, loss = packed.counts[sequences], problem.loss.of_examples(chunk.first, chunk.last)
    weights_C = None if packed.weights is None else packed.weights[tokens]
    logps_S, ref_S, kl_S = (
        buffers.kernels.segment_sum(values_C, weights_C, counts_S) + packed.nan_if_invalid
        for values_C in (buffers.rows.result.logp[tokens], reference.rows.result.logp[tokens], kl_C)
    )
    kl_grad_S: Tensor | None = None
    if problem.kl_grad:
        losses_E, grad_S, kl_grad_S = loss.value_and_grads(logps_S, ref_S, counts_S, kl_S)
    else:
        losses_E, grad_S = loss.value_and_grad(logps_S, ref_S, counts_S)
    buffers.losses.append(losses_E)
    buffers.logps.append(logps_S)
    scale = (1.0 if problem.main_grad is None else problem.main_grad.scale) / buffers.denominator
    grad_S = (grad_S + packed.nan_if_invalid) * scale
    return ref_S, kl_S, grad_S, None if kl_grad_S is None else (kl_grad_S + packed.nan_if_invalid) * scale


# --- log-probs and divergences first ----------------------------------------------------------------------------------


def logps(kernels: BothKernels, problem: Problem, schedule: Schedule) -> RowsAndDivergences:
    """Compute log-probs and KL divergences of the packed tokens, as ``recompute`` does. No derivative is saved."""
    packed, head = problem.packed, problem.head
    scratch = kernels.policy.scratch(problem.hidden.device, schedule.scratch_logits)
    rows = RowResults(kernels.policy, problem, like=scratch)
    reference = ReferenceTiles.allocate(kernels.reference, problem, schedule, sums=True)
    kl_N = torch.zeros_like(rows.result.logp)
    for chunk in schedule.chunks:
        start, stop = chunk.start, chunk.stop
        x_CH, labels_C = packed.gather(problem.hidden, start, stop, kernels.policy.dtype), packed.labels[start:stop]
        tile = kernels.policy.tile_in(scratch, stop - start, head.vocab)
        kernels.policy.project(x_CH, head, 0, tile)
        state = kernels.policy.new_state(stop - start, tile.device, problem.stats)
        kernels.policy.reduce(state, tile, labels_C, 0)
        rows.put(start, stop, state)
        kl_N[start:stop] = kernels.policy.kl_of_rows(RowsOfBoth(tile, state, *reference.forward(start, stop)))
    return RowsAndDivergences(rows.result, reference.rows.result, kl_N)


def gradients(
    kernels: BothKernels, problem: Problem, schedule: Schedule, saved: SumsOfBoth, coefficients: Coefficients
) -> Gradients:
    """Compute the gradients of log-probs and KL divergences from logits that are computed again.

    Args:
        kernels: row operations of a backend for both heads.
        problem: what ``logps`` has computed.
        schedule: tile and chunks.
        saved: the sums of what ``logps`` has returned.
        coefficients: ``(N,)`` upstream gradients of each token's log-prob and KL divergence.

    Returns:
        Gradients of the packed hidden states ``(N + 1, H)`` with a zero last row, of the weight and of the bias, in
        accumulation precision. Unwanted ones are None.

    """
    packed, head = problem.packed, problem.head
    dx, dw, db = allocate(kernels.policy, problem)
    assert not isinstance(dw, WeightRows), "gradients of divergences are not sampled"
    scratch = kernels.policy.scratch(problem.hidden.device, schedule.scratch_logits)
    reference = ReferenceTiles.allocate(kernels.reference, problem, schedule, sums=False)
    for chunk in schedule.chunks:
        tokens = slice(chunk.start, chunk.stop)
        x_CH = packed.gather(problem.hidden, chunk.start, chunk.stop, kernels.policy.dtype)
        labels_C, tile = packed.labels[tokens], kernels.policy.tile_in(scratch, x_CH.shape[0], head.vocab)
        kernels.policy.project(x_CH, head, 0, tile)
        state = _state(saved.max[tokens], saved.others[tokens], tile, labels_C)
        ref_tile = reference.project(chunk.start, chunk.stop)
        ref_state = _state(saved.ref_max[tokens], saved.ref_others[tokens], ref_tile, labels_C)
        rows, of_tokens = RowsOfBoth(tile, state, ref_tile, ref_state), (each[tokens] for each in coefficients)
        d = kernels.policy.dlogits_of_both_(rows, labels_C, head, Coefficients(*of_tokens), head.logit_scale)
        products = (None if dx is None else dx[tokens], dw, db)
        of_tile = (kernels.policy, d, head, 0, x_CH, products)
        add_products(*of_tile, first_columns=True, first_rows=chunk.start == 0)
    return dx, dw, db


def _state(max_C: Tensor, others_C: Tensor, tile: Tensor, labels_C: Tensor) -> RowState:
    """Return the state of whole rows from the sums that were kept and from their logits."""
    return RowState(max_C, others_C, tile.gather(1, labels_C[:, None])[:, 0])
