"""What docs/sparse-gradient.md shows of measurements: ``python -m benchmarks.sparse_page`` writes tables and pictures.

They come from the results of ``benchmarks.sparse``, ``benchmarks.sparse_training`` and ``benchmarks.sparse_trl``. A
test compares.
"""

import json
import math
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import sparse, sparse_training, sparse_trl
from benchmarks.plots import COLOURS, DPI

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "sparse-gradient.md"
IMAGES = ROOT / "docs" / "images"
BLUE, ORANGE, GREY = COLOURS["ours"], COLOURS["full logits"], COLOURS["floor"]
GEMMS = "three GEMMs"
BAR, BAR_OF_EQUAL = 0.60, 1.10  # most of the GEMMs with real logits, and most of the dense step with equal ones
Results = dict[str, Any]


def errors(found: Results) -> str:
    """The table of kept entries and of errors by threshold."""
    table = []
    for tau in sparse.TAUS:
        mean, most = found["kept"][f"{tau:g}"]
        ways = [found["errors"][f"{way} {tau:g}"] for way in ("sampled", "truncated")]
        cells = [_power(tau), f"{mean:.0f}, {most:.0f}", *(_short(way[what]) for way in ways for what in ("dX", "dW"))]
        table.append(f"| {' | '.join(cells)} |")
    rounded = [_short(found["errors"]["bfloat16 logits"][what]) for what in ("dX", "dW")]
    vocab, width = found["shape"]
    kept = "entries kept a token, mean and 90th percentile"
    return "\n".join(
        [
            f"Measured on SmolLM2-135M-Instruct (V = {vocab}, H = {width}) with {found['tokens']} tokens of movie "
            f"reviews, float32: relative L2 error of the gradients of all log-probs, mean of {found['seeds']} seeds "
            f"([raw numbers](../benchmarks/results/{sparse.RESULTS.name})). `python -m benchmarks.sparse` measures, "
            "and `python -m benchmarks.sparse_page` writes what follows.",
            "",
            f"| | {kept} | error of dX, sampled | dW, sampled | dX, truncated | dW, truncated |",
            "|---|---|---|---|---|---|",
            *table,
            "",
            f"For scale: exact gradients of logits that are rounded to bfloat16 are off by {' and '.join(rounded)}.",
            "",
            "![Errors of the gradients by threshold, and time by error](images/sparse-tau.png)",
        ]
    )


def times(found: Results) -> str:
    """The table of times over the three bare GEMMs."""
    cases = ratios_of_cases(found)
    table = [
        f"| {name} | {dense:.2f} | {sample:.2f} | {sample / dense:.2f} |" for name, (dense, sample) in cases.items()
    ]
    width = found["shape"][1]
    of_tau = found["seconds"]["float32"]
    others = [tau for tau in sparse.TAUS if tau != sparse.TAU]
    ratios = [f"{of_tau[f'sparse {tau:g}'] / of_tau[GEMMS]:.2f}" for tau in others]
    load = f"{found['load_before']:.0f} before and {found['load_after']:.0f} after the run"
    return "\n".join(
        [
            "A step of DPO with these tokens, forward and backward, over the three bare GEMMs in the same run. The "
            f"backend is `cpp`, with {found['threads']} thread of {found['machine']}, torch {found['torch']}, "
            f"{found['date']}.",
            f"**The machine was busy with other work**, at a load average of {load}. So these are "
            f"ratios of CPU time, each of the least of {found['tries']} rounds:",
            "",
            f"| | dense | sparse, {_power(sparse.TAU)} | sparse / dense |",
            "|---|---|---|---|",
            *table,
            "",
            f"The bars are {BAR:.2f} of the GEMMs with the real logits and {BAR_OF_EQUAL:.2f} of the dense step with "
            f"equal ones. {_verdict(misses(cases))}",
            "",
            f"With H = {width} and float32, `tau` of {_listed([_power(tau, '`{}`') for tau in others])} "
            f"takes {_listed(ratios)}.",
        ]
    )


def ratios_of_cases(found: Results) -> dict[str, tuple[float, float]]:
    """Return the times of the dense and of the sparse step over the three bare GEMMs, by case."""
    return {
        _label(name, found["shape"][1]): (
            seconds["dense"] / seconds[GEMMS],
            seconds[f"sparse {sparse.TAU:g}"] / seconds[GEMMS],
        )
        for name, seconds in found["seconds"].items()
    }


def _label(name: str, width: int) -> str:
    """Return the name of a case with its H, which the results leave out where it is the model's own."""
    dtype, *rest = name.split(", ")
    own = [] if any("H=" in part for part in rest) else [f"H={width}"]
    return ", ".join([dtype, *own, *rest]).replace("=", " = ")


def misses(cases: dict[str, tuple[float, float]]) -> list[str]:
    """Return the cases that miss their bar, each with its number."""
    missed = []
    for name, (dense, sample) in cases.items():
        number, bar = (sample / dense, BAR_OF_EQUAL) if name.endswith(sparse.EQUAL) else (sample, BAR)
        if number > bar:
            missed.append(f"{name} ({number:.2f})")
    return missed


def _verdict(missed: list[str]) -> str:
    return f"**Missed by** {'; '.join(missed)}." if missed else "All of these cases meet them."


def rows(found: Results) -> str:
    """The table of rows of the head that a sample reaches."""
    vocab, reached = found["shape"][0], found["reached"]
    counts = list(next(iter(reached.values())))
    table = [
        f"| {_power(tau)} | " + " | ".join(f"{100 * reached[f'{tau:g}'][n] / vocab:.0f} %" for n in counts) + " |"
        for tau in sparse.TAUS
    ]
    return "\n".join(
        [
            f"| rows reached, of {vocab} | " + " | ".join(f"{n} tokens" for n in counts) + " |",
            "|---" * (len(counts) + 1) + "|",
            *table,
        ]
    )


def training(found: Results) -> str:
    """What the curves of the demo's training say."""
    return "\n".join(
        [
            f"{found['model']} was trained on {found['pairs']} of the demo's pairs: {found['steps']} steps, "
            f"AdamW, {_power(found['tau'])}, and another seed at each step. Runs of one order see the same batches. "
            f"`python -m benchmarks.sparse_training {_asked(found, sparse_training.ASKED)}` trains "
            f"([raw numbers](../benchmarks/results/{sparse_training.RESULTS.name})).",
            "",
            "![Losses of the training with dense and with sparse gradients](images/sparse-training.png)",
            "",
            _apart(found),
        ]
    )


def trl(found: Results) -> str:
    """What the curves of the TRL example's training say."""
    return "\n".join(
        [
            "The same with [`FusedDPOTrainer`](integrations/trl.md#sparse-gradients): "
            f"`python -m examples.trl_dpo --real` does {found['steps']} steps of {found['batch']} pairs, TRL "
            f"{found['trl']}. Its learning rate begins at {found['learning_rate']:g} and falls to 0. The trainer's "
            f"seed sets the order of the pairs. `python -m benchmarks.sparse_trl {_asked(found, sparse_trl.SIZES)}` "
            f"trains ([raw numbers](../benchmarks/results/{sparse_trl.RESULTS.name})).",
            "",
            "![Losses of TRL's training with dense and with sparse gradients](images/sparse-trl.png)",
            "",
            _apart(found),
        ]
    )


def _asked(found: Results, names: tuple[str, ...]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {found[name]}" for name in names)


def _apart(found: Results) -> str:
    """How far apart the held-out losses of two runs are."""
    apart = differences(found)
    own, orders = (_short(apart[name]["held_out_loss"]) for name in ("sparse and dense", "two orders"))
    return (
        f"The loss of {found['held_out']} held-out pairs differs by {own} between sparse and dense gradients of "
        "the same order, root mean square over the evaluations. Between two orders with dense gradients it differs "
        f"by {orders}."
    )


def differences(found: Results) -> dict[str, dict[str, float]]:
    """Return root mean square differences of curves: between kinds of gradient, and between orders of the batches."""
    runs = {(run["gradient"], run["order"]): run for run in found["runs"]}
    orders = sorted({order for _, order in runs})
    pairs = {
        "sparse and dense": [
            (run, runs["dense", order]) for (gradient, order), run in runs.items() if gradient == "sparse"
        ],
        "two orders": [(runs["dense", one], runs["dense", other]) for one in orders for other in orders if one < other],
    }
    return {
        name: {curve: _rms([(one[curve], other[curve]) for one, other in each]) for curve in sparse_training.CURVES}
        for name, each in pairs.items()
    }


def _rms(curves: list[tuple[list[float], list[float]]]) -> float:
    return math.sqrt(fmean((a - b) ** 2 for one, other in curves for a, b in zip(one, other, strict=True)))


SECTIONS = {"errors": errors, "times": times, "rows": rows, "training": training, "trl": trl}
SOURCES = {"training": sparse_training, "trl": sparse_trl}  # of sections and pictures that are not from ``sparse``
PICTURES = ("tau", *SOURCES)


def sections() -> dict[str, str]:
    """Return the page's sections, made from the results."""
    return {name: make(results_of(name)) for name, make in SECTIONS.items()}


def results_of(name: str) -> Results:
    """Return the results that a section or a picture shows."""
    found: Results = json.loads(SOURCES.get(name, sparse).RESULTS.read_text("utf-8"))
    return found


def with_sections(text: str, made: dict[str, str]) -> str:
    """Return the text of the page with what stands between its marks replaced."""
    for name, section in made.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{section}\n{end}{rest.partition(end)[2]}"
    return text


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw_sweep(found: Results) -> Figure:
    """Errors by threshold, and the time of a step by the error of dX."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for way, colour in (("sampled", BLUE), ("truncated", ORANGE)):
        for what, style in (("dX", "o-"), ("dW", "s--")):
            values = [found["errors"][f"{way} {tau:g}"][what] for tau in sparse.TAUS]
            left.plot(sparse.TAUS, values, style, color=colour, label=f"{what}, {way}")
    for what, style in (("dX", "-"), ("dW", "--")):
        value = found["errors"]["bfloat16 logits"][what]
        left.axhline(value, color=GREY, linestyle=style, label=f"{what}, bfloat16 logits")
    left.set_xscale("log", base=2)
    left.set(xlabel="tau", ylabel="relative L2 error", yscale="log")
    left.legend(fontsize=7, ncols=2)
    seconds = found["seconds"]["float32"]
    for tau in sparse.TAUS:
        place = found["errors"][f"sampled {tau:g}"]["dX"], seconds[f"sparse {tau:g}"] / seconds[GEMMS]
        right.plot(*place, "o", color=BLUE, label="sampled" if tau == sparse.TAUS[0] else None)
        right.annotate(_power(tau, "${}$", "2^{{{}}}"), place, textcoords="offset points", xytext=(4, 5), fontsize=8)
        at = found["errors"][f"truncated {tau:g}"]["dX"]
        right.axvline(
            at, ymax=0.06, color=ORANGE, label="truncated, time not measured" if tau == sparse.TAUS[0] else None
        )
    right.axvline(found["errors"]["bfloat16 logits"]["dX"], color=GREY, label="bfloat16 logits")
    right.axhline(seconds["dense"] / seconds[GEMMS], color=BLUE, linestyle=":", label="dense gradient")
    right.set(xlabel="relative L2 error of dX", ylabel="CPU time / three bare GEMMs", xscale="log")
    right.set_ylim(0, 1.4)  # room for the legend
    right.legend(fontsize=7)
    _plain(left, right)
    return figure


def draw_training(found: Results) -> Figure:
    """Losses of batches, and of held-out pairs, by step."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    every = found["eval_every"]
    for run in found["runs"]:
        sampled, style = run["gradient"] == "sparse", "-" if run["order"] == 0 else "--"
        form = {"color": BLUE, "linewidth": 1} if sampled else {"color": ORANGE, "linewidth": 4, "alpha": 0.45}
        label = f"{run['gradient']}, order {run['order']}"
        left.plot(range(1, len(run["loss"]) + 1), run["loss"], style, label=label, **form)
        steps = [min(every * (at + 1), found["steps"]) for at in range(len(run["held_out_loss"]))]
        right.plot(steps, run["held_out_loss"], f"o{style}", markersize=3, label=label, **form)
    left.set(xlabel="step", ylabel="loss of the batch")
    right.set(xlabel="step", ylabel=f"loss of {found['held_out']} held-out pairs")
    right.legend(fontsize=8)
    _plain(left, right)
    return figure


def _plain(*axes: Axes) -> None:
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)


def _power(tau: float, form: str = "`tau = {}`", power: str = "2**{}") -> str:
    return form.format(power.format(round(math.log2(tau))))


def _short(number: float) -> str:
    """Return a number as 1.2e-3."""
    return re.sub(r"e([+-])0", r"e\1", f"{number:.1e}")


def _listed(parts: list[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def main() -> None:
    """Rewrite the page's sections and its pictures."""
    PAGE.write_text(with_sections(PAGE.read_text("utf-8"), sections()), encoding="utf-8")
    for name in PICTURES:
        figure = (draw_training if name in SOURCES else draw_sweep)(results_of(name))
        figure.savefig(IMAGES / f"sparse-{name}.png", dpi=DPI, metadata={"Software": None})
        pyplot.close(figure)


if __name__ == "__main__":
    main()
