"""What must hold to the bit, and what must survive the extremes."""

import pytest
import torch

import dpo_kernels as dk
from tests.cases import STRATEGIES, Case, broken_by, run
from tests.certain import broken, certain, off_log_probs, off_orpo
from tests.extremes import assert_same_bits, extreme, masked
from tests.small import BACKENDS

STRATEGY_OPTIONS = {name: {"strategy": s, "scratch_bytes": b} for name, (s, b) in STRATEGIES.items()}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fused(inputs, strategy, **keywords):
    return run(dk.fused_dpo_loss, inputs, **STRATEGY_OPTIONS[strategy], **keywords)


# --- bitwise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeated_runs_are_equal(dtype, strategy):
    case = Case(
        dtype, bias=True, weights=True, reference="hidden", options={"stats": ("entropy", "top1", "log_sum_p2")}
    )
    inputs = case.tensors()
    first = fused(inputs, strategy, **case.keywords())
    for _ in range(3):
        assert_same_bits(first, fused(inputs, strategy, **case.keywords()))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("garbage", [1e4, torch.nan, torch.inf, -torch.inf])
def test_padding_and_garbage_change_no_bit(garbage, frozen, strategy):
    case = Case(torch.bfloat16, frozen=frozen, weights=True, reference="hidden", options={"stats": ("mean_logits",)})
    inputs = case.tensors()
    clean = fused(inputs, strategy, **case.keywords())
    masked = inputs["labels"] == -100
    dirty = dict(inputs)
    for name in ("hidden", "ref_hidden", "token_weights"):
        value = inputs[name].detach().clone()
        value[masked] = garbage
        value = torch.cat([value, torch.full_like(value[:, :5], garbage)], dim=1)
        dirty[name] = value.requires_grad_(inputs[name].requires_grad)
    dirty["labels"] = torch.cat([inputs["labels"], inputs["labels"].new_full((6, 5), -100)], dim=1)
    got = fused(dirty, strategy, **case.keywords())
    longest = inputs["hidden"].shape[1]
    assert not got["dhidden"][:, longest:].any()
    assert not got["dhidden"][:, :longest][masked].any()
    got["dhidden"] = got["dhidden"][:, :longest]
    assert_same_bits(clean, got)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_packed_equals_padded_to_the_bit(strategy):
    padded = Case(torch.float32, bias=True)
    packed = padded.but(layout="packed")
    a, b = padded.tensors(), packed.tensors()
    one, two = fused(a, strategy, **padded.keywords()), fused(b, strategy, **packed.keywords())
    keep = torch.arange(a["labels"].shape[1]) < b["cu_seqlens"].diff()[:, None]
    one["dhidden"] = one["dhidden"][keep]
    assert_same_bits(one, two)


# --- extremes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
@pytest.mark.parametrize("rows", [(0, 1, 2, 3), (0, 1), (2, 3), (0,), (3,)], ids=str)
def test_masked_sequences(rows, loss_type, strategy):
    inputs = extreme(labels=masked(*rows))
    assert not broken_by(inputs, {"loss_type": loss_type}, torch.float32, strategy)
    out = fused(inputs, strategy, loss_type=loss_type)
    assert not out["dhidden"][list(rows)].any()
    assert all(value.isfinite().all() for value in out.values())
    if len(rows) == 4:
        assert not out["dweight"].any()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_token(strategy):
    labels = torch.full((4, 5), -100)
    labels[1, 3] = 7
    assert not broken_by(extreme(labels=labels), {}, torch.float32, strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sequences_of_length_one_and_zero(strategy):
    assert not broken_by(extreme(width=1), {}, torch.float32, strategy)
    shifted = fused(extreme(width=1), strategy, shift=True)  # nothing is predicted
    assert not shifted["dhidden"].any()
    empty = fused(extreme(width=0), strategy)
    assert empty["dhidden"].shape == (4, 0, 8)
    torch.testing.assert_close(empty["loss"], shifted["loss"], rtol=0, atol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_vocabulary_of_one_is_certain(strategy):
    inputs = extreme(labels=torch.zeros(4, 5, dtype=torch.int64))
    inputs["weight"] = inputs["weight"].detach()[:1].requires_grad_()
    out = fused(inputs, strategy)
    assert not out["chosen_logps"].any()
    assert not out["dhidden"].any()
    assert not out["dweight"].any()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_beta_zero(loss_type, strategy):
    out = fused(extreme(), strategy, beta=0.0, loss_type=loss_type)
    expected = {"sigmoid": 0.6931472, "hinge": 1.0}[loss_type]
    torch.testing.assert_close(out["loss"], torch.tensor(expected))
    assert not out["dhidden"].any()
    assert not out["dweight"].any()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shift", [9e4, -9e4])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_margins_of_thousands(loss_type, shift, strategy):
    inputs = extreme()
    inputs["ref_logps"] = inputs["ref_logps"] + torch.tensor([shift, shift, 0.0, 0.0])
    assert not broken_by(inputs, {"loss_type": loss_type}, torch.float32, strategy)
    assert all(value.isfinite().all() for value in fused(inputs, strategy, loss_type=loss_type).values())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 60.0, 1e3], ids=["flat", "nearly flat", "peaked", "one-hot"])
def test_peaked_and_flat_softmax(scale, dtype, strategy):
    assert not broken_by(extreme(dtype, scale), {"stats": ("entropy",)}, dtype, strategy, saturated=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_unreachable_tokens(frozen, strategy):
    """A bias of -inf takes tokens out: probability 0, gradient 0, wherever the tiles end."""
    inputs = extreme()
    inputs["labels"] = inputs["labels"].clamp(min=20)
    bias = torch.zeros(37)
    bias[:20] = -torch.inf
    inputs["bias"] = bias.requires_grad_(not frozen)
    inputs["weight"].requires_grad_(not frozen)
    assert not broken_by(inputs, {"stats": ("entropy", "top1", "log_sum_p2")}, torch.float32, strategy)
    out = fused(inputs, strategy, stats=("entropy",))
    assert all(value.isfinite().all() for value in out.values())
    if not frozen:
        assert not out["dweight"][:20].any()
        assert not out["dbias"][:20].any()
        assert out["dbias"][20:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("vocab", [211, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nearly_certain_tokens(dtype, vocab, strategy, backend):
    """The digits of what is left of 1: token log-probs, their gradients, and ORPO, which lives on them."""
    problem = certain(vocab, dtype)
    assert not broken(off_orpo(problem, strategy, backend))
    if not strategy.startswith("chunked"):
        assert not broken(off_log_probs(problem, strategy, backend))


def test_orpo_of_averages_next_to_0():
    """Down to 1e-30 nats a token; ``d log odds / d a`` is ``1 / (1 - exp(a))``, and as a coefficient fits float32."""
    sides = torch.logspace(-29.9, -1, 30, dtype=torch.float64).neg()
    chosen, rejected = sides.clone().requires_grad_(), sides.flip(0).requires_grad_()
    losses = dk.dpo_loss(chosen, rejected, None, None, loss_type="orpo", beta=0.3)[0]
    grads = torch.autograd.grad(losses.sum(), (chosen, rejected))
    gap = (chosen.expm1() / rejected.expm1()).log() + rejected - chosen  # log odds of the rejected over the chosen
    torch.testing.assert_close(losses.double(), -chosen + 0.3 * torch.nn.functional.softplus(gap), rtol=1e-6, atol=0)
    slope = 0.3 * gap.sigmoid()
    torch.testing.assert_close(grads[0], -1 + slope / chosen.expm1(), rtol=1e-6, atol=0)
    torch.testing.assert_close(grads[1], -slope / rejected.expm1(), rtol=1e-6, atol=0)
    assert all(grad.float().isfinite().all() for grad in grads)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_float16_logits_beyond_its_range(strategy):
    """Plain float16 overflows at 65504; here logits are float32 and only gradients are rounded."""
    inputs = extreme(torch.float16, scale=1e4)
    inputs["weight"] = (inputs["weight"].detach() * 10).requires_grad_()
    wide = {k: v.detach().double() if v.is_floating_point() else v for k, v in inputs.items()}
    logits = wide["hidden"] @ wide["weight"].t()
    assert logits.abs().max() > 65504
    token = logits.log_softmax(-1).gather(-1, inputs["labels"][..., None])[..., 0]
    out = fused(inputs, strategy)
    torch.testing.assert_close(out["chosen_logps"].double(), token.sum(1)[:2], rtol=1e-6, atol=0.1)
    assert all(value.isfinite().all() for value in out.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_a_bad_token_poisons_instead_of_passing(monkeypatch, frozen, strategy):
    """Where looking at labels would be a sync they are not looked at: loss and gradients become NaN, not a number."""
    from dpo_kernels.inputs import packing

    monkeypatch.setattr(packing, "_raise_bad_label", lambda *args: None)
    for loss_type in ("sigmoid", "hinge", "ipo"):
        inputs = extreme()
        inputs["weight"].requires_grad_(not frozen)
        inputs["labels"][2, 1] = 37
        out = fused(inputs, strategy, loss_type=loss_type)
        assert out["loss"].isnan()
        assert out["dhidden"].isnan().any(dim=2).all()
        if not frozen:
            assert out["dweight"].isnan().all()
