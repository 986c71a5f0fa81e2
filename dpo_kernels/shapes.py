"""The legend of the shapes, and the values that every layer knows.

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

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

STATS = ("entropy", "mean_logits", "top1", "log_sum_p2")  # means over tokens, from the row kernels


TOKEN_LOGPS = "token_logps"  # by token; may be asked for among them


# Tensors that torch wraps because a collective has yet to fill them: every operation of torch's on one waits for it.
WRAPPERS_THAT_UNWRAP = ("AsyncCollectiveTensor",)


def number_like(value: float | Tensor, like: Tensor) -> Tensor:
    """A number of the caller's, in the dtype and on the device of a 0-d tensor."""
    if isinstance(value, Tensor):
        return value.detach().to(device=like.device, dtype=like.dtype, copy=True)
    return torch.full_like(like, value)


GPU_ROW_ALIGNMENT = 16  # elements; what a Triton launch specialises on, and wide accesses in every dtype


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of logits tiles, reductions and gradients in flight."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_dtype(device: torch.device) -> torch.dtype:
    """Dtype of what there is one of by sequence or pair: float64 (they are few), but for MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def padded(cols: int, alignment: int) -> int:
    """Elements from one row of a tile of ``cols`` columns to the next; rows too short to profit are not padded."""
    return cols if cols < 4 * alignment else -(-cols // alignment) * alignment


def spans(total: int, step: int) -> Iterator[tuple[int, int]]:
    """Cut ``0..total`` into pieces of at most ``step``."""
    for start in range(0, total, step):
        yield start, min(start + step, total)


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
class PackedTokens:
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
    nan_if_invalid: Tensor  # () float64: 0, or NaN when the input cannot be scored honestly

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


@dataclass(frozen=True)
class Tile:
    """How much of the logits is held at once."""

    rows: int
    cols: int


class NeedsGrad(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def head(self) -> bool:
        """Whether the head is trainable: its weight or its bias wants a gradient."""
        return self.weight or self.bias


@dataclass(frozen=True)
class Chunk:
    """Packed tokens ``start..stop-1``, whose logits go through the scratch together.

    Where the loss is computed with them, they are those of the whole examples ``first..last-1`` and of ``sequences``
    (first, end). An example longer than the tile is a chunk of its own, ``oversized``, and is cut further.
    """

    first: int
    last: int
    sequences: tuple[int, int]
    start: int
    stop: int
    oversized: bool = False

    @staticmethod
    def of_tokens(start: int, stop: int) -> "Chunk":
        """A chunk of tokens whose examples do not matter."""
        return Chunk(0, 0, (0, 0), start, stop)


@dataclass(frozen=True)
class Schedule:
    """In which pieces the logits are computed: the part of a plan that a strategy executes."""

    tile: Tile  # of logits that the scratch holds
    chunks: tuple[Chunk, ...]
    block_rows: int = 1  # rows of a GEMM's own tile; an oversized example is cut at multiples of them
    logits_in_weight_grad: bool = False  # the logits lie in the memory of the head's gradient
    recompute_in_library: bool = False  # recomputed logits come from torch's GEMM, not from the backend's own kernel
