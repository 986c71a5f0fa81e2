"""LM heads that bitsandbytes has quantised to 8 or 4 bits, dequantised tile by tile."""

import copy
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import TiledWeight
from dpo_kernels.integrations.requirements import require

BITSANDBYTES = "0.50"  # the oldest release that the tests have passed on


def tiled_weight(layer: Any, dtype: torch.dtype) -> TiledWeight:
    """Return the weight of a quantised layer as the fused functions take a frozen head.

    The layer is one of bitsandbytes, whose weight was quantised by a move to its device. It may have run before.

    A forward in eval mode without gradient on a CPU with AVX512_BF16 makes a ``Linear4bit`` round the factors of its
    blocks to bfloat16, for good. This function reads what is left, as the layer does, and copies the codes at each
    call. Call it before such a forward where the unrounded factors are wanted.

    Args:
        layer: ``Linear4bit`` in nf4 or fp4, with or without double quantisation, or ``Linear8bitLt``.
        dtype: dtype of the tiles, which is that of the hidden states.

    Returns:
        The weight ``(V, H)``. Pass the layer's bias, if it has one, as ``bias``.

    Raises:
        ImportError: bitsandbytes is missing or older than 0.50.
        TypeError: The layer is another one, or its weight was not quantised yet.

    Example:
        loss = fused_dpo_loss(hidden, tiled_weight(model.lm_head, hidden.dtype), labels, ref_logps=ref_logps).loss
    """
    require("bitsandbytes", BITSANDBYTES, "dpo_kernels.integrations.bitsandbytes")
    weight = layer.weight
    if getattr(weight, "quant_state", None) is not None:
        return _of_4_bits(weight, dtype)
    codes, scale = _codes_and_scale(layer)
    if codes is None or scale is None:
        raise TypeError(
            f"{type(layer).__name__} has no quantised weight: give a Linear4bit or a Linear8bitLt of bitsandbytes, "
            "after it was moved to its device"
        )
    return TiledWeight(lambda start, stop: _of_8_bits(codes, scale, start, stop, dtype), tuple(codes.shape), dtype,
                       codes.device)  # fmt: skip


def _codes_and_scale(layer: Any) -> tuple[Any, Any]:
    """Return codes ``(V, H)`` and factors ``(V,)`` of 8 bits, or None. The first forward moves them to the state."""
    state: Any = getattr(layer, "state", None)
    if getattr(state, "has_fp16_weights", True):  # then the state is of the last forward only
        return None, None
    held = layer.weight if getattr(layer.weight, "CB", None) is not None else state
    return held.CB, held.SCB


def _of_8_bits(codes: Tensor, scale: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Return rows of a weight with one factor for each row, ``code * SCB / 127``."""
    return (codes[start:stop] * (scale[start:stop, None].float() / 127.0)).to(dtype)


def _of_4_bits(weight: Any, dtype: torch.dtype) -> TiledWeight:
    """Return the weight whose codes have one factor for each block of ``blocksize`` numbers, row after row."""
    from bitsandbytes import functional

    packed, state = weight.data, weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):  # its order of codes is of the layer's own kernel
        state = copy.copy(state)  # the inverse changes it
        state.original_nested = False  # the factors are no longer 8 bits
        packed, state = functional._convert_weight_packed_for_cpu_inverse(packed, state)
    packed, absmax = packed.view(torch.uint8).reshape(-1), state.absmax
    if state.nested:  # double quantisation: the factors are 8 bits themselves, and few
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    elif absmax.dim() == 2:  # (H / blocksize, V), as that kernel reads it; a state dict leaves it so
        absmax = absmax.T.reshape(-1)
    absmax, block, width = absmax.float(), state.blocksize, state.shape[1]

    def weight_tile(start: int, stop: int) -> Tensor:
        first, last = start * width // block, -(-stop * width // block)  # whole blocks around the rows
        numbers = min(last * block, state.shape[0] * width) - first * block
        part = functional.QuantState(
            absmax=absmax[first:last],
            shape=(1, numbers),
            code=state.code,
            blocksize=block,
            quant_type=state.quant_type,
            dtype=dtype,
        )
        codes = packed[first * block // 2 : (first * block + numbers + 1) // 2]
        flat = functional.dequantize_4bit(codes, part).reshape(-1)
        skipped = start * width - first * block
        return flat[skipped : skipped + (stop - start) * width].view(stop - start, width)

    return TiledWeight(weight_tile, (state.shape[0], width), dtype, packed.device)
