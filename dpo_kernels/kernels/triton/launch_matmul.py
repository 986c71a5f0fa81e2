"""Launches of the matmul kernels: which launch is taken, how the vocabulary is split, and the merge of its splits."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

import torch
import triton
from torch import Tensor

from dpo_kernels.kernel_interface import RowState
from dpo_kernels.kernels.triton import autotune, matmul_kernels
from dpo_kernels.kernels.triton.configs import COMPILE_OPTIONS, INTERPRETED, MatrixLaunch, family_of, target_of
from dpo_kernels.kernels.triton.launch_rows import on_device, scale_and_softcap
from dpo_kernels.shapes import Head

# The vocabulary is split into programs of at most so many waves. The more waves, the less a partly filled last one
# costs, and the more states are merged.
MOST_WAVES = 16
# Bytes of X that should stay in a GPU's second-level cache, since each block of columns reads X again. An A100 has
# 40 MiB and an H100 50 MiB, which X shares with the head.
X_CACHE_BYTES = 16 * 2**20
INTERPRETED_MULTIPROCESSORS = 4
WIDE_BYTES = 16  # bytes of the widest access of one thread
_pinned: ContextVar[MatrixLaunch | None] = ContextVar("pinned", default=None)


def linear_logps(x_NH: Tensor, weight: Tensor, head: Head, labels_N: Tensor, stats: Sequence[str]) -> RowState:
    """The state of every row after the whole vocabulary, its logits formed in registers.

    ``x_NH`` and ``weight`` are ``aligned_rows``; ``head`` gives bias, scale and softcap.
    """
    count, vocab = x_NH.shape[0], head.vocab

    def run(launch: MatrixLaunch) -> tuple[list[Tensor], Tensor]:
        """The state of each split of the vocabulary, in new memory."""
        blocks = triton.cdiv(count, launch.block_rows)
        block_bytes = launch.block_rows * x_NH.shape[1] * x_NH.element_size()
        cols = triton.cdiv(vocab, launch.block_cols)
        splits = num_vocab_splits(blocks, cols, _multiprocessors(x_NH.device), block_bytes)
        split = triton.cdiv(triton.cdiv(vocab, splits), launch.block_cols) * launch.block_cols
        splits = triton.cdiv(vocab, split)
        sums = [x_NH.new_empty(splits, count, dtype=torch.float32) for _ in range(6 if stats else 3)]
        argmax = torch.empty(splits if stats else 1, count, dtype=torch.int64, device=x_NH.device)
        with on_device(x_NH):
            matmul_kernels.linear_logps[(splits, blocks)](
                *launch.descriptors(x_NH, weight),
                weight if head.bias is None else head.bias.contiguous(),
                labels_N,
                *sums[:3],
                *(sums[3:] or sums),
                argmax,
                count,
                vocab,
                x_NH.shape[1],
                x_NH.stride(0),
                weight.stride(0),
                split,
                *scale_and_softcap(head),
                HAS_BIAS=head.bias is not None,
                HAS_SOFTCAP=head.softcap is not None,
                HAS_STATS=bool(stats),
                **launch.blocks,
                PRECISION=precision_of(weight),
                **launch.options,
                **COMPILE_OPTIONS,
            )
        return sums, argmax

    sums, argmax = run(choose_launch("linear_logps", x_NH, weight, head, bool(stats), run))
    return _merge_splits(sums, argmax, stats)


def linear_dlogits(
    x_CH: Tensor,
    weight: Tensor,
    head: Head,
    start: int,
    out: Tensor,
    labels_C: Tensor,
    max_C: Tensor,
    others_C: Tensor,
    scale_C: Tensor | None,
    residual_C: Tensor | None,
) -> None:
    """Form logits of columns ``start..start+Vt-1`` in registers and write their gradient into ``out``.

    ``x_CH`` and ``weight`` are ``aligned_rows``. The residual must be 0 before, as for ``dlogits_rows``.
    """
    count, cols = out.shape

    def run(launch: MatrixLaunch) -> None:
        """Overwrite ``out``, which the kernel does not read."""
        grid = (triton.cdiv(count, launch.block_rows), triton.cdiv(cols, launch.block_cols))
        with on_device(x_CH):
            matmul_kernels.linear_dlogits[grid](
                *launch.descriptors(x_CH, weight),
                weight if head.bias is None else head.bias.contiguous(),
                labels_C,
                max_C,
                others_C,
                max_C if scale_C is None else scale_C,
                max_C if residual_C is None else residual_C,
                out,
                count,
                cols,
                start,
                x_CH.shape[1],
                x_CH.stride(0),
                weight.stride(0),
                out.stride(0),
                *scale_and_softcap(head),
                HAS_BIAS=head.bias is not None,
                HAS_SOFTCAP=head.softcap is not None,
                HAS_SCALE=scale_C is not None,
                HAS_RESIDUAL=residual_C is not None,
                **launch.blocks,
                PRECISION=precision_of(weight),
                **launch.options,
                **COMPILE_OPTIONS,
            )

    run(choose_launch("linear_dlogits", x_CH, weight, head, False, run))


def precision_of(operand: Tensor) -> str:
    """How float32 operands enter a product: as they are, or in TF32 where torch's own GEMMs do that.

    ``torch.backends.cuda.matmul.fp32_precision`` decides for every backend, so that one call has one precision. 16-bit
    operands are taken as they are.
    """
    tf32 = operand.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def aligned_rows(matrix: Tensor) -> Tensor:
    """The matrix, if its rows begin and end at multiples of 16 bytes; else a copy, padded by columns of zeros."""
    wide = WIDE_BYTES // matrix.element_size()
    rows, width = matrix.shape
    if width % wide == matrix.stride(0) % wide == matrix.data_ptr() % WIDE_BYTES == 0 and matrix.stride(1) == 1:
        return matrix
    copy = matrix.new_zeros(rows, -(-width // wide) * wide)
    copy[:, :width] = matrix
    return copy


# --- which launch ---------------------------------------------------------------------------------------------------


def choose_launch(
    kernel: str, x_CH: Tensor, weight: Tensor, head: Head, stats: bool, run: Callable[[MatrixLaunch], object]
) -> MatrixLaunch:
    """The launch for a call of a matmul kernel; the autotuner may time ``run``."""
    if (launch := _pinned.get()) is not None:
        return launch
    family = launch_family(kernel, x_CH, stats)
    sizes = (f"V<={autotune.bucket(weight.shape[0])}", f"H={x_CH.shape[1]}")
    forms = ["bias" if head.bias is not None else "", "softcap" if head.softcap else "", "stats" if stats else ""]
    forms.append("tf32" if precision_of(weight) == "tf32" else "")
    return autotune.fastest_launch(kernel, family, (str(x_CH.dtype), *sizes, *filter(None, forms)), x_CH, run)


@contextmanager
def pinned(launch: MatrixLaunch) -> Iterator[None]:
    """Take this launch in every call of a matmul kernel, and time none."""
    token = _pinned.set(launch)
    try:
        yield
    finally:
        _pinned.reset(token)


def launch_family(kernel: str, x_CH: Tensor, stats: bool) -> tuple[MatrixLaunch, ...]:
    """Return the launches that are tried for a matmul kernel on the device of ``x_CH``."""
    return family_of(kernel, target_of(x_CH.device), x_CH.dtype, stats) if x_CH.is_cuda else (INTERPRETED,)


# --- splits of the vocabulary ---------------------------------------------------------------------------------------


@functools.lru_cache
def num_vocab_splits(row_blocks: int, col_blocks: int, multiprocessors: int, block_bytes: int) -> int:
    """How many parts ``linear_logps`` splits the vocabulary into: the fewest that leave next to no GPU idle.

    A program does a block of rows, ``block_bytes`` of X, over one part; a multiprocessor runs one program at a time.
    With few parts many blocks of rows are in use at once. There are at least so many parts that they fit the cache.
    """
    most = max(1, min(col_blocks, MOST_WAVES * multiprocessors // row_blocks))
    least = 1
    if row_blocks * block_bytes > X_CACHE_BYTES:
        least = min(most, -(-multiprocessors * block_bytes // X_CACHE_BYTES))

    def busy(parts: int) -> float:
        programs = row_blocks * parts
        longest = -(-programs // multiprocessors) * -(-col_blocks // parts)  # waves, times the columns of a program
        return round(row_blocks * col_blocks / (longest * multiprocessors), 2)

    return max(range(least, most + 1), key=lambda parts: (busy(parts), -parts))


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _merge_splits(sums: list[Tensor], argmax: Tensor, stats: Sequence[str]) -> RowState:
    """One state from those of the splits of the vocabulary, which come in the order of their columns."""
    highest = sums[0].amax(dim=0)
    shift = highest.masked_fill(highest == -torch.inf, 0.0)
    factor = torch.where(sums[0] == highest, torch.ones_like(sums[0]), (sums[0] - shift).exp())
    state = RowState(highest, (sums[1] * factor).sum(dim=0), sums[2].amax(dim=0))
    if not stats:
        return state
    # Moving the shift by d adds d * exp to every -e * log e.
    drop = torch.where(sums[1] > 0, (highest - sums[0]) * sums[1], torch.zeros_like(sums[1]))
    winner = (sums[0] == highest).to(torch.int8).argmax(dim=0)  # the first split that has the maximum
    return replace(
        state,
        entropy=((sums[3] + drop) * factor).sum(dim=0) if "entropy" in stats else None,
        logit_sum=sums[4].sum(dim=0) if "mean_logits" in stats else None,
        argmax=argmax.gather(0, winner[None])[0] if "top1" in stats else None,
        square_sum=(sums[5] * factor.square()).sum(dim=0) if "log_sum_p2" in stats else None,
    )
