"""The kernel interface: the row operations on tiles of logits that a backend does for the strategies.

Row operations know no loss. ``sequence_loss`` is the one exception, made for speed: a backend may compute DPO's own
loss in one launch.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_kernels.loss_interface import SequenceLoss
from dpo_kernels.records import dataclass
from dpo_kernels.segments import segment_sum, sequence_to_token
from dpo_kernels.shapes import GPU_ROW_ALIGNMENT, Head, Sampling, accumulation_dtype, padded


@dataclass(frozen=False)
class RowState:
    """The running maximum and sums of rows while the vocabulary passes by in tiles, as in an online softmax.

    The sums of exponentials leave the label's own out. A nearly certain token's own exponential is 1, and beside it
    the others would lose their digits. The token's log-prob and gradient are made of these others.
    """

    max: Tensor  # (C,) largest logit so far
    others: Tensor  # (C,) sum of exp(z - max) over the tokens that are not the label
    target: Tensor  # (C,) logit of the label, -inf until its column has passed
    entropy: Tensor | None = None  # (C,) -sum of exp(z - max) * (z - max) over the tokens that are not the label
    logit_sum: Tensor | None = None  # (C,) sum of the logits of all tokens
    argmax: Tensor | None = None  # (C,) int64, first column of the largest logit
    square_sum: Tensor | None = None  # (C,) sum of exp(z - max)^2 over the tokens that are not the label
    exponentiated: bool = False  # the tile that was reduced last now holds exp(z - max)
    block_max: Tensor | None = None  # (B, C) largest logits of blocks of its columns, if it holds codes; else None

    @property
    def sumexp(self) -> Tensor:
        """The sum ``(C,)`` of ``exp(z - max)`` over all tokens. ``others`` cannot be computed back from it."""
        return self.others + (self.target - self.max).exp()


def rescale(before: Tensor, after: Tensor) -> Tensor:
    """Return ``exp(before - after)`` for running maxima ``(C,)``. It is 1 where neither has seen a finite logit."""
    return torch.where(before == after, torch.ones_like(after), torch.exp(before - after))


@dataclass(frozen=True)
class LogitsGradient:
    """The gradient of a tile of logits as the GEMMs read it, and the factors that their results still need."""

    values: Tensor  # (C, Vt), in the dtype of the operands or of accumulation
    scale: Tensor | None  # (C,) factor of the rows of X and dX; None where the values contain it
    labels: Tensor  # (C,) int64
    residual: Tensor | None = None  # (C,) rounding residual: what rounding took from the label's value
    x_exponent: int = 0  # k: for the head's gradient rows of X are multiplied by 2^k as well, and the product by 2^-k
    x_scale: Tensor | None = None  # (C,) factor of the rows of X where it is not that of dX

    def with_power(self, power: Tensor | None) -> "LogitsGradient":
        """Return the gradient whose product for the hidden states is multiplied by a 0-d factor, or by 1 for None."""
        if power is None or self.scale is None:
            return self
        return replace(self, scale=self.scale * power, x_scale=self.scale)


class SampledRows(NamedTuple):
    """What the sample of the logits' gradient needs of each row of a tile."""

    labels: Tensor  # (C,) int64
    max: Tensor  # (C,) largest logit, in the dtype of accumulation as all that follow
    others: Tensor  # (C,) sum of exponentials without the label's own
    sumexp: Tensor  # (C,) sum of exponentials
    scale: Tensor  # (C,) factor of each row, which the sample's values do not contain
    tokens: Tensor  # (C,) int64, row of each token in the flattened input

    @staticmethod
    def of(
        labels: Tensor, highest: Tensor, others: Tensor, sumexp: Tensor, scale: Tensor, tokens: Tensor
    ) -> "SampledRows":
        """Return the rows. Those without a coefficient count as if no entry of theirs were worth keeping."""
        unused = (scale == 0) & sumexp.isfinite()
        return SampledRows(labels, highest, others, sumexp.masked_fill(unused, torch.inf), scale, tokens)


@dataclass(frozen=True)
class SparseGradient:
    """A sample of the gradient of a tile of logits, row after row, and the factors of its rows."""

    offsets: Tensor  # (C + 1,) int64, where the entries of each row begin
    columns: Tensor  # (K,) int32 or int64, columns of the tile, ascending in each row
    values: Tensor  # (K,), in the dtype of accumulation
    scale: Tensor  # (C,) factor of each row, which its products apply


class RowsOfBoth(NamedTuple):
    """Whole rows of logits of the policy's and of the reference's head, for the same tokens."""

    tile: Tensor  # (C, V) logits of the policy
    state: RowState  # of the policy's rows
    ref_tile: Tensor  # (C, V) logits of the reference
    ref_state: RowState  # of the reference's rows


class Coefficients(NamedTuple):
    """The derivatives of the loss by what a token adds to the sums of its sequence."""

    of_logp: Tensor  # (C,), by the log-prob of its label
    of_kl: Tensor  # (C,), by its KL divergence of the reference from the policy


@dataclass(frozen=True)
class RowResult:
    """What a forward pass over the head gives for each token."""

    logp: Tensor  # (N,) log-prob of the label
    max: Tensor  # (N,) largest logit
    sumexp: Tensor  # (N,) sum of exp(z - max)
    others: Tensor  # (N,) the same sum without the label's own exponential
    stats: dict[str, Tensor] = field(default_factory=dict)  # name -> (N,)


class RowsAndDivergences(NamedTuple):
    """What a forward pass over both heads gives for each token."""

    policy: RowResult
    reference: RowResult
    kl: Tensor  # (N,) KL(reference || policy)


class SumsOfBoth(NamedTuple):
    """What a backward pass over both heads needs of a forward one, ``(N,)`` each."""

    max: Tensor  # largest logit of the policy
    sumexp: Tensor  # its sum of exponentials
    others: Tensor  # its sum of exponentials without the label's own
    ref_max: Tensor  # largest logit of the reference
    ref_others: Tensor  # its sum of exponentials without the label's own


@dataclass(frozen=True)
class RowScale:
    """What turns the derivative by sequence log-probs into the factors of the rows of the logits' gradient."""

    state: RowState  # of the tokens' rows, after every column
    segments: Tensor  # (C,) int64, sequence of each token in the batch
    first_sequence: int  # the batch's sequence that comes first among them
    logit_scale: float
    divisor: Tensor | None = None  # () float64, number that the sum of the losses is divided by; None where it was
    grad_scale: float = 1.0  # factor of every gradient

    def factors(self, grad_S: Tensor, weights_C: Tensor | None) -> Tensor:
        """Return minus the coefficient of each token times the logit scale, over the token's sum of exponentials.

        ``grad_S`` is ``(S,)``, the derivative of the losses' sum by the sequence log-probs, float64. ``weights_C`` are
        the tokens' weights, or None for 1.
        """
        if self.divisor is not None:
            grad_S = grad_S / self.divisor
        if self.grad_scale != 1.0:
            grad_S = grad_S * self.grad_scale
        coefficient_C = sequence_to_token(grad_S, self.segments - self.first_sequence, weights_C)
        return (-coefficient_C * self.logit_scale / self.state.sumexp).to(self.state.max.dtype)


class RowKernels(ABC):
    """The kernel interface: nine row operations that a backend must have, and optional ones with defaults.

    An instance is made for one call. It knows the dtype of the GEMM operands and a limit on its own temporaries.
    A tile ``(C, Vt)`` is a view into scratch that the strategy owns. It holds the columns ``start..start+Vt-1`` of the
    vocabulary. Tiles, ``RowState`` and gradients are float32, or float64 for float64 operands. Labels are ``(C,)``
    int64 and count over the whole vocabulary. Hidden states ``x_CH`` have the dtype of the operands.
    """

    name: str
    can_alias_weight_grad = False  # whether logits may lie in the buffer of the head's gradient until that is formed
    streams_logps = False  # whether ``stream_logps`` exists
    launch_errors: tuple[type[Exception], ...] = ()  # raised where a compiler or a GPU cannot take a launch

    def __init__(self, dtype: torch.dtype, workspace_bytes: int, narrow: bool = False) -> None:
        self.dtype = dtype  # dtype of the GEMM operands
        self.workspace_bytes = workspace_bytes  # limit of the temporaries beside the caller's tile
        self.codes_logits = narrow and self.can_code_logits(dtype)  # tiles hold codes of 16 bits, see below
        self._scratch_logits = 0  # logits that the scratch of the call holds
        self._operands: Tensor | None = None  # memory for a tile of the gradient as the GEMMs read it

    # --- required: one tile of logits ---

    @staticmethod
    @abstractmethod
    def bytes_per_logit(dtype: torch.dtype, device_type: str) -> int:
        """Return the bytes that one logit takes: its place in the tile and the copies that are made of it.

        It is 2 instead where a call ``codes_logits``.
        """

    @abstractmethod
    def new_state(self, rows: int, device: torch.device, stats: Sequence[str]) -> RowState:
        """Return the state of ``rows`` rows before the first tile. ``stats`` names the statistics to keep."""

    @abstractmethod
    def project(self, x_CH: Tensor, head: Head, start: int, tile: Tensor) -> None:
        """Write the logits of ``x_CH``, with bias, scale and softcap, for the columns from ``start`` into ``tile``."""

    @abstractmethod
    def reduce(self, state: RowState, tile: Tensor, labels_C: Tensor, start: int, keep_logits: bool = True) -> None:
        """Fold the tile into the state: sums without the label, the label's logit, and the statistics.

        Args:
            state: state of the tile's rows, which is changed.
            tile: ``(C, Vt)`` logits.
            labels_C: ``(C,)`` int64 labels.
            start: the vocabulary's column that comes first in the tile.
            keep_logits: whether the tile must still hold the logits afterwards. If not, a tile of whole rows may hold
                ``exp(z - max)``, and ``state.exponentiated`` says so. A backend with ``can_alias_weight_grad`` may do
                that to tiles of any columns, with the maximum so far.

        """

    @abstractmethod
    def row_logps(self, state: RowState, labels_C: Tensor, vocab: int) -> RowResult:
        """Return log-probs and statistics of the rows, once every column has been folded into the state."""

    @abstractmethod
    def dlogits_(
        self,
        tile: Tensor,
        labels_C: Tensor,
        start: int,
        max_C: Tensor,
        others_C: Tensor,
        head: Head,
        scale_C: Tensor | None,
        exponentiated: bool = False,
        expected: float = 1.0,
    ) -> LogitsGradient:
        """Return ``sumexp * (softmax - onehot)``, times the softcap's derivative.

        The values are ``exp(z - max)``, and ``-others`` at the label. The tile is overwritten, and nobody may read it
        again where the result is another tensor.

        Args:
            tile: ``(C, Vt)`` logits, or ``exp(z - max)`` if ``exponentiated``.
            labels_C: ``(C,)`` int64 labels.
            start: the vocabulary's column that comes first in the tile.
            max_C: ``(C,)`` largest logit of each row, in the dtype of the tile.
            others_C: ``(C,)`` sum of exponentials of each row without the label's own.
            head: the head that made the logits. Its softcap is differentiated.
            scale_C: ``(C,)`` factor of each row, or None for 1. A backend that rounds the result multiplies by it
                first, so that there is one rounding.
            exponentiated: whether ``reduce`` has left ``exp(z - max)`` in the tile.
            expected: about the largest ``|scale_C * others_C|`` in the call, as far as the host knows. A backend that
                rounds to float16 lays the range of its operands by it.

        Returns:
            The gradient. Its ``scale`` is ``scale_C`` where the values have not been multiplied by it, and powers of
            two where they have been multiplied by ``scale_C`` and by the inverse of these.

        """

    @abstractmethod
    def grad_hidden(self, d: LogitsGradient, head: Head, start: int, out_CH: Tensor, accumulate: bool) -> None:
        """Compute ``out (+)= d @ W[start:start+Vt]``. The caller multiplies by ``d.scale`` afterwards."""

    @abstractmethod
    def grad_weight(self, d: LogitsGradient, x_CH: Tensor, out_VtH: Tensor, accumulate: bool) -> None:
        """Compute ``out (+)= d^T @ (d.scale * x)`` in the precision of ``out``."""

    @abstractmethod
    def grad_bias(self, d: LogitsGradient, start: int, out_Vt: Tensor, accumulate: bool) -> None:
        """Compute ``out (+)= d^T @ d.scale`` for the columns from ``start``."""

    # --- optional: logits in 16 bits ---

    @staticmethod
    def can_code_logits(dtype: torch.dtype) -> bool:
        """Return whether tiles can hold codes of 16 bits instead of logits, for operands of a dtype on this machine.

        A code says how far a logit lies below the largest one of its block of columns. In a call with ``codes_logits``
        a tile is int16, and without memory where no gradient follows. ``scratch``, ``tile_in``, ``recomputed_dlogits``,
        ``sampled_dlogits_of_state``, ``recomputed_sampled_dlogits`` and the next four operations take it, and no other
        may. Calls whose tiles are read by others are made without ``narrow``.
        """
        return False

    def project_and_reduce(
        self,
        state: RowState,
        x_CH: Tensor,
        head: Head,
        start: int,
        tile: Tensor,
        labels_C: Tensor,
        *,
        keep_logits: bool = True,
        gradient_follows: bool = True,
    ) -> None:
        """Do ``project`` and ``reduce`` at once: the arguments are those of both.

        Without ``gradient_follows`` nobody reads the tile afterwards, and nothing needs to be written there.
        """
        self.project(x_CH, head, start, tile)
        self.reduce(state, tile, labels_C, start, keep_logits)

    def dlogits_of_state(
        self,
        tile: Tensor,
        labels_C: Tensor,
        start: int,
        state: RowState,
        head: Head,
        scale_C: Tensor | None,
        expected: float = 1.0,
    ) -> LogitsGradient:
        """Do ``dlogits_`` with the tile that was reduced last into a state, whatever it holds."""
        sums = (state.max, state.others)
        return self.dlogits_(tile, labels_C, start, *sums, head, scale_C, state.exponentiated, expected)

    def dlogits_elsewhere(
        self,
        kept: Tensor,
        then: RowState,
        tile: Tensor,
        labels_C: Tensor,
        start: int,
        state: RowState,
        head: Head,
        scale_C: Tensor | None,
    ) -> LogitsGradient:
        """Do ``dlogits_of_state`` with logits that ``project_and_reduce`` left in other memory.

        Args:
            kept: ``(C, Vt)`` what it left.
            then: the state after it, with the maxima of that time.
            tile: ``(C, Vt)`` scratch, which takes the gradient.
            labels_C: ``(C,)`` int64 labels.
            start: the vocabulary's column that comes first in the tile.
            state: the state after all columns.
            head: see ``dlogits_``.
            scale_C: see ``dlogits_``.

        """
        if then.exponentiated:
            torch.mul(kept, rescale(then.max, state.max)[:, None], out=tile)
        else:
            tile.copy_(kept)
        return self.dlogits_(tile, labels_C, start, state.max, state.others, head, scale_C, then.exponentiated)

    def project_and_dlogits(
        self, state: RowState, x_CH: Tensor, head: Head, tile: Tensor, labels_C: Tensor
    ) -> LogitsGradient:
        """Do ``project`` and ``reduce_and_dlogits`` of whole rows at once."""
        self.project(x_CH, head, 0, tile)
        return self.reduce_and_dlogits(state, tile, labels_C, head)

    # --- optional: gradients of logits in 16 bits ---

    def rounds_operands(self, like: Tensor) -> bool:
        """Return whether gradients of logits on the device of a tensor are rounded to 16-bit operands for the GEMMs."""
        return False

    # --- optional: two operations in one kernel ---

    def reduce_to_logps(self, tile: Tensor, labels_C: Tensor, logp_C: Tensor, keep_logits: bool) -> RowState:
        """Do ``new_state``, ``reduce`` and ``row_logps`` of whole rows, without statistics.

        Args:
            tile: ``(C, V)`` logits, at least one of them.
            labels_C: ``(C,)`` int64 labels.
            logp_C: ``(C,)`` memory that is filled with the log-probs of the labels.
            keep_logits: see ``reduce``.

        """
        state = self.new_state(tile.shape[0], tile.device, ())
        self.reduce(state, tile, labels_C, 0, keep_logits)
        logp_C.copy_(self.row_logps(state, labels_C, tile.shape[1]).logp)
        return state

    def reduce_and_dlogits(self, state: RowState, tile: Tensor, labels_C: Tensor, head: Head) -> LogitsGradient:
        """Do ``reduce`` and ``dlogits_`` of whole rows at once. The gradient needs no coefficient yet.

        A backend may shift the exponentials by another number than ``state.max``. Multiplying the rows by ``scale``
        then corrects them.
        """
        self.reduce(state, tile, labels_C, 0, keep_logits=head.softcap is not None)
        return self.dlogits_(tile, labels_C, 0, state.max, state.others, head, None, state.exponentiated)

    def recomputed_dlogits(
        self,
        x_CH: Tensor,
        head: Head,
        start: int,
        tile: Tensor,
        labels_C: Tensor,
        max_C: Tensor,
        others_C: Tensor,
        scale_C: Tensor | None,
        expected: float = 1.0,
    ) -> LogitsGradient:
        """Do ``project`` and ``dlogits_`` at once: ``tile`` is scratch, and the arguments are those of both."""
        self.project(x_CH, head, start, tile)
        return self.dlogits_(tile, labels_C, start, max_C, others_C, head, scale_C, expected=expected)

    def stream_logps(self, x_CH: Tensor, head: Head, labels_C: Tensor, stats: Sequence[str]) -> RowState:
        """Return the state of at least one row after every column. No tile lies in memory (``streams_logps``)."""
        raise NotImplementedError(f"{self.name} has no kernel that keeps logits in registers")

    # --- optional: a sample of the logits' gradient ---

    @staticmethod
    def sample_bytes(dtype: torch.dtype, rows: int, cols: int, tau: float) -> int:
        """Return the most bytes that the sample of a tile ``(rows, cols)`` and its products take beside the tile."""
        return 0

    def sample_dlogits(
        self,
        tile: Tensor,
        start: int,
        of_rows: SampledRows,
        head: Head,
        sampling: Sampling,
        exponentiated: bool = False,
        expected: float = 1.0,
    ) -> SparseGradient | None:
        """Return an unbiased sample of what ``dlogits_`` returns, or None where it has too many entries to pay.

        A backend where a device decides that returns a gradient of its own, which may be the exact one. It lies in the
        tile, which nobody may then overwrite before the products.

        Args:
            tile: ``(C, Vt)`` logits, or ``exp(z - max)`` if ``exponentiated``. Where None is returned it is as before.
            start: the vocabulary's column that comes first in the tile, a multiple of ``sampling.BLOCK``.
            of_rows: what is known of the rows.
            head: the head that made the logits. Its softcap is differentiated.
            sampling: threshold and seed.
            exponentiated: whether ``reduce`` has left ``exp(z - max)`` in the tile.
            expected: see ``dlogits_``.

        """
        raise NotImplementedError(f"{self.name} samples no gradients")

    def sampled_dlogits_of_state(
        self,
        tile: Tensor,
        start: int,
        state: RowState,
        of_rows: SampledRows,
        head: Head,
        sampling: Sampling,
        expected: float = 1.0,
    ) -> LogitsGradient | SparseGradient:
        """Do ``sample_dlogits``, or where it returns None ``dlogits_of_state``, with the tile that was reduced last."""
        d = self.sample_dlogits(tile, start, of_rows, head, sampling, state.exponentiated, expected)
        if d is not None:
            return d
        return self.dlogits_of_state(tile, of_rows.labels, start, state, head, of_rows.scale, expected)

    def recomputed_sampled_dlogits(
        self,
        x_CH: Tensor,
        head: Head,
        start: int,
        tile: Tensor,
        of_rows: SampledRows,
        sampling: Sampling,
        expected: float = 1.0,
    ) -> LogitsGradient | SparseGradient:
        """Do ``project`` and ``sample_dlogits``, or ``dlogits_`` where that returns None. ``tile`` is scratch."""
        self.project(x_CH, head, start, tile)
        d = self.sample_dlogits(tile, start, of_rows, head, sampling, expected=expected)
        if d is not None:
            return d
        sums = (of_rows.max, of_rows.others)
        return self.dlogits_(tile, of_rows.labels, start, *sums, head, of_rows.scale, False, expected)

    def sparse_grad_hidden(self, d: SparseGradient, head: Head, start: int, out_CH: Tensor, accumulate: bool) -> None:
        """Do ``grad_hidden`` with a sample, times its scale."""
        raise NotImplementedError(f"{self.name} samples no gradients")

    def sparse_grad_weight(self, d: SparseGradient, x_CH: Tensor, out_VtH: Tensor, accumulate: bool) -> None:
        """Do ``grad_weight`` with a sample. Rows without an entry become 0 where products are not added."""
        raise NotImplementedError(f"{self.name} samples no gradients")

    def sparse_grad_bias(self, d: SparseGradient, out_Vt: Tensor, accumulate: bool) -> None:
        """Do ``grad_bias`` with a sample."""
        raise NotImplementedError(f"{self.name} samples no gradients")

    # --- optional: the logits of two heads ---

    def kl_of_rows(self, rows: RowsOfBoth) -> Tensor:
        """Return ``KL(reference || policy)`` of each row, ``(C,)``, from logits that are kept."""
        raise NotImplementedError(f"{self.name} reads no second head")

    def dlogits_of_both_(
        self,
        rows: RowsOfBoth,
        labels_C: Tensor,
        head: Head,
        coefficients: Coefficients,
        expected: float = 1.0,
    ) -> LogitsGradient:
        """Return the gradient of the policy's logits. The policy's tile is overwritten.

        With ``g`` and ``k`` the coefficients of a token, and ``p`` and ``q`` the policy's and the reference's
        probabilities, it is ``logit_scale (g onehot - (g - k) p - k q)``, times the softcap's derivative.

        Args:
            rows: logits of both heads, and the states of their rows.
            labels_C: ``(C,)`` int64 labels.
            head: the policy's head.
            coefficients: ``g`` and ``k`` of each token.
            expected: see ``dlogits_``.

        """
        raise NotImplementedError(f"{self.name} reads no second head")

    # --- optional: more than one launch ---

    def launches(
        self, operation: str, x_CH: Tensor, stats: bool
    ) -> Sequence[tuple[str, AbstractContextManager[object]]]:
        """Return the launches that an operation chooses from. The self-check tries each.

        Args:
            operation: ``"recomputed_dlogits"`` or ``"stream_logps"``.
            x_CH: hidden states, whose dtype and device decide.
            stats: whether statistics are kept.

        Returns:
            The name of each launch, empty where there is one, and a context in which the operation takes it.

        """
        return (("", nullcontext()),)

    @classmethod
    def chosen_launches(cls) -> Any:
        """Return what this process has chosen among launches, for ``take_launches`` of another one. It is picklable."""
        return None

    @classmethod
    def take_launches(cls, chosen: Any) -> None:
        """Take the choices of another process instead of one's own."""
        assert chosen is None, "a backend that chooses among launches takes choices"

    @classmethod
    def cannot_take(cls, error: Exception) -> bool:
        """Whether an error says that a GPU or a compiler cannot take a launch, while others may run."""
        return isinstance(error, cls.launch_errors)

    # --- optional: tokens to sequences ---

    def segment_sum(self, values_N: Tensor, weights_N: Tensor | None, counts_S: Tensor) -> Tensor:
        """Return weighted sums ``(S,)`` in float64 of consecutive runs of ``counts_S`` values.

        The order of the additions is fixed.
        """
        return segment_sum(values_N, weights_N, counts_S)

    def sequence_loss(
        self,
        logp_N: Tensor,
        weights_N: Tensor | None,
        counts_S: Tensor,
        ref_S: Tensor,
        nan_if_invalid: Tensor,
        loss: SequenceLoss,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute sequence log-probs, the losses of the examples and their derivative.

        Args:
            logp_N: ``(N,)`` log-probs of tokens, sequence by sequence.
            weights_N: ``(N,)`` weights of the tokens, or None for 1.
            counts_S: ``(S,)`` int64 number of tokens of each sequence.
            ref_S: ``(S,)`` log-probs of the reference, float64.
            nan_if_invalid: 0-d, 0 or NaN. It is added to the sums and to the derivative, because a hinge maps a NaN
                margin to a finite gradient.
            loss: the loss of these examples.

        Returns:
            Sequence log-probs ``(S,)``, losses by example, and the derivative ``(S,)`` of the losses' sum by the
            log-probs, all float64.

        """
        sums_S = self.segment_sum(logp_N, weights_N, counts_S) + nan_if_invalid
        losses_E, grad_S = loss.value_and_grad(sums_S, ref_S, counts_S)
        return sums_S, losses_E, grad_S + nan_if_invalid

    def sequence_loss_and_scale(
        self,
        logp_C: Tensor,
        weights_C: Tensor | None,
        counts_S: Tensor,
        ref_S: Tensor,
        nan_if_invalid: Tensor,
        loss: SequenceLoss,
        scale: RowScale,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do ``sequence_loss`` of whole examples, and compute the factors of the rows of their logits' gradient.

        Returns:
            Sequence log-probs ``(S,)`` and losses by example, float64. Then the factors ``(C,)`` in the dtype of the
            state, see ``RowScale.factors``.

        """
        sums_S, losses_E, grad_S = self.sequence_loss(logp_C, weights_C, counts_S, ref_S, nan_if_invalid, loss)
        return sums_S, losses_E, scale.factors(grad_S, weights_C)

    # --- optional: memory ---

    def buffer(self, device: torch.device, *shape: int) -> Tensor:
        """Return uninitialised memory in the dtype of accumulation, for scratch or for a gradient."""
        return torch.empty(shape, dtype=accumulation_dtype(self.dtype), device=device)

    @staticmethod
    def row_alignment(device_type: str) -> int:
        """Return the number of elements that rows of a tile begin at multiples of: 16 on a GPU, otherwise 1.

        With an odd vocabulary and no padding a GEMM or a row operation would read element by element.
        """
        return GPU_ROW_ALIGNMENT if device_type == "cuda" else 1

    def scratch(self, device: torch.device, logits: int) -> Tensor:
        """Return uninitialised memory ``(logits,)`` for the tiles of a call, rows padded.

        ``empty_operands_like`` then has memory for as many values.
        """
        self._scratch_logits = logits
        return self.buffer(device, logits)

    def tile_in(self, scratch: Tensor, rows: int, cols: int) -> Tensor:
        """Return a tile ``(rows, cols)`` that is a view of the beginning of the scratch."""
        pitch = padded(cols, self.row_alignment(scratch.device.type))
        return scratch.as_strided((rows, cols), (pitch, 1))

    def empty_operands_like(self, tile: Tensor) -> Tensor:
        """Return an uninitialised tile of the same shape in the dtype of the GEMM operands.

        Every tile of a call lies in the same memory, so that the next one overwrites it.
        """
        rows, cols = tile.shape
        pitch = padded(cols, self.row_alignment(tile.device.type))
        if self._operands is None or self._operands.numel() < rows * pitch:
            self._operands = tile.new_empty(max(rows * pitch, self._scratch_logits), dtype=self.dtype)
        return self._operands.as_strided((rows, cols), (pitch, 1))

    @staticmethod
    def to_input_rows(dx: Tensor, slot: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return packed rows at their places in the input, times a factor, or None to leave it to torch's operations.

        Args:
            dx: ``(N + 1, H)`` rows in the dtype of accumulation, the last one 0.
            slot: ``(R,)`` int64 packed place of each input row, N where it is not scored.
            factor: 0-d.
            dtype: dtype of the result, ``(R, H)``.

        """
        return None

    @staticmethod
    def finalize_weight_grad(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return ``grad`` times ``factor`` in ``dtype``, or None where that takes a copy.

        ``grad`` is a ``buffer`` that nothing will read again, and is scaled in place. ``factor`` is 0-d. On the CPU a
        factor of 1 is recognised and the buffer left alone. On a GPU looking at the factor would be a sync.
        """
        if grad.dtype != dtype:
            return None
        return grad if grad.device.type == "cpu" and float(factor) == 1.0 else grad.mul_(factor)


class BothKernels(NamedTuple):
    """The row operations of one backend, for the operands of the policy's head and of the reference's."""

    policy: RowKernels
    reference: RowKernels
