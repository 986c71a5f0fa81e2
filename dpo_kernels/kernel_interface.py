"""What a backend does for the strategies."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dpo_kernels.loss_interface import SequenceLoss
from dpo_kernels.shapes import Head, PackedTokens, Tile


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
    residual: Tensor | None = None  # (C,) what is missing in each label's own value, the largest of a row: its rounding


@dataclass(frozen=True)
class RowResult:
    """Per-row outcome of a forward pass over the head."""

    logp: Tensor  # (N,)
    max: Tensor  # (N,)
    sumexp: Tensor  # (N,) sum of exp(z - max)
    others: Tensor  # (N,) the same without the label's own
    stats: dict[str, Tensor] = field(default_factory=dict)  # name -> (N,)


class RowKernels(Protocol):
    """The seam: what a backend does for the strategies. It knows rows, never preferences.

    An instance is made for one call, with the dtype of the GEMM operands and a cap on its own temporaries. Tiles are
    ``(C, Vt)`` views of rows into scratch that the strategy owns, columns ``start..start+Vt-1`` of the vocabulary.
    Tiles, ``RowState`` and gradients are float32 (float64 for float64 operands).
    """

    name: str
    dtype: torch.dtype
    can_alias_weight_grad: bool  # whether logits may lie in the buffer of the head's gradient until that is formed

    def buffer(self, device: torch.device, *shape: int) -> Tensor:
        """Uninitialised memory in the precision of accumulation: scratch, or a gradient in the making."""

    @staticmethod
    def finalize_weight_grad(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
        """A ``buffer`` that nobody will read again, times ``factor`` (), in ``dtype``; None where that takes a copy."""

    @staticmethod
    def row_alignment(device_type: str) -> int:
        """Elements that the rows of a tile are padded to, so that each begins where wide accesses may."""

    def scratch(self, device: torch.device, rows: int, cols: int) -> Tensor:
        """Uninitialised memory for tiles of at most so many rows and columns."""

    def tile_in(self, scratch: Tensor, rows: int, cols: int) -> Tensor:
        """A tile ``(rows, cols)`` at the beginning of the scratch."""

    # --- one tile of logits ---

    def new_state(self, rows: int, device: torch.device, stats: Sequence[str]) -> RowState:
        """The state of ``rows`` rows before the first tile."""

    def project(self, x_CH: Tensor, head: Head, start: int, tile: Tensor) -> None:
        """Write the final logits of ``x_CH`` for the tile's columns into ``tile``."""

    def reduce(self, state: RowState, tile: Tensor, labels_C: Tensor, start: int, keep_logits: bool = True) -> None:
        """Fold the tile into the state: the sums without the label, target gather, statistics.

        Without ``keep_logits`` a tile of whole rows may be left holding ``exp(z - max)``, and where the gradient's
        buffer is lent a tile of any columns, with the maximum so far; the state then says so.
        """

    def row_logps(self, state: RowState, labels_C: Tensor, vocab: int) -> RowResult:
        """Log-probs and statistics of the rows once every column was folded in."""

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

    def grad_hidden(self, d: LogitsGradient, head: Head, start: int, out_CH: Tensor, accumulate: bool) -> None:
        """``out (+)= d @ W[start:start+Vt]``, not yet times ``d.scale``."""

    def grad_weight(self, d: LogitsGradient, x_CH: Tensor, out_VtH: Tensor, accumulate: bool) -> None:
        """``out (+)= d^T @ (d.scale * x)``."""

    def grad_bias(self, d: LogitsGradient, start: int, out_Vt: Tensor, accumulate: bool) -> None:
        """``out (+)= d^T @ d.scale``."""

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
        """``project`` and ``dlogits_`` in one."""

    def reduce_and_dlogits(self, state: RowState, tile: Tensor, labels_C: Tensor, head: Head) -> LogitsGradient:
        """``reduce`` and ``dlogits_`` of whole rows in one, where no coefficient is waited for.

        The values may be those under another shift than ``state.max``; ``scale`` then turns their rows into those.
        """

    # --- tokens to pairs ---

    def segment_sum(self, values_N: Tensor, weights_N: Tensor | None, counts_S: Tensor) -> Tensor:
        """Weighted sums ``(S,)`` in float64 of consecutive runs of ``counts_S`` values, in a fixed order."""

    def sequence_loss(
        self,
        logp_N: Tensor,
        weights_N: Tensor | None,
        counts_S: Tensor,
        ref_S: Tensor,
        nan_if_invalid: Tensor,
        loss: SequenceLoss,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sequence log-probs ``(S,)``, losses ``(P,)`` and the derivative of their sum by the former, ``(S,)``."""

    # --- all rows, one tile at a time ---

    def linear_logprob(
        self, hidden_RH: Tensor, head: Head, rows: PackedTokens, tile: Tile, stats: Sequence[str]
    ) -> RowResult:
        """Log-probs of all rows: one GEMM unit."""

    def stream_logprob(
        self, hidden_RH: Tensor, head: Head, rows: PackedTokens, tile: Tile, stats: Sequence[str]
    ) -> RowResult:
        """The same without a tile in memory, where the backend has a kernel for it."""

    def linear_direction(
        self, hidden_RH: Tensor, head: Head, rows: PackedTokens, tile: Tile, stats: Sequence[str]
    ) -> tuple[RowResult, Tensor]:
        """Log-probs, and ``(N + 1, H)`` derivatives of ``-logp`` by the hidden rows (last row 0): two units."""

    def linear_logprob_backward(
        self,
        hidden_RH: Tensor,
        head: Head,
        rows: PackedTokens,
        saved: tuple[Tensor, Tensor, Tensor],
        grad_N: Tensor,
        tile: Tile,
        need: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients (hidden rows ``(N + 1, H)`` with a zero last row, weight, bias) from recomputed tiles.

        ``saved`` is (max, sumexp, others) of the forward pass; ``grad_N`` the upstream of each row's log-prob.
        """
