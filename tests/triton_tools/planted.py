"""Configurations that the gate must refuse, each for one reason, and good ones that it must pass; see test_gate.py."""

import os
from typing import Any

import torch
import triton
import triton.language as tl

from dpo_kernels.kernels.triton import row_kernels
from tests.triton_tools.configurations import Configuration


@triton.jit
def matmul(
    x_ptr,  # (N, H)
    w_ptr,  # (V, H)
    out_ptr,  # (N, V)
    width,
    out_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """``X W^T``, whole blocks only; grid (N / BLOCK_N, V / BLOCK_V)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    at = tl.arange(0, BLOCK_H)
    z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for h in range(0, width, BLOCK_H):
        inside = h + at < width
        x = tl.load(x_ptr + rows[:, None] * width + (h + at)[None, :], mask=inside[None, :], other=0.0)
        w = tl.load(w_ptr + cols[None, :] * width + (h + at)[:, None], mask=inside[:, None], other=0.0)
        z = tl.dot(x, w, z, input_precision="ieee")
    tl.store(out_ptr + rows[:, None] * out_stride + cols[None, :], z)


@triton.jit
def softmax_rows(x_ptr, out_ptr, cols, BLOCK: tl.constexpr):
    """A program holds a whole row in registers; grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * cols + at, mask=at < cols, other=-float("inf"))
    e = tl.exp(x - tl.max(x, axis=0))
    tl.store(out_ptr + row * cols + at, e / tl.sum(e, axis=0), mask=at < cols)


@triton.jit
def normalise_rows(x_ptr, out_ptr, cols, BLOCK: tl.constexpr):
    """A square root of fewer bits than IEEE 754 asks for; grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * cols + at, mask=at < cols, other=0.0)
    tl.store(out_ptr + row * cols + at, x * tl.math.rsqrt(tl.sum(x * x, axis=0)), mask=at < cols)


@triton.jit
def count_up(out_ptr, total):
    """The loop turns an integer into a float, which the interpreter accepts and the compiler does not."""
    value = 0
    for _ in range(total):
        value = value + 0.5
    tl.store(out_ptr, value)


@tl.core.builtin
def _abort(_semantic=None):
    os.write(2, b"LLVM ERROR: Cannot select: the compiler aborts\n")
    os._exit(1)


@triton.jit
def abort(out_ptr):
    """Takes the compiler's process down, as LLVM does at code that it cannot select."""
    _abort()
    tl.store(out_ptr, 0.0)


def _matmul(
    name: str,
    targets: tuple[str, ...],
    blocks: tuple[int, int, int] = (128, 128, 64),
    warps: int = 8,
    stages: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    width: int = 4096,
) -> Configuration:
    pointers = {"x_ptr": dtype, "w_ptr": dtype, "out_ptr": torch.float32}
    sizes = dict(zip(("BLOCK_N", "BLOCK_V", "BLOCK_H"), blocks, strict=True))
    arguments = {**pointers, "width": width, "out_stride": 8192, **sizes}
    return Configuration(name, matmul, arguments, {"num_warps": warps, "num_stages": stages}, True, targets)


def _softmax(name: str, block: int, targets: tuple[str, ...], kernel: Any = softmax_rows) -> Configuration:
    arguments = {"x_ptr": torch.float32, "out_ptr": torch.float32, "cols": block, "BLOCK": block}
    return Configuration(name, kernel, arguments, {"num_warps": 4}, targets=targets)


NVIDIA, AMD = ("sm_80", "sm_90", "sm_100"), ("gfx942",)
CONSUMER = ("sm_86", "sm_120")
CONFIGURATIONS = [
    _matmul("good matmul", NVIDIA),
    _matmul("good matmul for AMD", AMD, (128, 128, 32), stages=2),
    _softmax("good softmax", 1024, ("sm_90", *AMD)),
    _matmul("good matmul for 99 KiB", CONSUMER),
    _matmul("five stages", (*CONSUMER, "sm_103"), stages=5),
    _matmul("eight stages", ("sm_90",), stages=8),
    _matmul("four stages on AMD", (*AMD, "gfx950"), stages=4),
    _softmax("square root", 1024, ("sm_90", *AMD), normalise_rows),
    _matmul("half the warps", ("sm_90",), (128, 256, 64), warps=4),
    _matmul("one warp on AMD", AMD, (256, 128, 32), warps=1, stages=2),
    _matmul("float32 operands", ("sm_80", "sm_90"), (64, 64, 32), warps=4, dtype=torch.float32),
    _matmul("good float32 matmul for AMD", AMD, (64, 64, 32), warps=4, stages=2, dtype=torch.float32),
    _matmul("too few warps for wgmma", ("sm_90",), (64, 64, 64), warps=2),
    _matmul("one stage", ("sm_80", "sm_90", *AMD), (128, 128, 32), stages=1),
    _matmul("width not a multiple of 16", ("sm_90",), width=4104),
    Configuration(
        "odd rows without padding",
        row_kernels.dlogits_rows,
        {
            **dict.fromkeys(("tile_ptr", "max_ptr", "others_ptr", "scale_ptr", "residual_ptr"), torch.float32),
            "flag_ptr": torch.int64,
            "out_ptr": torch.bfloat16,
            "labels_ptr": torch.int64,
            **dict.fromkeys(("cols", "row_stride", "out_stride"), 50257),
            "start": 0,
            "softcap": 30.0,
            **dict.fromkeys(("HAS_SCALE", "HAS_RESIDUAL"), True),
            **dict.fromkeys(("HAS_SOFTCAP", "CONDITIONAL", "PADDED"), False),
            "BLOCK": 4096,
        },
        {"num_warps": 8},
        targets=("sm_90",),
    ),
    _matmul("more registers than ptxas has", ("sm_90",), (256, 256, 64), warps=16),
    _softmax("row too long", 32768, ("sm_80", "sm_90")),
    Configuration("integer turned float", count_up, {"out_ptr": torch.float32, "total": 1024}, targets=("sm_90",)),
    Configuration("compiler aborts", abort, {"out_ptr": torch.float32}, targets=("sm_90",)),
    Configuration("a parameter forgotten", count_up, {"out_ptr": torch.float32}, targets=("sm_90",)),
]
