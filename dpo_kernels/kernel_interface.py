"""What a backend does for the strategies: row operations on tiles of logits.

A kernel knows rows, never preferences, with one exception for speed: ``sequence_loss``, which a backend may do for
DPO's own loss in one launch.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpo_kernels.loss_interface import SequenceLoss
from dpo_kernels.segments import segment_sum
from dpo_kernels.shapes import GPU_ROW_ALIGNMENT, Head, accumulation_dtype, padded


@dataclass
class RowState:
    """Running reduction of rows over tiles of the vocabulary; what an online softmax keeps.

    Sums of exponentials leave the label's own out: of a token that is nearly certain it is 1, beside which the others
    would lose their digits, and they are what its log-prob and its gradient are made of.
    """

    max: Tensor  # (C,) largest logit so far
    others: Tensor  # (C,) sum of exp(z - max) over the tokens that are not the label
    target: Tensor  # (C,) logit of the label, -inf before its column was seen
    entropy: Tensor | None = None  # (C,) -sum of exp(z - max) * (z - max) over the same
    logit_sum: Tensor | None = None  # (C,) of all tokens
    argmax: Tensor | None = None  # (C,) int64, first column of the largest logit
    square_sum: Tensor | None = None  # (C,) sum of exp(z - max)^2 over the tokens that are not the label
    exponentiated: bool = False  # the tile that was reduced last now holds exp(z - max)

    @property
    def sumexp(self) -> Tensor:
        """The sum of ``exp(z - max)`` over all tokens, ``(C,)``; ``others`` cannot be had back from it."""
        return self.others + (self.target - self.max).exp()


def rescale(before: Tensor, after: Tensor) -> Tensor:
    """``exp(before - after)`` for running maxima, 1 where neither has seen a finite logit."""
    return torch.where(before == after, torch.ones_like(after), torch.exp(before - after))


@dataclass(frozen=True)
class LogitsGradient:
    """A tile of ``d logits`` as the gradient GEMMs read it, and what is still to be done to their results."""

    values: Tensor  # (C, Vt), the dtype of the operands or of accumulation
    scale: Tensor | None  # (C,) factor of the rows of X and dX; None where the values carry it
    labels: Tensor  # (C,) int64
    residual: Tensor | None = None  # (C,) what rounding took from each label's own value, the largest of a row


@dataclass(frozen=True)
class RowResult:
    """Per-row outcome of a forward pass over the head."""

    logp: Tensor  # (N,)
    max: Tensor  # (N,)
    sumexp: Tensor  # (N,) sum of exp(z - max)
    others: Tensor  # (N,) the same without the label's own
    stats: dict[str, Tensor] = field(default_factory=dict)  # name -> (N,)


class RowKernels(ABC):
    """The kernel interface: ten row operations that a backend must have, and optional ones with defaults.

    An instance is made for one call, with the dtype of the GEMM operands and a cap on its own temporaries. Tiles are
    ``(C, Vt)`` views of rows into scratch that the strategy owns, columns ``start..start+Vt-1`` of the vocabulary.
    Tiles, ``RowState`` and gradients are float32 (float64 for float64 operands).
    """

    name: str
    can_alias_weight_grad = False  # whether logits may lie in the buffer of the head's gradient until that is formed
    streams_logps = False  # whether ``stream_logps`` exists
    recomputes_in_one_kernel = False  # whether ``recomputed_dlogits`` is more than two operations in turn

    def __init__(self, dtype: torch.dtype, workspace_bytes: int) -> None:
        self.dtype = dtype  # of the GEMM operands
        self.workspace_bytes = workspace_bytes  # vocabulary-sized temporaries beside the caller's tile

    # --- required: one tile of logits ---

    @staticmethod
    @abstractmethod
    def bytes_per_logit(dtype: torch.dtype, device_type: str) -> int:
        """Memory that a logit takes: its place in the tile and copies of it."""

    @abstractmethod
    def new_state(self, rows: int, device: torch.device, stats: Sequence[str]) -> RowState:
        """The state of ``rows`` rows before the first tile."""

    @abstractmethod
    def project(self, x_CH: Tensor, head: Head, start: int, tile: Tensor) -> None:
        """Write the final logits of ``x_CH`` for the tile's columns into ``tile``."""

    @abstractmethod
    def reduce(self, state: RowState, tile: Tensor, labels_C: Tensor, start: int, keep_logits: bool = True) -> None:
        """Fold the tile into the state: the sums without the label, target gather, statistics.

        Without ``keep_logits`` a tile of whole rows may be left holding ``exp(z - max)``. Where logits may lie in the
        weight gradient's memory, so may a tile of any columns, with the maximum so far. The state then says so.
        """

    @abstractmethod
    def row_logps(self, state: RowState, labels_C: Tensor, vocab: int) -> RowResult:
        """Log-probs and statistics of the rows once every column was folded in."""

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
    ) -> LogitsGradient:
        """``sumexp * (softmax - onehot)``, times the softcap's derivative: ``exp(z - max)``, and for the label -others.

        The tile is overwritten, or given up where the result is another tensor. A backend that rounds the result
        multiplies it by ``scale_C`` first, so that there is one rounding; otherwise the scale comes back.
        """

    @abstractmethod
    def grad_hidden(self, d: LogitsGradient, head: Head, start: int, out_CH: Tensor, accumulate: bool) -> None:
        """``out (+)= d @ W[start:start+Vt]``, not yet times ``d.scale``."""

    @abstractmethod
    def grad_weight(self, d: LogitsGradient, x_CH: Tensor, out_VtH: Tensor, accumulate: bool) -> None:
        """``out (+)= d^T @ (d.scale * x)``."""

    @abstractmethod
    def grad_bias(self, d: LogitsGradient, start: int, out_Vt: Tensor, accumulate: bool) -> None:
        """``out (+)= d^T @ d.scale``."""

    # --- optional: two operations in one kernel ---

    def reduce_and_dlogits(self, state: RowState, tile: Tensor, labels_C: Tensor, head: Head) -> LogitsGradient:
        """``reduce`` and ``dlogits_`` of whole rows, where no coefficient is waited for.

        The values may be those under another shift than ``state.max``; ``scale`` then turns their rows into those.
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
    ) -> LogitsGradient:
        """``project`` and ``dlogits_``."""
        self.project(x_CH, head, start, tile)
        return self.dlogits_(tile, labels_C, start, max_C, others_C, head, scale_C)

    def stream_logps(self, x_CH: Tensor, head: Head, labels_C: Tensor, stats: Sequence[str]) -> RowState:
        """The state of at least one row after every column, without a tile in memory (``streams_logps``)."""
        raise NotImplementedError(f"{self.name} has no kernel that keeps logits in registers")

    # --- optional: tokens to sequences ---

    def segment_sum(self, values_N: Tensor, weights_N: Tensor | None, counts_S: Tensor) -> Tensor:
        """Weighted sums ``(S,)`` in float64 of consecutive runs of ``counts_S`` values, in a fixed order."""
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
        """Sequence log-probs ``(S,)``, losses by example and the derivative of their sum by the former, ``(S,)``.

        ``nan_if_invalid`` is added to sums and to the derivative: a hinge maps a NaN margin to a finite gradient.
        """
        sums_S = self.segment_sum(logp_N, weights_N, counts_S) + nan_if_invalid
        losses_E, grad_S = loss.value_and_grad(sums_S, ref_S, counts_S)
        return sums_S, losses_E, grad_S + nan_if_invalid

    # --- optional: memory ---

    def buffer(self, device: torch.device, *shape: int) -> Tensor:
        """Uninitialised memory in the precision of accumulation: scratch, or a gradient in the making."""
        return torch.empty(shape, dtype=accumulation_dtype(self.dtype), device=device)

    @staticmethod
    def row_alignment(device_type: str) -> int:
        """Elements that the rows of a tile are padded to, so that each begins where wide accesses may.

        On a GPU these are 16. Without them a GEMM or a row pass of an odd vocabulary reads element by element.
        """
        return GPU_ROW_ALIGNMENT if device_type == "cuda" else 1

    def scratch(self, device: torch.device, rows: int, cols: int) -> Tensor:
        """Uninitialised memory for tiles of at most so many rows and columns."""
        return self.buffer(device, rows * padded(cols, self.row_alignment(device.type)))

    def tile_in(self, scratch: Tensor, rows: int, cols: int) -> Tensor:
        """A tile ``(rows, cols)`` at the beginning of the scratch."""
        pitch = padded(cols, self.row_alignment(scratch.device.type))
        return scratch[: rows * pitch].view(rows, pitch)[:, :cols]

    def empty_operands_like(self, tile: Tensor) -> Tensor:
        """An uninitialised tile in the dtype of the GEMM operands."""
        rows, cols = tile.shape
        pitch = padded(cols, self.row_alignment(tile.device.type))
        return tile.new_empty(rows, pitch, dtype=self.dtype)[:, :cols]

    @staticmethod
    def finalize_weight_grad(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
        """A ``buffer`` that nothing will read again, times ``factor`` (), in ``dtype``; None where that takes a copy.

        It is scaled in place, and untouched where a factor of 1 can be told without a sync.
        """
        if grad.dtype != dtype:
            return None
        return grad if grad.device.type == "cpu" and float(factor) == 1.0 else grad.mul_(factor)
