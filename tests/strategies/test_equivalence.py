"""Every strategy and backend against the float64 oracle, by the tolerance rule."""

import functools
import itertools

import pytest
import torch

from tests.cases import LAYOUTS, REFERENCES, RICH, STRATEGIES, Case, broken_rules
from tests.covers import cover
from tests.family import COUPLED, DTYPES, FAMILY, LOSSES, case_of, coupled
from tests.small import BACKENDS


@pytest.fixture(autouse=True)
def _quiet_shared_reference(monkeypatch):
    # These cases share a trainable head with the reference on purpose; the warning has its own test.
    monkeypatch.setattr("dpo_kernels.inputs.notices.warn_once", lambda message: None)


# The kinds of arithmetic: each is a path of its own, more so where the environment chooses it (test_extension.py).
KINDS = tuple(itertools.product(BACKENDS, DTYPES))
SWITCHES = {name: (False, True) for name in ("frozen", "bias", "weights", "rich")}


@functools.cache
def forms():
    """Rows in which any three factors meet, and four where a path may begin."""
    factors = {"kind": KINDS, "strategy": tuple(STRATEGIES), "layout": tuple(LAYOUTS), "reference": REFERENCES}
    return cover({**factors, **SWITCHES}, ("kind", "strategy", "frozen", "rich"), together=3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equivalence(dtype, strategy, backend):
    rows = [row for row in forms() if (row["kind"], row["strategy"]) == ((backend, dtype), strategy)]
    assert {row["layout"] for row in rows} == set(LAYOUTS)
    assert {row["reference"] for row in rows} == set(REFERENCES)
    broken = []
    for row in rows:
        facts = {name: row[name] for name in ("reference", "frozen", "bias", "weights")}
        case = Case(dtype, options=RICH if row["rich"] else {}, **facts, **LAYOUTS[row["layout"]])
        if rules := broken_rules(case, strategy, backend):
            broken.append((row, rules))
    assert not broken


def rows_of_a_loss(strategies=tuple(STRATEGIES), dtypes=(torch.float64, torch.bfloat16)):
    """Strategy, dtype and whether the head is frozen: any two of them meet."""
    return cover({"strategy": strategies, "dtype": dtypes, "frozen": (False, True)})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss, backend):
    for row in rows_of_a_loss(dtypes=(torch.float64, torch.float32, torch.bfloat16)):
        case = Case(row["dtype"], frozen=row["frozen"], weights=True, options=LOSSES[loss])
        assert not broken_rules(case, row["strategy"], backend), row


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", FAMILY)
def test_family(loss, backend):
    for row in rows_of_a_loss():
        assert not broken_rules(case_of(loss, row["dtype"], frozen=row["frozen"]), row["strategy"], backend), row


UNCUT = tuple(name for name in STRATEGIES if not name.startswith("chunked"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", COUPLED)
def test_coupled_family(loss, backend):
    for row in rows_of_a_loss(UNCUT):
        assert not broken_rules(case_of(loss, row["dtype"], frozen=row["frozen"]), row["strategy"], backend), row


@pytest.mark.parametrize("backend", BACKENDS)
def test_coupled_callable(backend):
    for row in rows_of_a_loss(UNCUT):
        case = Case(row["dtype"], frozen=row["frozen"], options={"loss_type": coupled})
        assert not broken_rules(case, row["strategy"], backend), row


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream(dtype, strategy, backend):
    """Upstream gradients multiply what was kept before the one rounding to the parameter's dtype."""
    factors = {"upstream": (1 / 3, 65536.0, -2.5e-3), "frozen": (False, True), "reduction": ("mean", "sum")}
    for row in cover(factors):
        case = Case(dtype, frozen=row["frozen"], bias=True, options={"reduction": row["reduction"]})
        assert not broken_rules(case, strategy, backend, row["upstream"]), row


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("strategy", "frozen"),
    # chunked refuses per-pair upstreams with a trainable head; test_plan.py shows it
    [(s, f) for s in STRATEGIES for f in (False, True) if f or not s.startswith("chunked")],
)
def test_reduction_none_with_strided_upstream(strategy, frozen, backend):
    upstream = torch.randn(3, 4, dtype=torch.float64)[:, 1]
    assert not upstream.is_contiguous()
    for dtype in DTYPES:
        case = Case(dtype, frozen=frozen, bias=True, weights=True, options={"reduction": "none"})
        assert not broken_rules(case, strategy, backend, upstream)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distribution_is_half_sure(dtype):
    inputs = Case(dtype).tensors()
    keep = inputs["labels"] != -100
    logits = inputs["hidden"].detach().double() @ inputs["weight"].detach().double().t()
    p = logits.softmax(-1).gather(-1, inputs["labels"].clamp(min=0)[..., None])[..., 0][keep]
    assert 0.1 < float(p.mean()) < 0.5
