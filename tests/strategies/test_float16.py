"""float16 operands: coefficients of any size keep their digits, as float32 values between rounded operands would."""

import math

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels.kernels import float16_range
from dpo_kernels.kernels.torch_kernels import TorchKernels
from dpo_kernels.shapes import Head
from tests.cases import widened
from tests.tolerance import RELATIVE_L2_BAR, TWO_ROUNDINGS_BAR, relative_l2

HALF = torch.float16
PAIRS, LENGTH, WIDTH, VOCAB = 4, 6, 32, 300
ONE_ROUNDING = 2.0**-11  # of a single value at most, and so of a row that one entry decides


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """Gradients of logits are rounded on the CPU too. The products are torch's, which adds in float32."""
    monkeypatch.setattr(TorchKernels, "rounds_operands", lambda self, like: self.dtype == HALF)
    monkeypatch.setattr("dpo_kernels.inputs.notices.warn_once", lambda message: None)


def batch(seed=0, spread=1.0, logits=1.0):
    g = torch.Generator().manual_seed(seed)
    scale = spread * logits / math.sqrt(WIDTH)
    return {
        "hidden": (torch.randn(2 * PAIRS, LENGTH, WIDTH, generator=g) / spread).to(HALF).requires_grad_(),
        "weight": (torch.randn(VOCAB, WIDTH, generator=g) * scale).to(HALF).requires_grad_(),
        "labels": torch.randint(0, VOCAB, (2 * PAIRS, LENGTH), generator=g),
        "ref_logps": torch.randn(2 * PAIRS, generator=g, dtype=torch.float64) - LENGTH * math.log(VOCAB),
        "pairs": "interleaved",
    }


def gradients(inputs, call=dk.fused_dpo_loss, **options):
    """Gradients by hidden states and weight in float32, which a step of mixed precision would round."""
    inputs = dict(inputs)
    wide = {name: inputs[name].detach().float().requires_grad_() for name in ("hidden", "weight")}
    with torch.autocast("cpu", HALF):
        out = call(**{**inputs, **wide}, backend="torch", **options)
    return torch.autograd.grad(out.loss, list(wide.values()))


def truth(inputs, call=dk.fused_dpo_loss, **options):
    wide = widened(inputs)
    out = call(**wide, backend="torch", **options)
    return torch.autograd.grad(out.loss, [wide["hidden"], wide["weight"]])


def check(inputs, **options):
    dx, dw = gradients(inputs, **options)
    true_dx, true_dw = truth(inputs, **options)
    assert relative_l2(dw, true_dw) <= RELATIVE_L2_BAR[HALF], "one rounding, that of the tile"
    for mine, true in zip(dx.flatten(0, 1), true_dx.flatten(0, 1), strict=True):
        assert relative_l2(mine, true) <= ONE_ROUNDING


SCRATCH = {"whole": 2**20, "oversized": 2**14}
STRATEGIES = [("chunked", "whole"), ("chunked", "oversized"), ("recompute", "whole"), ("recompute", "oversized")]
WAYS = pytest.mark.parametrize(("strategy", "scratch"), STRATEGIES)


@WAYS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"beta": 1e-4},
        {"beta": 5.0},
        {"loss_type": "ipo", "beta": 0.01},
        {"loss_type": "hinge", "reduction": "sum"},
        {"denominator": 1e6},
        {"denominator": torch.tensor(1e6)},
        {"denominator": torch.tensor(1e9)},
        {"loss_type": "ipo", "beta": 1e-4},
        {"loss_type": "sppo_hard", "beta": 1e-3},
        {"pair_weights": torch.full((PAIRS,), 2.0**-27)},
        {"token_weights": torch.full((2 * PAIRS, LENGTH), 2.0**-20), "denominator": torch.tensor(1e4)},
        {"denominator": 1e-3},
        {"denominator": torch.tensor(1e-2)},
        {"logit_scale": 2.0**-6},
        {"logit_scale": 4.0, "softcap": 20.0},
        {"loss_type": "sigmoid_norm"},
    ],
    ids=str,
)
def test_coefficients_of_any_size(options, strategy, scratch):
    check(batch(), strategy=strategy, scratch_bytes=SCRATCH[scratch], **options)


@WAYS
@pytest.mark.parametrize("shift", [-40.0, -20.0, 60.0])
def test_margins_far_from_zero(shift, strategy, scratch):
    """Every pair has the same side of the sigmoid. At 40 times 0.5 its slope is 2e-9."""
    inputs = batch()
    inputs["ref_logps"] = inputs["ref_logps"] + torch.tensor([shift, 0.0]).repeat(PAIRS)
    check(inputs, strategy=strategy, scratch_bytes=SCRATCH[scratch], beta=0.5)


@WAYS
def test_pairs_whose_coefficients_differ_by_a_million(strategy, scratch):
    """dX of each token keeps its digits. dW has the error of the largest."""
    inputs = batch()
    inputs["ref_logps"] = inputs["ref_logps"] - torch.tensor([0.0, 0, 7, 0, 14, 0, 28, 0])
    check(inputs, strategy=strategy, scratch_bytes=SCRATCH[scratch])


@WAYS
@pytest.mark.parametrize("spread", [2.0**-6, 1.0, 2.0**8], ids=str)
def test_hidden_states_of_any_size(spread, strategy, scratch):
    check(batch(spread=spread), strategy=strategy, scratch_bytes=SCRATCH[scratch])


@WAYS
@pytest.mark.parametrize(
    "options", [{"loss_type": "sppo_hard", "beta": 1e-3}, {"loss_type": "ipo", "beta": 1e-3}, {}], ids=str
)
def test_a_channel_of_outliers(options, strategy, scratch):
    """float16 ends at 65504, and X is multiplied by what coefficients exceed their expectation by."""
    inputs = batch()
    with torch.no_grad():
        inputs["hidden"][..., 3] = 400.0
        inputs["weight"][:, 3] *= 1e-3
    check(inputs, strategy=strategy, scratch_bytes=SCRATCH[scratch], **options)


@WAYS
@pytest.mark.parametrize("logits", [0.0, 30.0], ids=["flat", "peaked"])
def test_distributions(logits, strategy, scratch):
    check(batch(logits=logits), strategy=strategy, scratch_bytes=SCRATCH[scratch])


@pytest.mark.parametrize("scale", [2.0**-30, 1.0, 2.0**16, 1e20])
@pytest.mark.parametrize("strategy", ["chunked", "recompute"])
def test_upstream_gradients_of_any_size(strategy, scale):
    inputs = batch()
    wide = {name: inputs[name].detach().float().requires_grad_() for name in ("hidden", "weight")}
    with torch.autocast("cpu", HALF):
        loss = dk.fused_dpo_loss(**{**inputs, **wide}, backend="torch", strategy=strategy).loss
    got = torch.autograd.grad(loss * scale, list(wide.values()))
    for mine, true in zip(got, truth(inputs), strict=True):
        assert relative_l2(mine / scale, true) <= RELATIVE_L2_BAR[HALF]


@pytest.mark.parametrize("scale", [2.0**-30, 1.0, 2.0**16, 2.0**40])
@pytest.mark.parametrize("scratch", SCRATCH)
def test_main_grad(scale, scratch):
    inputs = batch()
    buffer = torch.zeros(VOCAB, WIDTH)
    loss = dk.fused_dpo_loss(
        **inputs, backend="torch", main_grad=buffer, main_grad_scale=scale, scratch_bytes=SCRATCH[scratch]
    ).loss
    (loss * scale).backward()
    assert relative_l2(buffer / scale, truth(inputs)[1]) <= RELATIVE_L2_BAR[HALF]


def test_an_infinite_upstream_spoils_its_own_rows_alone():
    inputs = batch()
    hidden = inputs["hidden"].detach().float().requires_grad_()
    with torch.autocast("cpu", HALF):
        out = dk.fused_dpo_loss(**{**inputs, "hidden": hidden}, backend="torch", strategy="recompute", reduction="none")
    upstream = torch.full((PAIRS,), 1e20, dtype=out.loss.dtype)
    upstream[1] = math.inf
    dx = torch.autograd.grad(out.loss, hidden, upstream)[0]
    assert not dx[2:4].isfinite().all()
    assert dx[[0, 1, 4, 5, 6, 7]].isfinite().all()


def test_no_coefficient_is_no_gradient():
    inputs = batch()
    dx, dw = gradients(inputs, beta=0.1, pair_weights=torch.zeros(PAIRS))
    assert not dx.any()
    assert not dw.any()


def test_the_bias_gets_its_gradient():
    inputs = {**batch(), "bias": torch.zeros(VOCAB, dtype=HALF).requires_grad_()}
    wide = widened(inputs)
    true = torch.autograd.grad(dk.fused_dpo_loss(**wide, backend="torch").loss, wide["bias"])[0]
    for strategy in ("chunked", "recompute"):
        for scratch in SCRATCH.values():
            out = dk.fused_dpo_loss(**inputs, backend="torch", strategy=strategy, scratch_bytes=scratch)
            got = torch.autograd.grad(out.loss, inputs["bias"])[0]
            assert relative_l2(got, true) <= TWO_ROUNDINGS_BAR[HALF]


@pytest.mark.parametrize("scratch", [2**20, 2**14, 2**11], ids=["whole", "chunks", "cut"])
def test_a_frozen_head(scratch):
    inputs = batch()
    inputs["weight"].requires_grad_(False)
    wide = widened(inputs)
    true = torch.autograd.grad(dk.fused_dpo_loss(**wide, backend="torch").loss, wide["hidden"])[0]
    out = dk.fused_dpo_loss(**inputs, backend="torch", strategy="frozen_head", scratch_bytes=scratch)
    assert relative_l2(torch.autograd.grad(out.loss, inputs["hidden"])[0], true) <= TWO_ROUNDINGS_BAR[HALF]


# --- the scales themselves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expected", [0.0, 1.0, 3.0, 2.0**-40, 1e6, math.inf])
def test_rows_end_within_the_range(expected):
    g = torch.Generator().manual_seed(0)
    others = torch.exp(20 * torch.randn(1000, generator=g))
    scale = torch.exp(20 * torch.randn(1000, generator=g)) * torch.randn(1000, generator=g).sign()
    others[:3], scale[3] = 0.0, 0.0
    applied, left = float16_range.row_scales(scale, others, expected)
    torch.testing.assert_close(applied * left, scale, rtol=0, atol=0)
    mantissa = left.frexp().mantissa
    assert torch.equal(mantissa, torch.full_like(mantissa, 0.5)), "powers of two"
    largest = (applied * torch.where(others > 0, others, 1.0)).abs()
    inside = (largest > 0) & (scale.abs() * others < 2.0**80) & (scale.abs() * others > 2.0**-80)
    lowest = float16_range.TOP - 1 - float16_range.SLACK
    assert ((largest <= 2.0**float16_range.TOP) & (largest >= 2.0**lowest))[inside].all()


def test_the_row_of_the_expected_coefficient_leaves_x_as_it_is():
    for expected in (1.0, 0.75, 2.0**-12, 640.0):
        _, left = float16_range.row_scales(torch.tensor([expected]), torch.ones(1), expected)
        assert float(left) * 2.0 ** float16_range.x_exponent(expected) in (1.0, 2.0)


def test_a_flat_row_of_a_large_vocabulary_fits():
    """Its label's own value is minus the sum of exponentials, which is more than float16 holds."""
    rows, vocab = TorchKernels(HALF, 2**20), 100_000
    tile, labels = torch.zeros(3, vocab), torch.tensor([0, vocab - 1, -1])
    weight = torch.zeros(vocab, 8)  # but for a few rows, or the order in which a GEMM adds so many would be seen
    weight[[0, 7, vocab // 2, vocab - 1]] = torch.randn(4, 8)
    head = Head(weight.half())
    others = torch.full((3,), vocab - 1.0)
    d = rows.dlogits_(tile, labels, 0, torch.zeros(3), others, head, None)
    assert d.values.dtype == HALF
    assert d.values.isfinite().all()
    assert float(d.values[:2].float().abs().amin()) * float(d.scale[0]) == 1.0, "the others are exact"
    out = torch.empty(3, 8)
    rows.grad_hidden(d, head, 0, out, accumulate=False)
    rows_of_head = weight.half().double()
    every = rows_of_head.sum(0)
    want = torch.stack([every - vocab * rows_of_head[0], every - vocab * rows_of_head[-1], every])
    torch.testing.assert_close((out * d.scale[:, None]).double(), want, rtol=1e-5, atol=1e-2)
