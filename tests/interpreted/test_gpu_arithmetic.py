"""Kernels with a GPU's errors in exponentials, quotients and sums, and the models of these errors themselves."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import dpo_kernels as dk
from dpo_kernels.kernels.self_check import mismatches
from dpo_kernels.kernels.triton import launch_matmul
from dpo_kernels.kernels.triton.backend import TritonKernels
from dpo_kernels.shapes import Head
from tests.cases import LAYOUTS, REFERENCES, RICH, STRATEGIES, Case, broken_by, broken_rules
from tests.certain import broken, certain, off_log_probs, off_orpo
from tests.covers import cover
from tests.extremes import extreme
from tests.interpreted.arithmetic import computing
from tests.tolerance import log_prob_error
from tests.triton_tools.arithmetic import to_tf32
from tests.triton_tools.gpu_arithmetic import GROUP_BITS, LOG2_E, MODES, Errors, truncating_product
from tests.triton_tools.interpreter import UninitialisedLanes, sanitize
from tests.triton_tools.truncation import HOPPER, PAGE, errors, problem

WRONG = [mode for mode in MODES if mode.startswith(("approximate", "worst"))]  # in exponentials and quotients


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(launch_matmul, "num_vocab_splits", lambda *_: 2)
    monkeypatch.setattr("dpo_kernels.inputs.notices.warn_once", lambda message: None)


# --- the models -----------------------------------------------------------------------------------------------


def ulps_off(got: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Signed, in units of the last place of the exact value as float32 has it."""
    return (got.astype(np.float64) - exact) / np.spacing(np.abs(exact.astype(np.float32))).astype(np.float64)


@pytest.mark.parametrize("mode", WRONG)
def test_errors_reach_their_bounds_and_stay_within(mode):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 20_000)).astype(np.float32) * np.float32(20)
    errors = Errors(mode, 0)
    power = ulps_off(errors.exp2(x), np.exp2(x.astype(np.float64)))
    rounded = (x * LOG2_E).astype(np.float64)
    with np.errstate(over="ignore"):
        exponential = ulps_off(errors.exp(x), np.exp2(rounded))
    quotient = ulps_off(errors.quotient(x, y), x.astype(np.float64) / y)
    towards_infinity = quotient * np.sign(x * y)
    for off in (power, exponential, towards_infinity if mode == "approximate" else quotient):
        off = off[np.isfinite(off)]
        assert np.abs(off).max() <= 2
        assert off.max() > 1.5 if mode != "worst-" else off.max() < -1
        assert off.min() < -1.5 if mode != "worst+" else off.min() > 1


def test_exponentials_have_the_error_of_their_rounded_argument():
    """The CUDA C++ Programming Guide gives __expf 2 + 1.173 |x| ulp; most of it is the product with log2(e)."""
    x = -np.random.default_rng(1).uniform(1, 80, 50_000).astype(np.float32)
    off = np.abs(ulps_off(Errors("approximate", 0).exp(x), np.exp(x.astype(np.float64))))
    assert (off <= 2 + 1.173 * np.abs(x)).all()
    assert off.max() > 20


def test_what_is_promised_is_exact():
    inf, nan = np.float32(np.inf), np.float32(np.nan)
    for mode in WRONG:
        errors = Errors(mode, 3)
        with np.errstate(all="ignore"):
            powers = errors.exp(np.array([0, -0.0, -inf, inf, nan, -300], np.float32))
            quotients = errors.quotient(
                np.array([0, 1, -1, inf, nan, 5], np.float32), np.array([3, inf, 0, 2, 1, inf], np.float32)
            )
        np.testing.assert_array_equal(powers, np.array([1, 1, 0, inf, nan, 0], np.float32))
        np.testing.assert_array_equal(quotients, np.array([0, 0, -inf, inf, nan, 0], np.float32))
        subnormal = np.linspace(-149, -127, 1000, dtype=np.float32)
        assert (errors.exp(subnormal * np.float32(np.log(2))) >= 0).all()
        assert (errors.exp(subnormal[-100:] * np.float32(np.log(2))) > 0).all()
        assert not errors.exp2(subnormal).any(), "ex2.approx.ftz"


def test_errors_are_functions_of_operands_and_seed():
    x = np.random.default_rng(2).normal(size=500).astype(np.float32)
    y = np.roll(x, 1)
    one, other = Errors("approximate", 0), Errors("approximate", 1)
    np.testing.assert_array_equal(one.exp(x)[::-1], one.exp(x[::-1]))
    np.testing.assert_array_equal(one.quotient(x, y), Errors("approximate", 0).quotient(x, y))
    assert (one.exp(x) != other.exp(x)).mean() > 0.5
    assert (one.quotient(x, y) != other.quotient(x, y)).mean() > 0.5


def cut(value: Fraction) -> Fraction:
    """Towards zero to 24 bits."""
    if value == 0:
        return value
    exponent = int(np.floor(np.log2(abs(float(value)))))
    unit = Fraction(2) ** (exponent - 23)
    return int(value / unit) * unit  # int() cuts


@pytest.mark.parametrize("group", [4, 8, 16])
def test_sums_of_groups_are_cut(group):
    """Against exact fractions; where the sum of the groups is rounded to nearest, most results differ."""
    rng = np.random.default_rng(group)
    x, w = rng.normal(size=(5, 64)), rng.normal(size=(64, 7))
    x, w = (torch.from_numpy(part).bfloat16().float().numpy() for part in (x, w))
    start = rng.normal(size=(5, 7)).astype(np.float32)
    got = truncating_product(x, w, start, group)
    nearest = (start + x.astype(np.float64) @ w).astype(np.float32)
    for row in range(5):
        for col in range(7):
            total = Fraction(float(start[row, col]))
            for first in range(0, 64, group):
                for k in range(first, first + group):
                    total += Fraction(float(x[row, k])) * Fraction(float(w[k, col]))
                total = cut(total)
            assert got[row, col] == float(total)
    assert (got != nearest).mean() > 0.3


@triton.jit
def functions(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(out_ptr + at, tl.exp(x))
    tl.store(out_ptr + N + at, tl.exp2(x))
    tl.store(out_ptr + 2 * N + at, x / y)


@triton.jit
def product(x_ptr, w_ptr, out_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, N)
    x, w = tl.load(x_ptr + at[:, None] * N + at[None, :]), tl.load(w_ptr + at[:, None] * N + at[None, :])
    tl.store(out_ptr + at[:, None] * N + at[None, :], tl.dot(x, w, input_precision=PRECISION))


@pytest.mark.parametrize("mode", WRONG)
def test_kernels_compute_by_the_model(mode):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 64, generator=g)
    for dtype in (torch.float32, torch.float64):
        out = torch.empty(3, 64, dtype=dtype)
        with sanitize(arithmetic=mode, seed=5):
            functions[(1,)](x.to(dtype), y.to(dtype), out, N=64)
        a, b = x.numpy(), y.numpy()
        errors = Errors(mode, 5)
        if dtype == torch.float64:
            a, b = a.astype(np.float64), b.astype(np.float64)
            expected = np.exp(a), np.exp2(a), a / b  # libdevice's
        else:
            expected = errors.exp(a), errors.exp2(a), errors.quotient(a, b)
        np.testing.assert_array_equal(out.numpy(), np.stack(expected))


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")],
    ids=str,
)
def test_products_of_kernels_are_cut(dtype, precision):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 64, 64, generator=g).to(dtype)
    out = torch.empty(2, 64, 64)
    for place, mode in enumerate(("exact", "truncating")):
        with sanitize(arithmetic=mode):
            product[(1,)](x, w, out[place], N=64, PRECISION=precision)
    if dtype == torch.float32 and precision == "ieee":
        assert torch.equal(out[0], out[1]), "no tensor core multiplies these"
        return
    read = (to_tf32(operand.float().numpy()) for operand in (x, w))  # 16-bit numbers lose nothing
    group = GROUP_BITS // (8 * dtype.itemsize)
    np.testing.assert_array_equal(out[1], truncating_product(*read, np.zeros((64, 64), np.float32), group))
    assert (out[0] != out[1]).double().mean() > 0.3


@triton.jit
def half_loaded(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.exp(tl.load(x_ptr + at, mask=at < N // 2)) / 3.0)


@pytest.mark.parametrize("mode", WRONG)
def test_undefined_lanes_are_found_all_the_same(mode):
    with pytest.raises(UninitialisedLanes), sanitize(arithmetic=mode):
        half_loaded[(1,)](torch.ones(8), torch.empty(8), N=8)


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="arithmetic must be one of exact, approximate"), sanitize(arithmetic="fast"):
        pass


# --- the library with these errors ----------------------------------------------------------------------------

FLOAT32 = cover(
    {
        "strategy": tuple(STRATEGIES),
        "mode": tuple(WRONG),
        "layout": tuple(LAYOUTS),
        "reference": REFERENCES,
        "frozen": (False, True),
        "rich": (False, True),
    }
)


@pytest.mark.parametrize("mode", WRONG)
def test_equivalence_in_float32(mode):
    found = []
    for row in (row for row in FLOAT32 if row["mode"] == mode):
        rich = row["rich"]
        case = Case(
            torch.float32,
            reference=row["reference"],
            frozen=row["frozen"],
            bias=rich,
            weights=rich,
            options=RICH if rich else {},
            **LAYOUTS[row["layout"]],
        )
        with computing(mode), sanitize():
            if rules := broken_rules(case, row["strategy"], "triton"):
                found.append((row, rules))
    assert not found


@pytest.mark.parametrize("strategy", ["recompute-tiles", "streaming"])
@pytest.mark.parametrize("mode", WRONG)
def test_small_vocabularies(mode, strategy):
    """Nothing averages out in a sum of three exponentials."""
    g = torch.Generator().manual_seed(3)
    inputs = extreme(labels=torch.randint(0, 3, (4, 5), generator=g))
    inputs["weight"] = torch.randn(3, 8, generator=g).requires_grad_()
    with computing(mode), sanitize():
        assert not broken_by(inputs, {"stats": ("entropy", "log_sum_p2")}, torch.float32, strategy, "triton")


@pytest.mark.parametrize("strategy", ["chunked", "recompute-tiles", "streaming"])
@pytest.mark.parametrize("mode", WRONG)
def test_nearly_certain_tokens(mode, strategy):
    """What is left of 1 is an exponential of up to 44 nats, whose argument is a rounded product."""
    problem = certain(211)
    with computing(mode), sanitize():
        assert not broken(off_orpo(problem, strategy, "triton"))
        if strategy != "chunked":
            assert not broken(off_log_probs(problem, strategy, "triton"))


@pytest.mark.parametrize(("mode", "seed"), [("approximate", 0), ("approximate", 2), ("worst+", 0), ("worst-", 0)])
def test_the_self_check_passes_healthy_kernels(mode, seed):
    """Or every first call on a GPU would refuse them."""
    with sanitize(arithmetic=mode, seed=seed, races=False):
        assert mismatches(TritonKernels, torch.bfloat16, torch.device("cpu")) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equivalence_with_sums_that_are_cut(strategy, dtype):
    for frozen in (False, True):
        case = Case(dtype, frozen=frozen, bias=True, weights=True, options=RICH)
        with computing("truncating"), sanitize():
            assert not broken_rules(case, strategy, "triton")


def test_cut_sums_bias_the_log_probs_of_unlikely_labels():
    """At the width of a model. What is promised on a CPU, 1e-4 nats, does not hold; the bound of a GPU does."""
    width, largest = 4096, 25
    x, w = problem(width, largest, vocab=192)
    logits = x.double() @ w.double().t()
    exact = logits.log_softmax(-1)
    order = logits.argsort(-1)
    off = {}
    for mode in ("exact", "truncating"):
        for kind, labels in (("unlikely", order[:, :1]), ("likely", order[:, -1:])):
            with computing(mode), sanitize(races=False):
                got = dk.fused_token_logps(x[:, None], w, labels, strategy="streaming", backend="triton")
            off[mode, kind] = got.double() - exact.gather(1, labels)
    largest_logit = float(logits.abs().max())
    assert off["exact", "unlikely"].abs().max() < log_prob_error(width, largest_logit, on_a_gpu=False)
    unlikely = off["truncating", "unlikely"]
    assert 1e-4 < unlikely.abs().max() < log_prob_error(width, largest_logit, on_a_gpu=True)
    assert unlikely.min() > 0, "logits shrink, so an unlikely label comes out too likely"
    assert off["truncating", "likely"].abs().max() < 1e-4


def test_the_page_has_what_the_model_gives():
    x, w = problem(4096, 25)
    sums = truncating_product(x.float().numpy(), w.float().numpy().T, np.zeros((16, 8192), np.float32), HOPPER)
    found = errors(torch.from_numpy(sums), x.double() @ w.double().t())
    for label in ("likely", "unlikely"):
        (line,) = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| 4096 | 25 | {label} |")]
        assert line.split(" | ")[4] == str(found[label])


# --- the softcap ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["exact", *WRONG])
@pytest.mark.parametrize("strategy", ["chunked", "recompute", "streaming"])
def test_a_saturated_softcap_has_no_gradient(strategy, mode):
    """Logits beyond reach of the cap are the cap itself, and their derivative is 0 and not a rounding error."""
    hidden = torch.ones(4, 3, 8, requires_grad=True)
    logits = torch.linspace(400.0, 900.0, 50) * (-1.0) ** torch.arange(50)
    weight = (logits / 8)[:, None].expand(50, 8).contiguous().requires_grad_()
    labels = torch.randint(50, (4, 3), generator=torch.Generator().manual_seed(0))
    name, scratch = STRATEGIES[strategy]
    how = {"strategy": name, "scratch_bytes": scratch, "backend": "triton"}
    with computing(mode), sanitize():
        out = dk.fused_dpo_loss(hidden, weight, labels, softcap=30.0, reference_free=True, **how)
        grads = torch.autograd.grad(out.loss, (hidden, weight))
    assert not grads[1].any()
    assert not grads[0].any()


@pytest.mark.parametrize("mode", ["exact", *WRONG])
def test_saturated_logits_are_the_cap(mode):
    head = Head(torch.tensor([[20.0], [-20.0], [1e4], [-1e4], [float("inf")]]), softcap=2.0)
    tile = torch.empty(1, 5)
    with computing(mode), sanitize():
        TritonKernels(torch.float32, 2**20).project(torch.ones(1, 1), head, 0, tile)
    assert tile.tolist() == [[2.0, -2.0, 2.0, -2.0, 2.0]]
