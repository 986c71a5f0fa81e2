"""The comparator itself: planted errors of the kinds that happen must be caught, and honest rounding must pass."""

import math

import pytest
import torch

from dpo_kernels.reference import dpo_loss_reference
from tests import tolerance
from tests.cases import RICH, Case, run, widened
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


# --- the errors of a GPU ------------------------------------------------------------------------------------------


def test_a_gpus_floor_is_for_float32_alone():
    """4 ulp on a CPU; on a GPU also the 2 of ex2.approx and 1.2 of its argument."""
    found = {dtype: (tolerance.floor_ulps(dtype, False), tolerance.floor_ulps(dtype, True)) for dtype in ANY_DTYPE}
    assert found[torch.float32] == (4, pytest.approx(7.22, abs=0.01))
    assert found[torch.bfloat16] == found[torch.float16] == (4, 4)
    assert found[torch.float64] == (64, 64)


ANY_DTYPE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def test_it_applies_where_a_gpus_errors_are_computed():
    oracle, plain = torch.ones(3, dtype=torch.float64), torch.ones(3)
    off = plain + 6 * torch.finfo(torch.float32).eps

    def broken():
        return violations("loss", off, oracle, plain, torch.float32, gradient=False)

    assert broken()
    with tolerance.of_a_gpu():
        assert not broken()
        assert violations("loss", off + 2e-6, oracle, plain, torch.float32, gradient=False)
    assert broken()


def test_the_error_of_an_exponential_is_that_of_its_argument():
    """Of exp(-x) by the rounded product with a rounded log2(e), in float64 from there on."""
    x = torch.linspace(0.01, 80, 100_000)
    argument = (x * torch.tensor(1 / math.log(2))).double()
    off = ((argument * math.log(2) - x.double()).abs() / x.double()).max()
    assert 0.9 * tolerance.PRODUCT_ERROR < off <= tolerance.PRODUCT_ERROR
    assert tolerance.exponential_error(40.0) == 0.0
    with tolerance.of_a_gpu():
        assert tolerance.exponential_error(0.0) == 2.0**-22
        assert 3e-6 < tolerance.exponential_error(40.0) < 3.5e-6


@pytest.mark.parametrize("rich", [False, True])
def test_rows_of_the_equivalence_cases_lie_near_their_maximum(rich):
    """The floor counts on this: the mean distance by probability."""
    case = Case(bias=rich, options=RICH if rich else {})
    inputs = {name: value.double() for name, value in case.tensors().items()}
    z = (inputs["hidden"] @ inputs["weight"].t() + inputs.get("bias", 0.0)).detach()
    if rich:
        z = RICH["softcap"] * (RICH["logit_scale"] * z / RICH["softcap"]).tanh()
    z = z[inputs["labels"] != -100]
    distance = ((z.amax(1, keepdim=True) - z) * z.softmax(1)).sum(1)
    assert 0.5 * tolerance.MEAN_DISTANCE < distance.max() < tolerance.MEAN_DISTANCE


def test_log_probs_on_a_cpu_and_on_a_gpu():
    assert tolerance.log_prob_error(8192, 45.0, on_a_gpu=False) == 1e-4
    assert tolerance.log_prob_error(4096, 25.0, on_a_gpu=True) == pytest.approx(3.05e-3, rel=0.01)
