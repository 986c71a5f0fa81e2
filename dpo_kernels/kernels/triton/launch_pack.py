"""Launches of the packing kernels: the counts first, then what is packed once the capacity is known."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_kernels.kernels.triton import pack_kernels
from dpo_kernels.kernels.triton.configs import COMPILE_OPTIONS, PACK_BLOCK, PACK_WARPS
from dpo_kernels.kernels.triton.launch_rows import on_device
from dpo_kernels.shapes import accumulation_dtype, sum_dtype


@dataclass(frozen=True)
class Labels:
    """The labels of a batch with at least one row and one sequence, and how they are read."""

    labels: Tensor  # (R,) int32 or int64
    cu_seqlens: Tensor | None  # (S + 1,) int32 or int64, or None where every sequence has ``width`` rows
    sequences: int  # S
    width: int
    vocab: int  # V
    ignore_index: int
    shift: bool  # row t predicts labels[t + 1]
    stacked: bool  # all chosen sequences come first in the input

    @property
    def rows(self) -> int:
        """The number of rows, R."""
        return self.labels.shape[0]

    @property
    def constants(self) -> dict[str, int | bool]:
        """The constants of both kernels, and their launch options."""
        return {
            "SHIFT": int(self.shift),
            "STACKED": self.stacked,
            "HAS_BOUNDS": self.cu_seqlens is not None,
            "BLOCK": PACK_BLOCK,
            "num_warps": PACK_WARPS,
            **COMPILE_OPTIONS,
        }


@dataclass(frozen=True)
class Counted:
    """What the host may read between the launches."""

    counts: Tensor  # (S,) int64 scored tokens of each packed sequence
    counts_and_bounds: Tensor  # the counts, and behind them (S + 1,) int64 cu_seqlens where there are any
    bad: Tensor  # (S,) int64 scored labels outside of the vocabulary


def count(given: Labels) -> Counted:
    """Count the scored tokens of each packed sequence, and the labels outside of the vocabulary."""
    labels, sequences = given.labels, given.sequences
    bounds = 0 if given.cu_seqlens is None else sequences + 1
    both, bad = (torch.empty(size, dtype=torch.int64, device=labels.device) for size in (sequences + bounds, sequences))
    counts_S, copy = both[:sequences], both[sequences:] if bounds else both
    with on_device(labels):
        pack_kernels.count_scored[(sequences,)](
            labels,
            labels if given.cu_seqlens is None else given.cu_seqlens,
            counts_S,
            copy,
            bad,
            sequences,
            given.rows,
            given.width,
            given.vocab,
            given.ignore_index,
            **given.constants,
        )
    return Counted(counts_S, both, bad)


def write(
    given: Labels, counted: Counted, token_weights: Tensor | None, capacity: int | None, *, static: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Pack the scored tokens.

    Args:
        given: the labels and how they are read.
        counted: what ``count`` has returned for them.
        token_weights: ``(R,)`` weights at their labels' places, or None for 1.
        capacity: N, the packed tokens to allocate. None means the scored ones, whose number is not known here: as many
            as there are rows are allocated, and those behind the scored ones are not written.
        static: whether unused capacity is told apart by a weight of 0, even without ``token_weights``.

    Returns:
        The row ``(N,)`` of each packed token, its label, weight and sequence, the place ``(R,)`` of each row among
        them, and 0-d 0 or NaN. Weights are None where all are 1. The fields are those of ``shapes.PackedTokens``.

    """
    labels, device = given.labels, given.labels.device
    fits = capacity is None
    if capacity is None:
        capacity = given.rows
    index, packed_labels, segments = (torch.empty(capacity, dtype=torch.int64, device=device) for _ in range(3))
    weights = None
    if token_weights is not None or static:
        dtype = torch.float32 if token_weights is None else accumulation_dtype(token_weights.dtype)
        weights = torch.empty(capacity, dtype=dtype, device=device)
    slot = torch.empty(given.rows, dtype=torch.int64, device=device)
    if static and given.cu_seqlens is not None:
        slot.fill_(capacity)  # nobody has looked at the bounds: they may leave rows out
    nan_if_invalid = torch.empty((), dtype=sum_dtype(device), device=device)
    with on_device(labels):
        pack_kernels.write_packed[(given.sequences,)](
            labels,
            labels if given.cu_seqlens is None else given.cu_seqlens,
            labels if token_weights is None else token_weights,
            counted.counts,
            counted.bad,
            index,
            packed_labels,
            index if weights is None else weights,
            segments,
            slot,
            nan_if_invalid,
            given.sequences,
            given.rows,
            given.width,
            given.vocab,
            given.ignore_index,
            capacity,
            FITS=fits,
            HAS_TOKEN_WEIGHTS=token_weights is not None,
            HAS_WEIGHTS=weights is not None,
            **given.constants,
        )
    return index, packed_labels, weights, segments, slot, nan_if_invalid
