"""The configurations of the Triton kernels that the ahead-of-time gate compiles.

A configuration is a launch in every detail that specialises the code: dtypes of pointers, which integers are
divisible by 16, constants, warps and stages. The sizes are those of real models.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dpo_kernels.kernels import float16_range
from dpo_kernels.kernels.sampling import BLOCK, UNITS
from dpo_kernels.kernels.torch_kernels import SIXTEEN_BIT
from dpo_kernels.kernels.triton import (
    hidden_kernels,
    matmul_kernels,
    pack_kernels,
    row_kernels,
    sequence_loss,
    sparse_kernels,
)
from dpo_kernels.kernels.triton.configs import (
    COMPILE_OPTIONS,
    ENTRIES,
    HIDDEN_BLOCK,
    HIDDEN_WARPS,
    PACK_BLOCK,
    PACK_WARPS,
    ROW_BLOCK,
    ROW_WARPS,
    SAFE_SHIFT,
    SAMPLE_GROUPS,
    SAMPLE_OPTIONS,
    SAMPLE_WARPS,
    SUM_BLOCK,
    SUM_WARPS,
    MatrixLaunch,
    family_of,
)
from dpo_kernels.shapes import GPU_ROW_ALIGNMENT, padded

TARGETS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "gfx950")


@dataclass(frozen=True)
class Matrix:
    """A matrix that a kernel reads by a descriptor, in blocks of its ``BLOCK_*``."""

    dtype: torch.dtype
    rows: int
    cols: int


@dataclass(frozen=True)
class Configuration:
    """One specialisation of one kernel.

    ``arguments`` maps every parameter of the kernel to a ``torch.dtype`` (a pointer to that, 16-byte aligned), a
    ``Matrix``, an int or float (a runtime value, specialised as a launch would), None, or the value of a
    ``tl.constexpr``.
    """

    name: str
    kernel: Any  # triton.JITFunction
    arguments: dict[str, torch.dtype | Matrix | int | float | bool | str | None]
    options: dict[str, int] = field(default_factory=dict)  # num_warps, num_stages
    matrix: bool = False  # the gate expects a matrix instruction and pipelined loads
    targets: tuple[str, ...] = TARGETS


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- row kernels --------------------------------------------------------------------------------------------

ROWS = {"num_warps": ROW_WARPS}
PADDED_ROWS = {"PADDED": True, "BLOCK": ROW_BLOCK}


def _bias_scale_cap(cols: int, dtype: torch.dtype, softcap: bool) -> Configuration:
    arguments: dict[str, Any] = {
        "tile_ptr": torch.float32,
        "b_ptr": dtype,
        "cols": cols,
        "row_stride": padded(cols, GPU_ROW_ALIGNMENT),
        "scale": 0.5,
        "softcap": 30.0,
        "HAS_BIAS": not softcap,
        "HAS_SOFTCAP": softcap,
    }
    return Configuration(
        f"apply_bias_scale_cap V={cols} {_plain(dtype)}{' softcap' if softcap else ''}",
        row_kernels.apply_bias_scale_cap,
        {**arguments, **PADDED_ROWS},
        ROWS,
    )


def _reduce(cols: int, stats: bool, fresh: bool = False) -> Configuration:
    state = ("max_ptr", "others_ptr", "target_ptr", "entropy_ptr", "logit_sum_ptr", "square_sum_ptr")
    arguments: dict[str, Any] = {
        "tile_ptr": torch.float32,
        "labels_ptr": torch.int64,
        **dict.fromkeys(state, torch.float32),
        "argmax_ptr": torch.int64,
        "logp_ptr": torch.float32,
        "FRESH": fresh,
        "cols": cols,
        "row_stride": padded(cols, GPU_ROW_ALIGNMENT),
        "start": 0,
        **dict.fromkeys(("HAS_ENTROPY", "HAS_LOGIT_SUM", "HAS_ARGMAX", "HAS_SQUARE_SUM"), stats),
    }
    return Configuration(
        f"reduce_rows V={cols}{' stats' if stats else ''}{' fresh' if fresh else ''}",
        row_kernels.reduce_rows,
        {**arguments, **PADDED_ROWS},
        ROWS,
    )


def _softmax_grad(cols: int) -> Configuration:
    written = ("max_ptr", "others_ptr", "target_ptr", "factor_ptr", "residual_ptr")
    arguments: dict[str, Any] = {
        "tile_ptr": torch.float32,
        "out_ptr": torch.bfloat16,
        "labels_ptr": torch.int64,
        **dict.fromkeys(written, torch.float32),
        "cols": cols,
        **dict.fromkeys(("row_stride", "out_stride"), padded(cols, GPU_ROW_ALIGNMENT)),
        "SAFE": SAFE_SHIFT,
    }
    return Configuration(
        f"softmax_grad_rows V={cols}", row_kernels.softmax_grad_rows, {**arguments, **PADDED_ROWS}, ROWS
    )


def _dlogits(cols: int, dtype: torch.dtype, softcap: bool, conditional: bool = False) -> Configuration:
    rounded = dtype in SIXTEEN_BIT
    arguments: dict[str, Any] = {
        "tile_ptr": torch.float32,
        "flag_ptr": torch.int32 if conditional else torch.int64,
        "out_ptr": dtype,
        "labels_ptr": torch.int64,
        **dict.fromkeys(("max_ptr", "others_ptr", "scale_ptr", "residual_ptr"), torch.float32),
        "cols": cols,
        **dict.fromkeys(("row_stride", "out_stride"), padded(cols, GPU_ROW_ALIGNMENT)),
        "start": 0,
        "softcap": 30.0,
        **dict.fromkeys(("HAS_SCALE", "HAS_RESIDUAL"), rounded),
        "HAS_SOFTCAP": softcap,
        "CONDITIONAL": conditional,
    }
    return Configuration(
        f"dlogits_rows V={cols} {_plain(dtype)}{' softcap' if softcap else ''}{' conditional' if conditional else ''}",
        row_kernels.dlogits_rows,
        {**arguments, **PADDED_ROWS},
        ROWS,
    )


def _float16_scales() -> Configuration:
    arguments: dict[str, Any] = {
        **dict.fromkeys(("scale_ptr", "others_ptr", "applied_ptr", "left_ptr"), torch.float32),
        "rows": 2048,
        "expected": -3,
        "HAS_SCALE": True,
        "TOP": float16_range.TOP,
        "SLACK": float16_range.SLACK,
        "LEAST": 2.0**-float16_range.MOST,
        "MOST": 2.0**float16_range.MOST,
        "BLOCK": SUM_BLOCK,
    }
    return Configuration("float16_scales", row_kernels.float16_scales, arguments, {"num_warps": SUM_WARPS})


def _of_row_kernels() -> Iterator[Configuration]:
    yield _bias_scale_cap(50257, torch.bfloat16, softcap=False)
    yield _bias_scale_cap(256000, torch.bfloat16, softcap=True)
    for cols in (128256, 50257):
        yield _reduce(cols, stats=False)
        yield _reduce(cols, stats=True)
        yield _reduce(cols, stats=False, fresh=True)
        yield _softmax_grad(cols)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield _dlogits(128256, dtype, softcap=False)
        yield _dlogits(128256, dtype, softcap=False, conditional=True)
    yield _dlogits(50257, torch.bfloat16, softcap=False)
    yield _dlogits(256000, torch.bfloat16, softcap=True)
    yield _float16_scales()


# --- the sequence loss --------------------------------------------------------------------------------------


def _sequence_loss(weights: torch.dtype | None, scale: bool) -> Configuration:
    """With factors of rows, both are written to one argument: what it is depends on which is wanted."""
    float64 = ("ref_ptr", "nan_if_invalid_ptr", "sums_ptr", "losses_ptr", "divisor_ptr")
    last = torch.float32 if scale else torch.float64
    arguments: dict[str, Any] = {
        "logp_ptr": torch.float32,
        "weights_ptr": torch.float32 if weights is None else weights,
        "counts_ptr": torch.int64,
        **dict.fromkeys(float64, torch.float64),
        **dict.fromkeys(("max_ptr", "others_ptr", "target_ptr"), torch.float32),
        **dict.fromkeys(("grad_ptr", "scale_ptr"), last),
        "length": 8192,
        "sequences": 64,
        **dict.fromkeys(("beta", "smoothing", "grad_scale", "logit_scale"), 0.1),
        "HAS_SCALE": scale,
        "HAS_WEIGHTS": weights is not None,
        "BLOCK": SUM_BLOCK,
    }
    kind = f"{'' if weights is None else f' weights {_plain(weights)}'}{' factors' if scale else ''}"
    return Configuration(
        f"sigmoid_sequence_loss{kind}", sequence_loss.sigmoid_sequence_loss, arguments, {"num_warps": SUM_WARPS}
    )


# --- packing ------------------------------------------------------------------------------------------------


def _packing(labels: torch.dtype, weights: torch.dtype | None, bounds: bool) -> Iterator[Configuration]:
    """Both kernels, of 64 sequences of 2048 rows with a shift."""
    int64 = ("counts_ptr", "bad_ptr")
    arguments: dict[str, Any] = {
        "labels_ptr": labels,
        "bounds_ptr": labels,
        **dict.fromkeys(int64, torch.int64),
        "sequences": 64,
        "rows": 64 * 2048,
        "width": 0 if bounds else 2048,
        "vocab": 128256,
        "ignore_index": -100,
        "SHIFT": 1,
        "STACKED": True,
        "HAS_BOUNDS": bounds,
        "BLOCK": PACK_BLOCK,
    }
    kind, options = f"{_plain(labels)}{' bounds' if bounds else ''}", {"num_warps": PACK_WARPS}
    yield Configuration(
        f"count_scored {kind}", pack_kernels.count_scored, {**arguments, "copy_ptr": torch.int64}, options
    )
    written = ("index_ptr", "packed_labels_ptr", "segments_ptr", "slot_ptr")
    yield Configuration(
        f"write_packed {kind}{'' if weights is None else f' weights {_plain(weights)}'}",
        pack_kernels.write_packed,
        {
            **arguments,
            **dict.fromkeys(written, torch.int64),
            "token_weights_ptr": labels if weights is None else weights,
            "weights_ptr": torch.int64 if weights is None else torch.float32,
            "nan_if_invalid_ptr": torch.float64,
            "capacity": 65536,
            "FITS": weights is None,
            "HAS_TOKEN_WEIGHTS": weights is not None,
            "HAS_WEIGHTS": weights is not None,
        },
        options,
    )


# --- rows of hidden states ------------------------------------------------------------------------------------


def _of_hidden_kernels() -> Iterator[Configuration]:
    width, options = 4096, {"num_warps": HIDDEN_WARPS}
    sizes: dict[str, Any] = {"width": width, "BLOCK": HIDDEN_BLOCK}
    for conditional in (False, True):
        yield Configuration(
            f"add_label_rows{' conditional' if conditional else ''}",
            hidden_kernels.add_label_rows,
            {
                **sizes,
                "flag_ptr": torch.int32 if conditional else torch.int64,
                "out_ptr": torch.float32,
                "weight_ptr": torch.bfloat16,
                "labels_ptr": torch.int64,
                "residual_ptr": torch.float32,
                "vocab": 128256,
                **dict.fromkeys(("out_stride", "weight_stride"), width),
                "weight_col_stride": 1,
                "CONDITIONAL": conditional,
            },
            options,
        )
    for dtype in (torch.bfloat16, torch.float16):
        yield Configuration(
            f"scale_and_round {_plain(dtype)}",
            hidden_kernels.scale_and_round,
            {
                **dict.fromkeys(("grad_ptr", "factor_ptr"), torch.float32),
                "out_ptr": dtype,
                "elements": 4096 * 128256,
                "BLOCK": ROW_BLOCK,
            },
            {"num_warps": ROW_WARPS},
        )
    for dtype in (torch.bfloat16, torch.float32):
        yield Configuration(
            f"to_input_rows {_plain(dtype)}",
            hidden_kernels.to_input_rows,
            {
                **sizes,
                "dx_ptr": torch.float32,
                "slot_ptr": torch.int64,
                "factor_ptr": torch.float64,
                "out_ptr": dtype,
                "dx_stride": width,
            },
            options,
        )


# --- sparse gradients ------------------------------------------------------------------------------------------


def _sample(cols: int, softcap: bool) -> Iterator[Configuration]:
    """Both passes over a tile."""
    int32 = ("rows_ptr", "columns_ptr", "too_many_ptr")
    arguments: dict[str, Any] = {
        "tile_ptr": torch.float32,
        **dict.fromkeys(("labels_ptr", "tokens_ptr", "seed_ptr"), torch.int64),
        **dict.fromkeys(("max_ptr", "sumexp_ptr"), torch.float32),
        "cols": cols,
        "row_stride": padded(cols, GPU_ROW_ALIGNMENT),
        "start": 0,
        "tau": 2.0**-12,
        "UNITS": UNITS,
        "PADDED": True,
        "GROUPS": SAMPLE_GROUPS,
        "SAMPLED": BLOCK,
    }
    options, kind = {"num_warps": SAMPLE_WARPS, **SAMPLE_OPTIONS}, f"V={cols}{' softcap' if softcap else ''}"
    counted = {"counts_ptr": torch.int32, "expected_ptr": torch.int64}
    if not softcap:
        yield Configuration(f"count_sample {kind}", sparse_kernels.count_sample, {**arguments, **counted}, options)
    written = {"offsets_ptr": torch.int64, **dict.fromkeys(int32, torch.int32), "values_ptr": torch.float32}
    given = {"others_ptr": torch.float32, "softcap": 30.0, "HAS_SOFTCAP": softcap}
    yield Configuration(f"write_sample {kind}", sparse_kernels.write_sample, {**arguments, **written, **given}, options)


def _kept_rows(matrix: torch.dtype, by_column: bool, add: bool) -> Configuration:
    width = 4096
    arguments: dict[str, Any] = {
        **dict.fromkeys(("begins_ptr", "order_ptr"), torch.int64),
        **dict.fromkeys(("rows_ptr", "columns_ptr", "too_many_ptr"), torch.int32),
        **dict.fromkeys(("values_ptr", "scale_ptr", "out_ptr"), torch.float32),
        "matrix_ptr": matrix,
        "first": 0,
        **dict.fromkeys(("width", "matrix_stride", "out_stride"), width),
        "matrix_col_stride": 1,
        "BY_COLUMN": by_column,
        "ADD": add,
        "ENTRIES": ENTRIES,
        "BLOCK": HIDDEN_BLOCK,
    }
    kind = f"{_plain(matrix)}{' by column' if by_column else ''}{' add' if add else ''}"
    return Configuration(f"add_kept_rows {kind}", sparse_kernels.add_kept_rows, arguments, {"num_warps": HIDDEN_WARPS})


def _of_sparse_kernels() -> Iterator[Configuration]:
    yield from _sample(128256, softcap=False)
    yield from _sample(50257, softcap=False)
    yield from _sample(256000, softcap=True)
    yield Configuration(
        "place_rows",
        sparse_kernels.place_rows,
        {
            "counts_ptr": torch.int32,
            **dict.fromkeys(("expected_ptr", "offsets_ptr"), torch.int64),
            "too_many_ptr": torch.int32,
            "rows": 2048,
            **dict.fromkeys(("limit", "capacity"), 2048 * 1002),
            "BLOCK": PACK_BLOCK,
        },
        {"num_warps": PACK_WARPS},
    )
    for matrix in (torch.float32, torch.bfloat16, torch.float16):
        yield _kept_rows(matrix, by_column=False, add=False)
        yield _kept_rows(matrix, by_column=True, add=True)


# --- matmul kernels -----------------------------------------------------------------------------------------


def _matmul_arguments(
    dtype: torch.dtype, rows: int, width: int, vocab: int, launch: MatrixLaunch, extras: bool
) -> dict[str, Any]:
    matrices = {"x_ptr": Matrix(dtype, rows, width), "w_ptr": Matrix(dtype, vocab, width)}
    return {
        **(matrices if launch.tma else dict.fromkeys(matrices, dtype)),
        "b_ptr": dtype,
        "labels_ptr": torch.int64,
        **dict.fromkeys(("max_ptr", "others_ptr"), torch.float32),
        "width": width,
        "x_stride": width,
        "w_stride": width,
        "scale": 1.0,
        "softcap": 30.0,
        "HAS_BIAS": extras,
        "HAS_SOFTCAP": extras,
        **launch.blocks,
        "PRECISION": "ieee",
    }


def _logps(
    target: str, launch: MatrixLaunch, dtype: torch.dtype, width: int, vocab: int, extras: bool, stats: bool
) -> Configuration:
    rows, written = 8192, ("target_ptr", "entropy_ptr", "logit_sum_ptr", "square_sum_ptr")
    return Configuration(
        f"linear_logps {_kind(dtype, width, vocab, extras, stats)} {launch}",
        matmul_kernels.linear_logps,
        {
            **_matmul_arguments(dtype, rows, width, vocab, launch, extras),
            **dict.fromkeys(written, torch.float32),
            "argmax_ptr": torch.int64,
            "total_rows": rows,
            "vocab": vocab,
            "split": launch.block_cols * 64,
            "HAS_STATS": stats,
        },
        launch.options,
        dtype != torch.float32,
        (target,),
    )


def _logits_gradient(
    target: str, launch: MatrixLaunch, dtype: torch.dtype, width: int, vocab: int, extras: bool
) -> Configuration:
    rows, rounded = 2048, dtype in SIXTEEN_BIT
    return Configuration(
        f"linear_dlogits {_kind(dtype, width, vocab, extras, stats=False)} {launch}",
        matmul_kernels.linear_dlogits,
        {
            **_matmul_arguments(dtype, rows, width, vocab, launch, extras),
            "out_ptr": dtype,
            **dict.fromkeys(("scale_ptr", "residual_ptr"), torch.float32),
            **dict.fromkeys(("HAS_SCALE", "HAS_RESIDUAL"), rounded),
            "total_rows": rows,
            **dict.fromkeys(("tile_cols", "start", "out_stride"), 8192),
        },
        launch.options,
        dtype != torch.float32,
        (target,),
    )


def _product(target: str, dtype: torch.dtype, transposed: bool) -> Configuration:
    """A product for dX, or for dW. The vocabulary is a multiple of 16, without which loads of a tile are narrow."""
    launch, rows, width, vocab = family_of("product_if", target, dtype)[0], 2048, 4096, 128256
    arguments: dict[str, Any] = {
        "flag_ptr": torch.int32,
        **dict.fromkeys(("d_ptr", "b_ptr"), dtype),
        **dict.fromkeys(("scale_ptr", "out_ptr"), torch.float32),
        "total_rows": rows,
        **dict.fromkeys(("tile_cols", "d_stride"), vocab),
        "width": width,
        **dict.fromkeys(("b_stride", "out_stride"), width),
        "alpha": 1.0,
        "TRANSPOSED": transposed,
        "HAS_SCALE": not transposed,
        "ADD": transposed,
        "BLOCK_M": launch.block_rows,
        "BLOCK_N": launch.block_cols,
        "BLOCK_K": launch.block_width,
        "PRECISION": "ieee",
    }
    return Configuration(
        f"product_if {_plain(dtype)}{' transposed' if transposed else ''} {launch}",
        sparse_kernels.product_if,
        arguments,
        launch.options,
        dtype != torch.float32,
        (target,),
    )


def _kind(dtype: torch.dtype, width: int, vocab: int, extras: bool, stats: bool) -> str:
    sizes = f"H={width} V={vocab} {_plain(dtype)}"
    return f"{sizes}{' bias softcap' if extras else ''}{' stats' if stats else ''}"


def _of_matmul_kernels() -> Iterator[Configuration]:
    """Each launch of every family at one size, with statistics too, and the first launch at all sizes."""
    bf16, common = torch.bfloat16, (torch.bfloat16, 4096, 128256)
    others = (
        (bf16, 2304, 256000, True),
        (bf16, 4104, 50257, False),
        (torch.float16, 4096, 32000, False),
        (torch.float32, 2048, 50257, False),
    )
    for target in TARGETS:
        for launch in family_of("linear_logps", target, bf16):
            yield _logps(target, launch, *common, extras=False, stats=False)
            yield _logps(target, launch, *common, extras=True, stats=False)
        for launch in family_of("linear_logps", target, bf16, stats=True):
            yield _logps(target, launch, *common, extras=True, stats=True)
        for launch in family_of("linear_dlogits", target, bf16):
            yield _logits_gradient(target, launch, *common, extras=False)
        for dtype, width, vocab, extras in others:
            logps, gradient = (family_of(name, target, dtype)[0] for name in ("linear_logps", "linear_dlogits"))
            yield _logps(target, logps, dtype, width, vocab, extras, stats=False)
            yield _logits_gradient(target, gradient, dtype, width, vocab, extras)
        for dtype in (bf16, torch.float16, torch.float32):
            for transposed in (False, True):
                yield _product(target, dtype, transposed)


_WITHOUT_COMPILE_OPTIONS = [
    *_of_row_kernels(),
    *(_sequence_loss(weights, scale=False) for weights in (None, torch.float32, torch.float64)),
    *(_sequence_loss(weights, scale=True) for weights in (None, torch.float32, torch.float64)),
    *_of_hidden_kernels(),
    *_of_sparse_kernels(),
    *_packing(torch.int64, None, bounds=False),
    *_packing(torch.int32, torch.bfloat16, bounds=True),
    *_of_matmul_kernels(),
]
CONFIGURATIONS = [replace(each, options={**COMPILE_OPTIONS, **each.options}) for each in _WITHOUT_COMPILE_OPTIONS]
