"""Launches of the row kernels and of the sequence loss: grids, strides, and which accesses reach into padding."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from dpo_kernels.kernel_interface import RowScale, RowState
from dpo_kernels.kernels import float16_range
from dpo_kernels.kernels.triton import row_kernels, sequence_loss
from dpo_kernels.kernels.triton.configs import COMPILE_OPTIONS, ROW_BLOCK, ROW_WARPS, SAFE_SHIFT, SUM_BLOCK, SUM_WARPS
from dpo_kernels.shapes import GPU_ROW_ALIGNMENT, Head


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """A guard for a launch: Triton launches on the current device, whichever device its arguments are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def scale_and_softcap(head: Head) -> tuple[float, float]:
    """The numbers that turn raw products into logits; the kernels ignore the softcap of a head without one."""
    return float(head.logit_scale), 1.0 if head.softcap is None else float(head.softcap)


def apply_bias_scale_cap(tile: Tensor, head: Head, start: int) -> None:
    """Turn the raw products in ``tile`` into final logits of columns ``start..start+Vt-1``."""
    count, cols = tile.shape
    (whole,), reaches = with_padding(tile)
    bias = tile  # a placeholder, which the kernel does not read
    if head.bias is not None:
        bias = pad(head.bias[start : start + cols], (0, whole.shape[1] - cols)).contiguous()
    with on_device(tile):
        row_kernels.apply_bias_scale_cap[(count, triton.cdiv(cols, ROW_BLOCK))](
            whole,
            bias,
            cols,
            tile.stride(0),
            *scale_and_softcap(head),
            HAS_BIAS=head.bias is not None,
            HAS_SOFTCAP=head.softcap is not None,
            PADDED=reaches,
            BLOCK=ROW_BLOCK,
            num_warps=ROW_WARPS,
            **COMPILE_OPTIONS,
        )


def reduce_rows(state: RowState, tile: Tensor, labels_C: Tensor, start: int, logp_C: Tensor | None = None) -> None:
    """Fold columns ``start..start+Vt-1`` into the state of their rows.

    With ``logp_C`` the tile has every column. What the state holds is then not read, and ``logp_C`` is filled with the
    labels' log-probs.
    """
    count, cols = tile.shape
    (whole,), reaches = with_padding(tile)
    no_float, no_index = state.max, labels_C  # placeholders, which the kernel does not touch
    with on_device(tile):
        row_kernels.reduce_rows[(count,)](
            whole,
            labels_C,
            state.max,
            state.others,
            state.target,
            no_float if state.entropy is None else state.entropy,
            no_float if state.logit_sum is None else state.logit_sum,
            no_index if state.argmax is None else state.argmax,
            no_float if state.square_sum is None else state.square_sum,
            no_float if logp_C is None else logp_C,
            cols,
            tile.stride(0),
            start,
            FRESH=logp_C is not None,
            HAS_ENTROPY=state.entropy is not None,
            HAS_LOGIT_SUM=state.logit_sum is not None,
            HAS_ARGMAX=state.argmax is not None,
            HAS_SQUARE_SUM=state.square_sum is not None,
            PADDED=reaches,
            BLOCK=ROW_BLOCK,
            num_warps=ROW_WARPS,
            **COMPILE_OPTIONS,
        )


def dlogits_rows(
    tile: Tensor,
    out: Tensor,
    labels_C: Tensor,
    start: int,
    max_C: Tensor,
    others_C: Tensor,
    scale_C: Tensor | None,
    residual_C: Tensor | None,
    softcap: float | None,
    flag: Tensor | None = None,
) -> None:
    """Write the gradient of the tile's logits into ``out``, which may be the tile, and its rounding into the residual.

    The residual is 0 in rows whose label is not among these columns.
    Where the flag, 0-d int32, is 0 nothing is written.
    """
    count, cols = tile.shape
    (read, written), reaches = with_padding(tile, out)
    with on_device(tile):
        row_kernels.dlogits_rows[(count, triton.cdiv(cols, ROW_BLOCK))](
            labels_C if flag is None else flag,
            read,
            written,
            labels_C,
            max_C,
            others_C,
            max_C if scale_C is None else scale_C,
            max_C if residual_C is None else residual_C,
            cols,
            tile.stride(0),
            out.stride(0),
            start,
            1.0 if softcap is None else softcap,
            HAS_SCALE=scale_C is not None,
            HAS_RESIDUAL=residual_C is not None,
            HAS_SOFTCAP=softcap is not None,
            CONDITIONAL=flag is not None,
            PADDED=reaches,
            BLOCK=ROW_BLOCK,
            num_warps=ROW_WARPS,
            **COMPILE_OPTIONS,
        )


def float16_scales(scale_C: Tensor | None, others_C: Tensor, expected: float) -> tuple[Tensor, Tensor]:
    """Do ``float16_range.row_scales`` in one kernel."""
    applied_C, left_C, rows = torch.empty_like(others_C), torch.empty_like(others_C), others_C.shape[0]
    with on_device(others_C):
        row_kernels.float16_scales[(triton.cdiv(rows, SUM_BLOCK),)](
            others_C if scale_C is None else scale_C,
            others_C,
            applied_C,
            left_C,
            rows,
            float16_range.expected_exponent(expected),
            HAS_SCALE=scale_C is not None,
            TOP=float16_range.TOP,
            SLACK=float16_range.SLACK,
            LEAST=2.0**-float16_range.MOST,
            MOST=2.0**float16_range.MOST,
            BLOCK=SUM_BLOCK,
            num_warps=SUM_WARPS,
            **COMPILE_OPTIONS,
        )
    return applied_C, left_C


def softmax_grad_rows(state: RowState, tile: Tensor, out: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
    """Fill the state of whole rows and write their gradient into ``out``; returns the rows' factor and residual."""
    factor_C, residual_C = torch.empty_like(state.max), torch.empty_like(state.max)
    count, cols = tile.shape
    (read, written), reaches = with_padding(tile, out)
    with on_device(tile):
        row_kernels.softmax_grad_rows[(count,)](
            read,
            written,
            labels_C,
            state.max,
            state.others,
            state.target,
            factor_C,
            residual_C,
            cols,
            tile.stride(0),
            out.stride(0),
            SAFE=SAFE_SHIFT,
            PADDED=reaches,
            BLOCK=ROW_BLOCK,
            num_warps=ROW_WARPS,
            **COMPILE_OPTIONS,
        )
    return factor_C, residual_C


def sigmoid_sequence_loss(
    logp_N: Tensor,
    weights_N: Tensor | None,
    counts_S: Tensor,
    ref_S: Tensor,
    nan_if_invalid: Tensor,
    numbers: tuple[float, float],
    scale: RowScale | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """DPO's loss from token log-probs, with beta and label smoothing as ``numbers``.

    Returns sequence log-probs ``(S,)``, losses ``(P,)``, and the derivative ``(S,)`` of the losses' sum. With
    ``scale`` the last is the factor ``(N,)`` of each token's row instead.
    """
    sums_S, losses_P = torch.empty_like(ref_S), torch.empty_like(ref_S[0::2])
    last = torch.empty_like(ref_S if scale is None else logp_N)
    state = None if scale is None else scale.state
    unused = (logp_N, logp_N, logp_N)  # placeholders, which the kernel does not touch
    with on_device(logp_N):
        sequence_loss.sigmoid_sequence_loss[(losses_P.shape[0],)](
            logp_N,
            logp_N if weights_N is None else weights_N,
            counts_S,
            ref_S,
            nan_if_invalid,
            sums_S,
            losses_P,
            last,
            *(unused if state is None else (state.max, state.others, state.target)),
            nan_if_invalid if scale is None else scale.divisor,
            last,
            logp_N.shape[0],
            ref_S.shape[0],
            *numbers,
            1.0 if scale is None else scale.grad_scale,
            1.0 if scale is None else scale.logit_scale,
            HAS_WEIGHTS=weights_N is not None,
            HAS_SCALE=scale is not None,
            BLOCK=SUM_BLOCK,
            num_warps=SUM_WARPS,
            **COMPILE_OPTIONS,
        )
    return sums_S, losses_P, last


def with_padding(*tiles: Tensor) -> tuple[list[Tensor], bool]:
    """Tiles of one shape with the padding of their rows, if all have it, and whether accesses may reach that far."""
    cols = tiles[0].shape[1]
    reach = triton.cdiv(cols, GPU_ROW_ALIGNMENT) * GPU_ROW_ALIGNMENT
    if reach == cols or not all(_has_padding(tile, reach) for tile in tiles):
        return list(tiles), reach == cols
    return [tile.as_strided((tile.shape[0], reach), tile.stride()) for tile in tiles], True


def _has_padding(tile: Tensor, reach: int) -> bool:
    """Whether every row of the tile owns memory up to column ``reach``."""
    end = tile.storage_offset() + (tile.shape[0] - 1) * tile.stride(0) + reach
    return tile.stride(0) >= reach and end * tile.element_size() <= tile.untyped_storage().nbytes()
