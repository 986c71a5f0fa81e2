"""Measurements of sparse gradients: how errors and rows are counted, and that the page shows what was measured."""

import itertools
import json

import pytest
import torch

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from matplotlib import pyplot

from benchmarks import sparse, sparse_page, sparse_training, sparse_trl
from demo.train import History, Metrics


def material(width=6, vocab=300):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, vocab, (4, 7), generator=g)
    labels[:, :2] = -100
    hidden, weight = torch.randn(4, 7, width, generator=g), 2 * torch.randn(vocab, width, generator=g)
    return sparse.Material(hidden, weight, labels)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr("dpo_kernels.inputs.notices.warn_once", lambda message: None)
    monkeypatch.setattr("dpo_kernels.kernels.torch_kernels.MOST_SAMPLED", 1.0)


# --- what is measured -------------------------------------------------------------------------------------------------


def test_the_truth_of_the_errors_is_the_dense_gradient():
    one = material()
    with torch.no_grad():
        truth = sparse.from_logits(one, lambda z: z.softmax(dim=1))
    for found, wanted in zip(sparse.gradients(one), truth, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_smaller_thresholds_and_no_truncation_have_smaller_errors():
    found = sparse.errors(material())
    for what in ("dX", "dW"):
        sampled, truncated = (
            [found[f"{way} {tau:g}"][what] for tau in sparse.TAUS] for way in ("sampled", "truncated")
        )
        assert sampled == sorted(sampled, reverse=True)
        assert truncated == sorted(truncated, reverse=True)
        assert 0 < sampled[0] < truncated[0]
        assert 1e-4 < found["bfloat16 logits"][what] < 0.1


def test_kept_entries_and_reached_rows_are_counted():
    flat = material().flat()
    mean, most = sparse.kept_entries(flat, 2.0**-8)  # 300 entries with p = 1/300 < tau, and all sums are 256
    assert (mean, most) == pytest.approx((256, 256), rel=1e-3)
    one = material()
    assert sparse.reached_rows(one, 1e-9) == 300
    assert sparse.reached_rows(one.first(1), 1.0) < sparse.reached_rows(one, 2.0**-4) < 300
    assert sparse.reached_rows(one.first(1), 1.0) >= one.labels[0, 2:].unique().numel()


def test_a_wider_space_has_the_same_logits():
    one = material()
    wide = one.widened(16)
    assert wide.hidden.shape[-1] == 16
    torch.testing.assert_close(wide.hidden @ wide.weight.T, one.hidden @ one.weight.T, rtol=1e-4, atol=1e-4)


def test_every_way_is_timed():
    found = sparse.seconds(material(), 1, (2.0**-8, 2.0**-4))
    assert list(found) == ["three GEMMs", "dense", "sparse 0.00390625", "sparse 0.0625"]
    assert all(0 <= taken < 60 for taken in found.values())


def test_both_dtypes_and_widths_are_timed_with_real_and_with_equal_logits(monkeypatch):
    monkeypatch.setattr(sparse, "WIDER", 16)
    one = material()
    logits = one.hidden @ one.weight.T
    found = list(sparse.cases(one))
    assert [name for name, _ in found] == [
        f"{dtype}{width}{bad}"
        for dtype, width, bad in itertools.product(("float32", "bfloat16"), ("", ", H=16"), ("", ", equal logits"))
    ]
    for name, case in found:
        kind, width = getattr(torch, name.split(",")[0]), 16 if "H=16" in name else 6
        assert {case.hidden.dtype, case.weight.dtype} == {kind}
        assert case.hidden.shape[-1] == case.weight.shape[-1] == width
        wanted = torch.zeros_like(logits) if "equal" in name else logits
        off = (case.hidden.float() @ case.weight.float().T - wanted).norm() / logits.norm()
        assert off < (1e-5 if kind == torch.float32 else 1e-2)


def test_each_wanted_run_is_trained_once():
    def one(gradient, order):
        return {curve: [float(len(gradient)), float(order)] for curve in sparse_training.CURVES}

    *_, last = sparse_training.each_run(one, [("dense", 0), ("sparse", 2)])
    kinds = [(run["gradient"], run["order"], run["held_out_loss"]) for run in last]
    assert kinds == [("dense", 0, [5.0, 0.0]), ("sparse", 2, [6.0, 2.0])]


def test_runs_of_the_trl_example_differ_in_gradient_and_seed_only(monkeypatch, tmp_path):
    pytest.importorskip("datasets", reason="datasets is not installed")
    pytest.importorskip("trl", reason="trl is not installed")
    from examples import trl_dpo

    asked, out = [], tmp_path / "found.json"

    def run_example(options):
        asked.append(options)
        return {name: [float(len(asked))] for name in ("losses", "held_out_losses", "held_out_margins")}

    monkeypatch.setattr(sparse_trl, "run_example", run_example)
    sparse_trl.main(["--steps", "3", "--out", str(out)])
    for options in asked:
        trl_dpo.parse(["--real", *options])  # which ends the process if it does not know an option
    common = set.intersection(*map(set, asked))
    assert {"--steps=3", "--precompute"} <= common
    assert [[option for option in options if option not in common] for options in asked] == [
        ["--gradient=dense", "--seed=0"],
        ["--gradient=sparse", "--seed=0"],
        ["--gradient=dense", "--seed=1"],
    ]
    runs = json.loads(out.read_text("utf-8"))["runs"]
    assert [f"{run['gradient']} {run['order']}" for run in runs] == ["dense 0", "sparse 0", "dense 1"]
    assert [run[curve] for run in runs for curve in sparse_training.CURVES] == [
        [float(number)] for number in (1, 2, 3) for _ in range(3)
    ]


def test_curves_are_those_of_the_history():
    history = History([Metrics(1, 0.7, 0.0, 0.5, 4), Metrics(2, 0.6, 0.1, 0.5, 4)], [Metrics(2, 0.65, 0.2, 0.5, 8)])
    assert sparse_training._curves(history) == {
        "loss": [0.7, 0.6],
        "held_out_loss": [0.65],
        "held_out_margin": [0.2],
    }


# --- what is shown ----------------------------------------------------------------------------------------------------


def runs(**losses):
    """Runs whose curves are all the same list."""
    return {
        "runs": [
            {"gradient": name[:-1], "order": int(name[-1]), **dict.fromkeys(sparse_training.CURVES, values)}
            for name, values in losses.items()
        ]
    }


def test_differences_of_curves_by_hand():
    found = sparse_page.differences(runs(dense0=[1.0, 2.0], sparse0=[1.0, 2.5], dense1=[4.0, 6.0], sparse1=[4.5, 6.0]))
    assert found["sparse and dense"]["loss"] == pytest.approx((2 * 0.25 / 4) ** 0.5)
    assert found["two orders"]["held_out_loss"] == pytest.approx((25 / 2) ** 0.5)
    fewer = sparse_page.differences(runs(dense0=[1.0, 2.0], sparse0=[1.0, 2.5], dense1=[4.0, 6.0]))
    assert fewer["sparse and dense"]["loss"] == pytest.approx((0.25 / 2) ** 0.5)
    assert fewer["two orders"] == found["two orders"]


def test_bars_are_of_the_gemms_with_real_logits_and_of_the_dense_step_with_equal_ones():
    within = {"float32, H = 6": (1.5, 0.6), "float32, H = 6, equal logits": (2.0, 2.2)}
    assert sparse_page.misses(within) == []
    beyond = {"float32, H = 6": (0.5, 0.61), "float32, H = 6, equal logits": (0.5, 0.56)}
    assert sparse_page.misses(beyond) == ["float32, H = 6 (0.61)", "float32, H = 6, equal logits (1.12)"]


def test_ratios_are_over_the_gemms_and_a_missed_bar_is_told():
    found = sparse_page.results_of("times")
    assert len(sparse_page.ratios_of_cases(found)) == len(found["seconds"])
    found["seconds"]["bfloat16"] = {"three GEMMs": 2.0, "dense": 3.0, f"sparse {sparse.TAU:g}": 1.4}
    found["seconds"]["float32, H=2048, equal logits"] = {
        "three GEMMs": 2.0,
        "dense": 2.0,
        f"sparse {sparse.TAU:g}": 3.0,
    }
    cases = sparse_page.ratios_of_cases(found)
    assert cases["bfloat16, H = 576"] == (1.5, 0.7)
    assert cases["float32, H = 2048, equal logits"] == (1.0, 1.5)
    said = sparse_page.times(found)
    assert "**Missed by**" in said
    assert {"bfloat16, H = 576 (0.70)", "float32, H = 2048, equal logits (1.50)"} <= set(sparse_page.misses(cases))
    assert "bfloat16, H = 576 (0.70)" in said


def test_the_page_shows_the_results():
    page = sparse_page.PAGE.read_text("utf-8")
    made = sparse_page.sections()
    assert sparse_page.with_sections(page, made) == page
    for name, section in made.items():
        assert page.count(f"<!-- {name}: begin -->") == page.count(f"<!-- {name}: end -->") == 1
        assert section in page


def test_the_results_hold_what_the_page_promises():
    """An unbiased gradient at 2**-12 is closer than that of bfloat16 logits, and truncation is further away."""
    found = json.loads(sparse.RESULTS.read_text("utf-8"))
    assert found["tokens"] >= 2048
    for what in ("dX", "dW"):
        sampled, truncated = (found["errors"][f"{way} {sparse.TAU:g}"][what] for way in ("sampled", "truncated"))
        assert sampled <= found["errors"]["bfloat16 logits"][what] < truncated


@pytest.mark.parametrize("name", sparse_page.SOURCES)
def test_the_training_changes_less_than_by_another_order(name):
    apart = sparse_page.differences(sparse_page.results_of(name))
    for curve in sparse_training.CURVES:
        assert 0 < apart["sparse and dense"][curve] < apart["two orders"][curve]


def test_pictures_are_drawn_from_the_results():
    swept = sparse_page.draw_sweep(sparse_page.results_of("tau"))
    trained = [sparse_page.draw_training(sparse_page.results_of(name)) for name in sparse_page.SOURCES]
    try:
        left, right = swept.axes
        assert len(left.get_lines()) == 6
        assert len([line for line in right.get_lines() if line.get_marker() == "o"]) == len(sparse.TAUS)
        assert all(
            len(axes.get_lines()) == count
            for count, figure in zip((4, 3), trained, strict=True)
            for axes in figure.axes
        )
    finally:
        for figure in (swept, *trained):
            pyplot.close(figure)
    for name in sparse_page.PICTURES:
        assert (sparse_page.IMAGES / f"sparse-{name}.png").stat().st_size > 10_000
