"""Launches of the kernels of sparse gradients: the sample of a tile, and its products."""

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from dpo_kernels.kernel_interface import LogitsGradient, SampledRows, SparseGradient
from dpo_kernels.kernels.sampling import BLOCK, UNITS, most_entries
from dpo_kernels.kernels.triton import launch_matmul, sparse_kernels
from dpo_kernels.kernels.triton.configs import (
    COMPILE_OPTIONS,
    ENTRIES,
    HIDDEN_BLOCK,
    HIDDEN_WARPS,
    PACK_BLOCK,
    PACK_WARPS,
    SAMPLE_GROUPS,
    SAMPLE_OPTIONS,
    SAMPLE_WARPS,
)
from dpo_kernels.kernels.triton.launch_rows import on_device, with_padding
from dpo_kernels.shapes import Sampling

# Bytes of an entry: row, column and value, then the sorted column and its place. While torch sorts on a GPU
# (segmented_sort_large_segments in ATen/native/cuda/SortStable.cu) there are the places before it, and column and place
# once more: cub::DeviceRadixSort::SortPairs leaves its input as it is, and so needs other memory for every second pass.
ENTRY_BYTES = 3 * 4 + (4 + 8) + 8 + (4 + 8)
COLUMN_BYTES = 4 + 8  # of a column: its number, and where its entries begin


@dataclass(frozen=True)
class DeviceSample(SparseGradient):
    """A sample in memory for the most entries there may be, and what takes its place where more are expected.

    The host does not know how many entries there are. Unused ones have the column ``cols``, which no tile has.
    """

    rows: Tensor  # (K,) int32, row of each entry
    too_many: Tensor  # () int32, 1 where there are no entries and ``exact`` is the gradient
    start: int  # the vocabulary's column that comes first in the tile
    cols: int  # of the tile
    exact: LogitsGradient | None = None  # undefined unless there are too many entries; the residual is then 0

    @cached_property
    def by_column(self) -> tuple[Tensor, Tensor]:
        """Return where the entries of each column begin, ``(Vt + 1,)``, and their order ``(K,)``, both int64."""
        columns, order = self.columns.sort(stable=True)
        every = torch.arange(self.cols + 1, dtype=columns.dtype, device=columns.device)
        return torch.searchsorted(columns, every), order


def sample_rows(
    tile: Tensor, start: int, of_rows: SampledRows, softcap: float | None, sampling: Sampling, share: float
) -> DeviceSample:
    """Return the sample of a tile ``(C, Vt)`` of final logits. ``share`` is that of ``sampling.most_entries``."""
    count, cols = tile.shape
    limit, capacity = most_entries(count, cols, share, sampling.tau)
    seed = sampling.seed
    if not isinstance(seed, Tensor):
        seed = torch.full((), seed, dtype=torch.int64, device=tile.device)
    counts, expected = tile.new_empty(count, dtype=torch.int32), tile.new_empty(count, dtype=torch.int64)
    offsets, too_many = tile.new_empty(count + 1, dtype=torch.int64), tile.new_empty((), dtype=torch.int32)
    rows, values = tile.new_empty(capacity, dtype=torch.int32), tile.new_empty(capacity)
    columns = tile.new_full((capacity,), cols, dtype=torch.int32)
    (whole,), reaches = with_padding(tile)
    blocks = {"UNITS": UNITS, "PADDED": reaches, "GROUPS": SAMPLE_GROUPS, "SAMPLED": BLOCK, "num_warps": SAMPLE_WARPS}
    of_tile = (cols, tile.stride(0), start, sampling.tau)
    with on_device(tile):
        sparse_kernels.count_sample[(count,)](
            whole, of_rows.labels, of_rows.tokens, of_rows.max, of_rows.sumexp, seed, counts, expected, *of_tile,
            **blocks, **SAMPLE_OPTIONS,
        )  # fmt: skip
        sparse_kernels.place_rows[(1,)](
            counts, expected, offsets, too_many, count, limit, capacity,
            BLOCK=PACK_BLOCK, num_warps=PACK_WARPS, **COMPILE_OPTIONS,
        )  # fmt: skip
        sparse_kernels.write_sample[(count,)](
            whole, of_rows.labels, of_rows.tokens, of_rows.max, of_rows.others, of_rows.sumexp, seed, offsets, too_many,
            rows, columns, values, *of_tile, 1.0 if softcap is None else softcap, HAS_SOFTCAP=softcap is not None,
            **blocks, **SAMPLE_OPTIONS,
        )  # fmt: skip
    return DeviceSample(offsets, columns, values, of_rows.scale, rows, too_many, start, cols)


def add_kept_rows(
    d: DeviceSample, matrix: Tensor, first: int, out: Tensor, *, by_column: bool, accumulate: bool
) -> None:
    """Compute ``out (+)=`` the sums of rows of a matrix times the entries of a sample, unless those were too many.

    Args:
        d: the sample of a tile ``(C, Vt)``.
        matrix: rows of the head, or with ``by_column`` the hidden states ``(C, H)``.
        first: row of the matrix that belongs to the first column of the tile, or with ``by_column`` to its first row.
        out: ``(C, H)`` float32, or with ``by_column`` ``(Vt, H)``.
        by_column: whether the entries of a column are added up, and not those of a row.
        accumulate: whether sums are added to what ``out`` holds.

    """
    begins, order = d.by_column if by_column else (d.offsets, d.offsets)
    count, width = out.shape
    with on_device(out):
        sparse_kernels.add_kept_rows[(count, triton.cdiv(width, HIDDEN_BLOCK))](
            begins,
            order,
            d.rows,
            d.columns,
            d.values,
            d.scale,
            d.too_many,
            matrix,
            out,
            first,
            width,
            *matrix.stride(),
            out.stride(0),
            BY_COLUMN=by_column,
            ADD=accumulate,
            ENTRIES=ENTRIES,
            BLOCK=HIDDEN_BLOCK,
            num_warps=HIDDEN_WARPS,
            **COMPILE_OPTIONS,
        )


def product_if(
    flag: Tensor,
    values: Tensor,
    b: Tensor,
    scale_C: Tensor | None,
    out: Tensor,
    *,
    transposed: bool,
    accumulate: bool,
    alpha: float = 1.0,
) -> None:
    """Multiply a tile of the gradient where a flag on the device, 0-d int32, is not 0.

    Args:
        flag: says whether anything is written.
        values: ``(C, Vt)`` tile of the gradient.
        b: ``(Vt, H)``, or with ``transposed`` ``(C, H)``. It has the dtype of the values, and contiguous rows.
        scale_C: ``(C,)`` factor of each row of the result, or None for 1. It does not go with ``transposed``.
        out: ``(C, H)`` float32 ``scale * (values @ b)``, or with ``transposed`` ``(Vt, H)`` ``alpha * (values^T @ b)``.
        transposed: which of the two it is.
        accumulate: whether the product is added to what ``out`` holds.
        alpha: factor of the second one.

    """
    assert scale_C is None or not transposed, "rows of the result are columns of the tile"
    launch = launch_matmul.launch_family("product_if", b, False)[0]
    grid = (triton.cdiv(out.shape[1], launch.block_cols), triton.cdiv(out.shape[0], launch.block_rows))
    with on_device(out):
        sparse_kernels.product_if[grid](
            flag,
            values,
            b,
            out if scale_C is None else scale_C,
            out,
            *values.shape,
            out.shape[1],
            values.stride(0),
            b.stride(0),
            out.stride(0),
            alpha,
            TRANSPOSED=transposed,
            HAS_SCALE=scale_C is not None,
            ADD=accumulate,
            BLOCK_M=launch.block_rows,
            BLOCK_N=launch.block_cols,
            BLOCK_K=launch.block_width,
            PRECISION=launch_matmul.precision_of(b),
            **launch.options,
            **COMPILE_OPTIONS,
        )
