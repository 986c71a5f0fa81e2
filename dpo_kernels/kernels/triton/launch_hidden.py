"""Launches of the kernels over gradients of hidden states and of the head."""

import torch
import triton
from torch import Tensor

from dpo_kernels.kernels.triton import hidden_kernels
from dpo_kernels.kernels.triton.configs import COMPILE_OPTIONS, HIDDEN_BLOCK, HIDDEN_WARPS, ROW_BLOCK, ROW_WARPS
from dpo_kernels.kernels.triton.launch_rows import on_device


def add_label_rows(
    out_CH: Tensor, weight_VH: Tensor, labels_C: Tensor, residual_C: Tensor, flag: Tensor | None = None
) -> None:
    """Add ``residual`` times the head's row of its label to each row of ``out``, unless the flag, 0-d int32, is 0."""
    count, width = out_CH.shape
    with on_device(out_CH):
        hidden_kernels.add_label_rows[(count, triton.cdiv(width, HIDDEN_BLOCK))](
            labels_C if flag is None else flag,
            out_CH,
            weight_VH,
            labels_C,
            residual_C,
            width,
            weight_VH.shape[0],
            out_CH.stride(0),
            *weight_VH.stride(),
            CONDITIONAL=flag is not None,
            BLOCK=HIDDEN_BLOCK,
            num_warps=HIDDEN_WARPS,
            **COMPILE_OPTIONS,
        )


def to_input_rows(dx: Tensor, slot: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return packed rows ``(N + 1, H)`` at their places ``(R,)`` in the input, times a 0-d factor, in ``dtype``."""
    rows, width = slot.shape[0], dx.shape[1]
    out = torch.empty(rows, width, dtype=dtype, device=dx.device)
    if rows:
        with on_device(dx):
            hidden_kernels.to_input_rows[(rows, triton.cdiv(width, HIDDEN_BLOCK))](
                dx,
                slot,
                factor,
                out,
                width,
                dx.stride(0),
                BLOCK=HIDDEN_BLOCK,
                num_warps=HIDDEN_WARPS,
                **COMPILE_OPTIONS,
            )
    return out


def scale_and_round(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous matrix times a 0-d factor, rounded once to ``dtype``."""
    out, elements = torch.empty_like(grad, dtype=dtype), grad.numel()
    if elements:
        with on_device(grad):
            hidden_kernels.scale_and_round[(triton.cdiv(elements, ROW_BLOCK),)](
                grad, factor, out, elements, BLOCK=ROW_BLOCK, num_warps=ROW_WARPS, **COMPILE_OPTIONS
            )
    return out
