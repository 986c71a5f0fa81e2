"""What the layers hand to each other, and the legend of the shapes.

Shapes, used as suffixes of names throughout (``x_CH`` is a ``(C, H)`` tensor):

====  =================================================================
R     rows of the flattened input: ``2B * T`` padded, ``N`` packed
N     scored rows, packed pair by pair (chosen first), or their capacity
S     sequences
P     pairs, ``S = 2P``; sequence ``2p`` is chosen, ``2p + 1`` rejected
C     rows of one chunk
H     hidden size
V     vocabulary size (rows of the LM head)
====  =================================================================
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

STATS = ("entropy", "mean_logits", "top1", "log_sum_p2")  # means over tokens, from the row kernels
TOKEN_LOGPS = "token_logps"  # by token; may be asked for among them
# Tensors that torch wraps because a collective has yet to fill them: every operation of torch's on one waits for it.
WRAPPERS_THAT_UNWRAP = ("AsyncCollectiveTensor",)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of logits tiles, reductions and gradients in flight."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_dtype(device: torch.device) -> torch.dtype:
    """Dtype of what there is one of by sequence or pair: float64 (they are few), but for MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


GPU_ROW_ALIGNMENT = 16  # elements; what a Triton launch specialises on, and wide accesses in every dtype


def padded(cols: int, alignment: int) -> int:
    """Elements from one row of a tile of ``cols`` columns to the next; rows too short to profit are not padded."""
    return cols if cols < 4 * alignment else -(-cols // alignment) * alignment


def spans(total: int, step: int) -> Iterator[tuple[int, int]]:
    """Cut ``0..total`` into pieces of at most ``step``."""
    for start in range(0, total, step):
        yield start, min(start + step, total)


class DPOLossOutput(NamedTuple):
    """What ``fused_dpo_loss`` returns; every field but ``loss`` is detached.

    ``loss`` is a scalar, or ``(P,)`` with ``reduction="none"``. The six log-prob and reward fields are
    ``(P,)``, by pair. ``stats`` maps each requested statistic, and always ``"tokens"``, to an ``(S,)``
    float32 tensor in the order of the input sequences; ``"token_logps"``, where requested, has the shape of the labels.
    All are float32, or float64 for float64 inputs.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    stats: dict[str, Tensor]

    def metrics(self, pairs: str = "stacked") -> dict[str, Tensor]:
        """What training code logs, by TRL's names where TRL has them: 0-d tensors, detached, without a host sync.

        ``rewards/*``, ``logps/*`` are means over pairs, ``rewards/accuracies`` the share of pairs whose chosen reward
        is the higher. Of the statistics that were asked for: ``logits/*``, ``entropy`` and ``mean_token_accuracy`` (top
        1, of the chosen) are means over scored tokens. ``scored_tokens`` are those of this batch (TRL's ``num_tokens``
        counts prompts too, and adds up over steps). ``pairs`` as in the call, for the order of ``stats``.
        """
        if pairs not in ("stacked", "interleaved"):
            raise ValueError(f"unknown pairs {pairs!r}; known: stacked, interleaved")
        margins = self.chosen_rewards - self.rejected_rewards
        found = {
            "rewards/chosen": self.chosen_rewards.mean(),
            "rewards/rejected": self.rejected_rewards.mean(),
            "rewards/accuracies": (margins > 0).to(margins.dtype).mean(),
            "rewards/margins": margins.mean(),
            "logps/chosen": self.chosen_logps.mean(),
            "logps/rejected": self.rejected_logps.mean(),
            "scored_tokens": self.stats["tokens"].sum(),
        }
        half = self.chosen_logps.shape[0]
        sides = [slice(0, half), slice(half, None)] if pairs == "stacked" else [slice(0, None, 2), slice(1, None, 2)]
        everywhere = slice(None)
        for name, stat, places in (
            ("logits/chosen", "mean_logits", sides[0]),
            ("logits/rejected", "mean_logits", sides[1]),
            ("mean_token_accuracy", "top1", sides[0]),
            ("entropy", "entropy", everywhere),
        ):
            if stat in self.stats:
                tokens = self.stats["tokens"][places]
                found[name] = (self.stats[stat][places] * tokens).sum() / tokens.sum().clamp(min=1)
        return found


class LossInputs(NamedTuple):
    """What a loss sees: ``(P,)`` sequence log-probs and token counts (floating point), and beta."""

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    beta: float


@dataclass(frozen=True)
class Head:
    """An LM head: logits are ``cap(scale * (x W^T + b))`` with ``cap(z) = softcap * tanh(z / softcap)``."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab(self) -> int:
        """V."""
        return self.weight.shape[0]


@dataclass(frozen=True)
class Rows:
    """The scored rows of a batch, packed sequence by sequence in the internal order of sequences.

    ``counts_host`` lies on the CPU so that strategies can plan without a sync; with a static capacity
    (``max_scored_tokens``) nothing is known on the host and it is filled with -1.
    """

    index: Tensor  # (N,) int64, row of the flattened hidden states
    labels: Tensor  # (N,) int64, in [0, V)
    weights: Tensor | None  # (N,) float32 or float64, weight in the sequence's sum; 0 on unused capacity
    segments: Tensor  # (N,) int64, sequence of each row
    slot: Tensor  # (R,) int64, place of each input row among the packed ones, N where not scored
    counts: Tensor  # (S,) int64 on the device of the inputs
    counts_host: Tensor  # (S,) int64 on the CPU
    poison: Tensor  # () float64: 0, or NaN when the input cannot be scored honestly

    @property
    def capacity(self) -> int:
        """N, the rows that are allocated."""
        return self.index.shape[0]

    @cached_property
    def host_counts(self) -> list[int] | None:
        """Scored tokens of each sequence, or None where the host does not know them."""
        counts: list[int] = self.counts_host.tolist()
        return None if counts and counts[0] < 0 else counts

    @cached_property
    def used(self) -> int:
        """Rows to compute: those that are scored, or the whole capacity where the host does not know."""
        return self.capacity if self.host_counts is None else sum(self.host_counts)

    def gather(self, hidden_RH: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows ``start..stop-1`` of the hidden states as a contiguous ``(C, H)`` tensor of ``dtype``."""
        x_CH = hidden_RH.index_select(0, self.index[start:stop]).to(dtype)
        if self.host_counts is None:
            # Unused capacity points at row 0, which may be padding that holds anything, NaN included.
            used = torch.arange(start, stop, device=x_CH.device) < self.counts.sum()
            x_CH = torch.where(used[:, None], x_CH, x_CH.new_zeros(()))
        return x_CH


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


@dataclass(frozen=True)
class Accumulator:
    """Where the head's gradient is added: ``(V, H)`` in accumulation precision, and the upstream that it is for."""

    total: Tensor
    upstream: float


@dataclass(frozen=True)
class Tile:
    """How much of the logits is held at once."""

    rows: int
    cols: int


@dataclass(frozen=True)
class Chunking:
    """What a chunk costs beyond its rows; without either the fewest chunks are best, and even ones."""

    tile_rows: int = 1  # a chunk costs as much as the next multiple of these
    further_chunk: int = 10**9  # in rows that could be computed instead


class SequenceLoss(Protocol):
    """A loss bound to its options, as strategies see it: a function of sequences, unit by unit.

    A unit is what stands or falls together: a pair, a group of ranked completions, or one sequence alone.
    """

    def bounds(self, sequences: int) -> Sequence[int]:
        """The first sequence of each unit in turn, then ``sequences``."""

    @property
    def difference(self) -> str | None:
        """Whether units are pairs, and one coefficient serves a pair.

        "sum" or "mean" if the loss depends on log-probs only through chosen minus rejected sums or averages; None if
        the two sides have coefficients of their own.
        """

    @property
    def sigmoid(self) -> tuple[float, float] | None:
        """(beta, label smoothing) if the loss is DPO's, which a backend may do in one kernel."""

    def of_units(self, first: int, last: int) -> "SequenceLoss":
        """The loss of units ``first..last-1`` alone, where it differs by unit."""

    def value_and_grad(self, policy_S: Tensor, ref_S: Tensor, counts_S: Tensor) -> tuple[Tensor, Tensor]:
        """Losses by unit and the derivative of their sum by the policy's sequence log-probs ``(S,)``."""


class RowKernels(Protocol):
    """The seam: what a backend does for the strategies. It knows rows, never preferences.

    An instance is made for one call, with the dtype of the GEMM operands and a cap on its own temporaries. Tiles are
    ``(C, Vt)`` views of rows into scratch that the strategy owns, columns ``start..start+Vt-1`` of the vocabulary.
    Tiles, ``RowState`` and gradients are float32 (float64 for float64 operands).
    """

    name: str
    dtype: torch.dtype
    lends_gradient: bool  # whether logits may lie in the buffer of the head's gradient until that is formed

    def buffer(self, device: torch.device, *shape: int) -> Tensor:
        """Uninitialised memory in the precision of accumulation: scratch, or a gradient in the making."""

    @staticmethod
    def hand_over(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
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

    def finish(self, state: RowState, labels_C: Tensor, vocab: int) -> RowResult:
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

    def reduced_dlogits(self, state: RowState, tile: Tensor, labels_C: Tensor, head: Head) -> LogitsGradient:
        """``reduce`` and ``dlogits_`` of whole rows in one, where no coefficient is waited for.

        The values may be those under another shift than ``state.max``; ``scale`` then turns their rows into those.
        """

    # --- tokens to pairs ---

    def segment_sum(self, values_N: Tensor, weights_N: Tensor | None, counts_S: Tensor) -> Tensor:
        """Weighted sums ``(S,)`` in float64 of consecutive runs of ``counts_S`` values, in a fixed order."""

    def tail(
        self,
        logp_N: Tensor,
        weights_N: Tensor | None,
        counts_S: Tensor,
        ref_S: Tensor,
        poison: Tensor,
        loss: SequenceLoss,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sequence log-probs ``(S,)``, losses ``(P,)`` and the derivative of their sum by the former, ``(S,)``."""

    # --- all rows, one tile at a time ---

    def linear_logprob(self, hidden_RH: Tensor, head: Head, rows: Rows, tile: Tile, stats: Sequence[str]) -> RowResult:
        """Log-probs of all rows: one GEMM unit."""

    def stream_logprob(self, hidden_RH: Tensor, head: Head, rows: Rows, tile: Tile, stats: Sequence[str]) -> RowResult:
        """The same without a tile in memory, where the backend has a kernel for it."""

    def linear_direction(
        self, hidden_RH: Tensor, head: Head, rows: Rows, tile: Tile, stats: Sequence[str]
    ) -> tuple[RowResult, Tensor]:
        """Log-probs, and ``(N + 1, H)`` derivatives of ``-logp`` by the hidden rows (last row 0): two units."""

    def linear_logprob_backward(
        self,
        hidden_RH: Tensor,
        head: Head,
        rows: Rows,
        saved: tuple[Tensor, Tensor, Tensor],
        grad_N: Tensor,
        tile: Tile,
        need: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients (hidden rows ``(N + 1, H)`` with a zero last row, weight, bias) from recomputed tiles.

        ``saved`` is (max, sumexp, others) of the forward pass; ``grad_N`` the upstream of each row's log-prob.
        """
