"""Heads of bitsandbytes against the definition of its formats, where it is installed."""

import pytest
import torch

import dpo_kernels as dk

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
from dpo_kernels.integrations.bitsandbytes import tiled_weight  # noqa: E402

V, H = 211, 48  # rows do not end where blocks do


def layer_of(kind, width=H):
    torch.manual_seed(0)
    plain = torch.nn.Linear(width, V, bias=False)
    if kind == "8 bits":
        layer = bnb.nn.Linear8bitLt(width, V, bias=False, has_fp16_weights=False)
    else:
        quant_type, nested = kind
        layer = bnb.nn.Linear4bit(width, V, bias=False, quant_type=quant_type, compress_statistics=nested)
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu"), plain.weight.detach()


def dequantised(layer, dtype):
    """By the definition of the formats: a code's number times the factor of its block, or of its row.

    Release 0.50.2 itself gives others on a CPU where rows do not end where blocks do. With standard normal weights they
    are 1.9 off, and those of the format 0.5.
    """
    weight = layer.weight
    if hasattr(weight, "SCB"):
        return (weight.CB * (weight.SCB[:, None] / 127)).to(dtype)
    state, packed = weight.quant_state, weight.data.reshape(-1)
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[: V * H].long()
    return (state.code[codes] * absmax.repeat_interleave(state.blocksize)[: V * H]).view(V, H).to(dtype)


KINDS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), "8 bits"]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("step", [1, 7, 64, V])
def test_tiles_are_the_numbers_of_the_format(kind, step):
    layer, plain = layer_of(kind)
    head, whole = tiled_weight(layer, torch.float32), dequantised(layer, torch.float32)
    tiles = [head.rows_between(start, min(start + step, V)) for start in range(0, V, step)]
    torch.testing.assert_close(torch.cat(tiles), whole, rtol=1e-6, atol=1e-7)
    assert 1e-4 < float((whole - plain).abs().max()) < 0.2 * float(plain.abs().max())  # it is quantised, and no other


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_is_that_of_the_dequantised_head(kind, dtype):
    layer, _ = layer_of(kind)
    g = torch.Generator().manual_seed(1)
    hidden, labels = torch.randn(4, 6, H, generator=g).to(dtype).requires_grad_(), torch.randint(V, (4, 6), generator=g)
    head = tiled_weight(layer, dtype)
    whole = torch.cat([head.rows_between(start, start + 1) for start in range(V)])
    one, two = (dk.fused_dpo_loss(hidden, each, labels, reference_free=True).loss for each in (whole, head))
    torch.testing.assert_close(two, one, rtol=1e-6, atol=0)
    ours, theirs = (torch.autograd.grad(each, hidden)[0] for each in (two, one))
    torch.testing.assert_close(ours, theirs, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_a_layer_that_is_not_quantised():
    with pytest.raises(TypeError, match="Linear has no quantised weight: give a Linear4bit or a Linear8bitLt"):
        tiled_weight(torch.nn.Linear(4, 5), torch.float32)
