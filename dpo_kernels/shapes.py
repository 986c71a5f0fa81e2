"""The legend of shapes, and the values that every layer knows.

Names end in the shape of their tensor, so ``x_CH`` is a ``(C, H)`` tensor. The letters mean:

====  =================================================================
R     rows of the flattened input: ``2B * T`` padded, ``N`` packed
N     scored rows, packed pair by pair (chosen first), or their capacity
S     sequences
P     pairs, ``S = 2P``; sequence ``2p`` is chosen, ``2p + 1`` rejected
G     groups of ranked sequences
C     rows of one chunk
H     hidden size
V     vocabulary size (rows of the LM head)
Vt    columns of one tile of logits, part of the vocabulary
k     statistics that were requested
====  =================================================================
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_kernels.records import dataclass

# The row kernels compute these statistics, and a call returns their means over the scored tokens of each sequence.
STATS = ("entropy", "mean_logits", "top1", "log_sum_p2")

# This name may be requested among them. Its values are per token and not per sequence.
TOKEN_LOGPS = "token_logps"

# Neither do they compute this one, which takes the logits of the reference too. It is a sum over the scored tokens.
KL = "kl"

# torch wraps a tensor in this class while a collective has yet to fill it. Every torch operation on it waits for that.
WRAPPERS_THAT_UNWRAP = ("AsyncCollectiveTensor",)


# Rows of tiles on a GPU begin at multiples of this many elements. Triton compiles faster code for addresses and strides
# divisible by 16, and such rows allow wide memory accesses in every dtype.
GPU_ROW_ALIGNMENT = 16


@dataclass(frozen=True)
class Sampling:
    """How a sparse gradient is sampled, see ``kernels/sampling.py``."""

    tau: float  # probabilities above it are kept as they are
    seed: int | Tensor  # an int, or a 0-d int64 tensor
    sparse_weight_grad: bool = False  # the gradient of the head's weight is a sparse tensor of the rows it reaches


# Powers of two that bring numbers near 1 have at most this exponent, so that they are float32 numbers.
MOST_EXPONENT = 100


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits tiles, of reductions and of gradients that are still added up."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of values per sequence or pair: float64, or float32 on MPS, which lacks float64.

    Such values are few, so float64 costs little.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def padded(cols: int, alignment: int) -> int:
    """Return the distance in elements between the rows of a tile of ``cols`` columns.

    It is the next multiple of ``alignment``. Rows shorter than four of these stay as they are, since they would gain
    little.
    """
    return cols if cols < 4 * alignment else -(-cols // alignment) * alignment


def spans(total: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield the ``(start, stop)`` of pieces of ``0..total``, each at most ``step`` long."""
    for start in range(0, total, step):
        yield start, min(start + step, total)


@dataclass(frozen=True)
class Head:
    """An LM head. Its logits are ``cap(logit_scale * (x W^T + b))`` with ``cap(z) = softcap * tanh(z / softcap)``."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab(self) -> int:
        """V, the size of the vocabulary."""
        return self.weight.shape[0]


@dataclass(frozen=True)
class SharedRows:
    """Which row of the hidden states each packed token reads, where several may read one.

    The gradients of a row are added up in the order of its tokens, so the result does not depend on threads.
    """

    index: Tensor  # (N,) int64, row of each packed token, 0 on unused capacity
    order: Tensor  # (N,) int64, packed tokens by their rows
    offsets: Tensor  # (M + 1,) int64, place in that order at which each row begins, then where the last one ends


@dataclass(frozen=True)
class PackedTokens:
    """The scored rows of a batch, packed sequence by sequence in the internal order of sequences.

    ``counts_host`` lies on the CPU, so that strategies can plan without a sync. With a static capacity
    (``max_scored_tokens``) the host knows no counts, and ``counts_host`` is filled with -1.
    """

    index: Tensor  # (N,) int64, place of the flattened labels, and row of the hidden states unless these are shared
    labels: Tensor  # (N,) int64, in [0, V)
    weights: Tensor | None  # (N,) float32 or float64, weight in the sequence's sum, 0 on unused capacity
    segments: Tensor  # (N,) int64, sequence of each row
    slot: Tensor  # (R,) int64, place of each label among the packed ones, N where not scored
    counts: Tensor  # (S,) int64 on the device of the inputs
    counts_host: Tensor  # (S,) int64 on the CPU
    nan_if_invalid: Tensor  # () float64: 0, or NaN if the input is invalid
    shared: SharedRows | None = None  # where the caller says which row predicts a label

    @property
    def capacity(self) -> int:
        """N, the number of rows that are allocated."""
        return self.index.shape[0]

    @cached_property
    def host_counts(self) -> list[int] | None:
        """Scored tokens of each sequence, or None if the host does not know them."""
        counts: list[int] = self.counts_host.tolist()
        return None if counts and counts[0] < 0 else counts

    @cached_property
    def used(self) -> int:
        """Number of rows to compute: the scored ones, or the whole capacity if the host knows no counts."""
        return self.capacity if self.host_counts is None else sum(self.host_counts)

    def gather(self, hidden_RH: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows ``start..stop-1`` of the hidden states, a contiguous ``(C, H)`` tensor of ``dtype``."""
        if not hidden_RH.shape[0]:  # only unused capacity is left
            return hidden_RH.new_zeros(stop - start, hidden_RH.shape[1], dtype=dtype)
        index = self.index if self.shared is None else self.shared.index
        x_CH = hidden_RH.index_select(0, index[start:stop]).to(dtype)
        if self.host_counts is None:
            # Unused capacity points at row 0. That row may be padding and hold anything, NaN included.
            used = torch.arange(start, stop, device=x_CH.device) < self.counts.sum()
            x_CH = torch.where(used[:, None], x_CH, x_CH.new_zeros(()))
        return x_CH


@dataclass(frozen=True)
class Tile:
    """The part of the logits that is held at once, as a number of rows and of vocabulary columns."""

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
    scratch_logits: int  # that the scratch has memory for, padding included: those of the tile or more, or 0 if unkept
    block_rows: int = 1  # rows of a GEMM's own tile; an oversized example is cut at multiples of them
    logits_in_weight_grad: bool = False  # the logits lie in the memory of the head's gradient
    recompute_in_library: bool = False  # recomputed logits come from torch's GEMM, not from the backend's own kernel

    @property
    def oversized_rows(self) -> int:
        """The most rows of a tile of an oversized example: whole blocks of the GEMM, if one fits."""
        return self.tile.rows // self.block_rows * self.block_rows or self.tile.rows


def row_indexed(rows_K: Tensor, values_KH: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a coalesced sparse COO tensor ``(V, H)`` of whole rows. Their indices ascend, and none occurs twice."""
    parts, where = (rows_K[None], values_KH, tuple(shape)), values_KH.device
    return torch.sparse_coo_tensor(*parts, device=where, is_coalesced=True, check_invariants=False)


def number_like(value: float | Tensor, like: Tensor) -> Tensor:
    """A number of the caller's, in the dtype and on the device of a 0-d tensor."""
    if isinstance(value, Tensor):
        return value.detach().to(device=like.device, dtype=like.dtype, copy=True)
    return torch.full_like(like, value)
