"""The comparator itself: planted errors of the kinds that happen must be caught, and honest rounding must pass."""

import pytest
import torch

from dpo_kernels.reference import dpo_loss_reference
from tests.cases import Case, run, widened
from tests.tolerance import violations


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def results(request):
    case = Case(request.param, bias=True)
    inputs = case.tensors()
    oracle = run(dpo_loss_reference, widened(inputs), **case.keywords())
    plain = run(dpo_loss_reference, inputs, **case.keywords())
    return request.param, oracle, plain


def _broken(results, name, got):
    dtype, oracle, plain = results
    return violations(name, got, oracle[name], plain[name], dtype, gradient=name.startswith("d"))


def test_the_oracle_rounded_once_passes(results):
    dtype, oracle, _ = results
    for name, value in oracle.items():
        rounded = value.to(dtype) if name.startswith("d") else value.float()
        assert not _broken(results, name, rounded), name


def _without(gradient, row):
    gradient = gradient.clone()
    gradient[row] = 0
    return gradient


def _largest_row(gradient):
    return int(gradient.flatten(1).norm(dim=1).argmax()) if gradient.dim() > 1 else int(gradient.abs().argmax())


@pytest.mark.parametrize("name", ["dhidden", "dweight", "dbias"])
@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(torch.neg, id="sign swapped"),
        pytest.param(torch.zeros_like, id="zeros"),
        pytest.param(lambda g: g * 1.01, id="one percent"),
        pytest.param(lambda g: _without(g, _largest_row(g)), id="a row missing"),
        pytest.param(lambda g: torch.where(g.abs() == g.abs().max(), torch.nan, g), id="one NaN"),
        pytest.param(lambda g: g.roll(1, 0), id="rows shifted"),
    ],
)
def test_planted_errors_in_gradients_are_caught(results, name, plant):
    dtype, oracle, _ = results
    assert _broken(results, name, plant(oracle[name]).to(dtype))


@pytest.mark.parametrize("plant", [lambda v: v.flip(0), lambda v: v * (1 + 1e-2), lambda v: v + 0.5, torch.zeros_like])
def test_planted_errors_in_logps_are_caught(results, plant):
    _, oracle, _ = results
    assert _broken(results, "chosen_logps", plant(oracle["chosen_logps"]).float())


def test_chosen_and_rejected_swapped_is_caught(results):
    _, oracle, _ = results
    assert _broken(results, "chosen_logps", oracle["rejected_logps"].float())
    assert _broken(results, "chosen_rewards", oracle["rejected_rewards"].float())


def test_accumulating_the_head_gradient_in_bfloat16_is_caught():
    """What peers do: one rounding for each of 32 chunks breaks the bar of one rounding."""
    g = torch.Generator().manual_seed(1)
    parts = torch.randn(32, 64, 64, generator=g, dtype=torch.float64)
    exact, accumulated = parts.sum(0), torch.zeros(64, 64, dtype=torch.bfloat16)
    for part in parts:
        accumulated += part.to(torch.bfloat16)
    once = exact.to(torch.bfloat16)
    assert violations("dweight", accumulated, exact, once, torch.bfloat16, gradient=True)
    assert not violations("dweight", once, exact, once, torch.bfloat16, gradient=True)


def test_infinities_must_agree():
    inf = torch.tensor([torch.inf, 1.0])
    assert not violations("loss", inf, inf.double(), inf, torch.float32, gradient=False)
    assert violations("loss", -inf, inf.double(), inf, torch.float32, gradient=False)
