"""The pictures of a report page. Okabe–Ito colours, told apart by marker too; every label is in words."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks import model, store, tables
from benchmarks.cases import Case
from benchmarks.tables import Line

# Okabe & Ito, "Color Universal Design" (2008).
COLOURS = {
    "ours": "#0072B2",
    "full logits": "#D55E00",
    "TRL": "#009E73",
    "Liger": "#CC79A7",
    "cut-cross-entropy": "#E69F00",
    "torch linear_cross_entropy": "#56B4E9",
    "quack": "#000000",
    "floor": "#999999",
}
MARKERS = dict(zip(COLOURS, "osD^vP*x", strict=True))
MAIN = {"cpu", "gpu-models"}  # groups of cases that differ in nothing but shape, dtype and head
DPI = 110
MIB = 2**20
OVERVIEW = ("full logits", "TRL", "Liger", "ours")  # families in the README's picture
# Settings that draw text, axes and ticks.
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
Point = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class Measured:
    """A case and its shown rows."""

    case: Case
    lines: list[Line]
    results: dict[str, Any]
    gpu: model.Gpu | None = None  # where the static model knows the machine

    def best(self, family: str) -> Line | None:
        """The fastest row of a family that has a time."""
        timed = [one for one in self.lines if one.family == family and one.seconds is not None]
        return min(timed, key=lambda one: one.seconds or 0.0) if timed else None


def draw(cases: Sequence[Measured], folder: Path, slug: str, *, save: bool) -> list[tuple[str, str, str]]:
    """Every picture that the results allow: (file name, title, description). Without ``save`` only says which."""
    pictures: list[tuple[str, str, str, Callable[[], Figure | None]]] = [
        (
            "over-floor",
            "Time over the floor",
            "Fastest row of each family over the bare GEMMs of the same case; whiskers are 20th to 80th percentiles "
            "of the rounds. 1 is the floor; below it are those that compute 16-bit operands in float32 where the "
            "processor has no 16-bit GEMM.",
            lambda: _by_shape(cases, lambda m, family: _over_floor(m.best(family)), "time / floor", with_ours=True),
        ),
        (
            "speed-up",
            "Speed-up over each peer",
            "Time of the peer's best row over that of ours, round by round, with 20th to 80th percentiles. Right of 1 "
            "we are faster.",
            lambda: _by_shape(cases, _speed_up, "peer's time / ours", with_ours=False),
        ),
        (
            "memory",
            "Peak memory by N",
            "Peak extra memory of forward and backward, without the gradients that stay.",
            lambda: _by_tokens(
                cases, lambda one: None if one.extra_bytes is None else max(one.extra_bytes / MIB, 1.0), "MiB"
            ),
        ),
        (
            "scaling",
            "Scaling in N",
            "Time over the floor as the number of scored tokens grows.",
            lambda: _by_tokens(cases, lambda one: one.over_floor, "time / floor", predicted=True),
        ),
        (
            "accuracy",
            "Accuracy",
            "Relative L2 error of the gradient of the hidden states and largest error of a sequence's log-prob (nats) "
            "against float64, one mark per case.",
            lambda: _accuracy(cases),
        ),
    ]
    drawn = []
    for name, title, about, make in pictures:
        figure = make()
        if figure is None:
            continue
        path = folder / f"{slug}-{name}.png"
        if save:
            figure.savefig(path, dpi=DPI, metadata={"Software": None})
        pyplot.close(figure)
        drawn.append((path.name, title, about))
    return drawn


def overview(cases: Sequence[Measured], folder: Path, slug: str) -> list[Path]:
    """The README's picture, for light and for dark pages: time over the floor, and extra memory, by shape."""
    written = []
    with pyplot.rc_context({"svg.hashsalt": slug, "font.size": 9}):
        for theme, ink in (("light", "#1f2328"), ("dark", "#e6edf3")):
            with pyplot.rc_context(dict.fromkeys(INKED, ink)):
                figure = _overview(cases, ink)
            path = folder / f"{slug}-{theme}.svg"
            figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
            pyplot.close(figure)
            written.append(path)
    return written


def _overview(cases: Sequence[Measured], ink: str) -> Figure:
    """Two panels of bars: a group for each shape, a bar for each family."""
    cases = sorted(cases, key=lambda m: (m.case.vocab, m.case.hidden))
    panels: list[tuple[str, Callable[[Line], float | None]]] = [
        ("time / bare GEMMs", lambda one: one.over_floor),
        ("extra memory, GiB", lambda one: None if one.extra_bytes is None else one.extra_bytes / 2**30),
    ]
    figure, axes = pyplot.subplots(1, 2, figsize=(8.4, 2.9), layout="constrained")
    width = 0.8 / len(OVERVIEW)
    for ax, (label, value) in zip(axes, panels, strict=True):
        for at, family in enumerate(OVERVIEW):
            best = [m.best(family) for m in cases]
            heights = [(value(one) if one else None) or 0.0 for one in best]
            places = [place + (at - (len(OVERVIEW) - 1) / 2) * width for place in range(len(cases))]
            label_of_bar = f"{family}, fastest variant" if family == "full logits" else family
            ax.bar(places, heights, width * 0.92, color=COLOURS[family], label=label_of_bar)
        ax.set_xticks(range(len(cases)), [f"H={m.case.hidden}\nV={m.case.vocab}" for m in cases])
        ax.set_ylabel(label)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].axhline(1.0, color=ink, linewidth=0.8, linestyle="--")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(OVERVIEW), frameon=False)
    return figure


def _over_floor(one: Line | None) -> Point | None:
    if one is None or one.over_floor is None or one.over_low is None or one.over_high is None:
        return None
    return one.over_floor, one.over_low, one.over_high


def _speed_up(measured: Measured, family: str) -> Point | None:
    ours, peer = measured.best("ours"), measured.best(family)
    if ours is None or peer is None:
        return None
    rows = measured.results["rows"]
    ratios = store.ratios(rows[peer.provider], rows[ours.provider])
    if not ratios:
        return None
    return median(ratios), store.quantile(ratios, 0.2), store.quantile(ratios, 0.8)


def _by_shape(
    cases: Sequence[Measured], value: Callable[[Measured, str], Point | None], label: str, *, with_ours: bool
) -> Figure | None:
    """A dot per family and shape, a panel per dtype and head; the main cases without masks only."""
    plain = [m for m in cases if _is_plain(m.case) and MAIN & set(m.case.groups)]
    panels: dict[tuple[str, bool], list[Measured]] = {}
    for m in plain:
        panels.setdefault((m.case.dtype, m.case.trainable), []).append(m)
    families = [f for f in COLOURS if f != "floor" and (with_ours or f != "ours")]
    families = [f for f in families if any(value(m, f) for m in plain)]
    if not panels or not families:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    lengths = [len(found) for found in panels.values()]
    heights = [1.2 + 0.42 * max(lengths[row * columns : (row + 1) * columns]) for row in range(rows)]
    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(5.6 * columns + 0.8, sum(heights) + 0.8),
        squeeze=False,
        layout="constrained",
        sharex=True,
        height_ratios=heights,
    )
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, ((dtype, trainable), found) in zip(axes.flat, panels.items(), strict=False):
        found = sorted(found, key=lambda m: (m.case.tokens, m.case.vocab, m.case.hidden), reverse=True)
        for at, family in enumerate(families):
            shift = 0.62 * (at / max(1, len(families) - 1) - 0.5) if len(families) > 1 else 0.0
            _dots(ax, [value(m, family) for m in found], family, -shift)
        ax.axvline(1.0, color="#444444", linewidth=1, zorder=0)
        ax.set_yticks(range(len(found)), [_shape(m.case) for m in found])
        ax.set_ylim(-0.6, len(found) - 0.4)
        for at in range(len(found) - 1):
            ax.axhline(at + 0.5, color="#dddddd", linewidth=0.6, zorder=0)
        ax.set_title(f"{dtype}, {'trainable' if trainable else 'frozen'} head", fontsize=11)
        _log(ax, "x")
        ax.tick_params(labelbottom=True)
        ax.set_xlabel(label)
    _legend(figure, axes.flat[: len(panels)])
    return figure


def _dots(ax: Axes, points: Sequence[Point | None], family: str, shift: float) -> None:
    kept = [(at + shift, point) for at, point in enumerate(points) if point is not None]
    if not kept:
        return
    x = [point[0] for _, point in kept]
    spread = [[max(0.0, p[0] - p[1]) for _, p in kept], [max(0.0, p[2] - p[0]) for _, p in kept]]
    ax.errorbar(
        x,
        [y for y, _ in kept],
        xerr=spread,
        fmt=MARKERS[family],
        color=COLOURS[family],
        markersize=6,
        elinewidth=1,
        label=family,
    )


def _by_tokens(
    cases: Sequence[Measured], value: Callable[[Line], float | None], label: str, *, predicted: bool = False
) -> Figure | None:
    """A line per family over N, a panel per shape that was measured at three sizes or more."""
    series = {key: found for key, found in _series(cases).items() if len({m.case.tokens for m in found}) >= 3}
    if not series:
        return None
    columns = min(2, len(series))
    rows = -(-len(series) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(5.4 * columns + 0.8, 3.6 * rows + 0.7), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(series) :]:
        ax.set_visible(False)
    for ax, found in zip(axes.flat, series.values(), strict=False):
        found = list({m.case.tokens: m for m in reversed(found)}.values())  # the first of each N
        found.sort(key=lambda m: m.case.tokens)
        for family in COLOURS:
            best = [(m.case.tokens, m.best(family)) for m in found if family != "floor"]
            points = [(n, shown) for n, one in best if one is not None and (shown := value(one)) is not None]
            if points:
                ax.plot(*zip(*points, strict=True), marker=MARKERS[family], color=COLOURS[family], label=family)
        if predicted:
            _prediction(ax, found)
            ax.axhline(1.0, color="#444444", linewidth=1, zorder=0)
        _log(ax, "y")
        ax.set_xscale("log")
        ax.grid(axis="x", color="#dddddd", linewidth=0.6)
        ax.xaxis.set_minor_locator(NullLocator())
        tokens = sorted({m.case.tokens for m in found})
        ax.set_xticks(tokens, [_thousands(n) for n in tokens])
        ax.set_xlabel("scored tokens N")
        ax.set_ylabel(label)
        case = found[0].case
        head = "trainable" if case.trainable else "frozen"
        ax.set_title(f"H={case.hidden}, V={case.vocab}, {case.dtype}, {head} head", fontsize=11)
    _legend(figure, axes.flat[: len(series)])
    return figure


def _prediction(ax: Axes, found: Sequence[Measured]) -> None:
    """The static model's line for our chunked strategy, where the page's machine is one that it knows."""
    gpu = found[0].gpu
    if gpu is not None:
        points = [(m.case.tokens, model.predict(m.case, gpu, "chunked").over_floor) for m in found]
        ax.plot(*zip(*points, strict=True), color=COLOURS["ours"], linestyle=":", label="ours, predicted")


def _series(cases: Sequence[Measured]) -> dict[tuple[Any, ...], list[Measured]]:
    found: dict[tuple[Any, ...], list[Measured]] = {}
    for m in cases:
        if _is_plain(m.case):
            found.setdefault((m.case.hidden, m.case.vocab, m.case.dtype, m.case.trainable), []).append(m)
    return found


def _accuracy(cases: Sequence[Measured]) -> Figure | None:
    """Two panels, a line per family, a colour per dtype."""
    dtypes = sorted({m.case.dtype for m in cases}, reverse=True)
    tints = dict(zip(dtypes, ("#0072B2", "#D55E00", "#009E73"), strict=False))
    families = [
        f for f in COLOURS if f != "floor" and any(one.errors and one.family == f for m in cases for one in m.lines)
    ]
    if not families:
        return None
    size = (10.8, 1.6 + 0.5 * len(families))
    figure, axes = pyplot.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    for ax, name, label in zip(
        axes, ("dX", "logps"), ("relative L2 error of dX", "error of a sequence's log-prob, nats"), strict=True
    ):
        for at, family in enumerate(reversed(families)):
            for which, dtype in enumerate(dtypes):
                errors = [
                    max(one.errors[name], 1e-9)
                    for m in cases
                    if m.case.dtype == dtype
                    for one in m.lines
                    if one.family == family and name in one.errors
                ]
                height = [at + 0.16 * (which - 0.5 * (len(dtypes) - 1))] * len(errors)
                shape = "os^"[which]
                ax.scatter(errors, height, s=22, marker=shape, facecolors="none", edgecolors=tints[dtype], label=dtype)
        ax.set_yticks(range(len(families)), list(reversed(families)))
        ax.set_ylim(-0.5, len(families) - 0.5)
        ax.set_xscale("log")
        ax.grid(axis="x", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.set_xlabel(label)
    _legend(figure, axes)
    return figure


def _is_plain(case: Case) -> bool:
    masked = case.prompt or case.padding
    return (
        not masked and case.reference == "cached" and case.distribution == "peaked" and case.tokens / case.pairs <= 4096
    )


def _shape(case: Case) -> str:
    return f"N={_thousands(case.tokens)}  H={case.hidden}  V={case.vocab}"


def _thousands(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)


def _log(ax: Axes, which: str) -> None:
    axis = ax.xaxis if which == "x" else ax.yaxis
    (ax.set_xscale if which == "x" else ax.set_yscale)("log")
    low, high = ax.get_xlim() if which == "x" else ax.get_ylim()
    steps = {6: (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), 40: (1, 1.5, 2, 3, 5, 7), 1000: (1, 2, 5)}
    chosen = next((step for limit, step in steps.items() if high / low < limit), (1,))
    marks = [mark * 10.0**power for power in range(-3, 7) for mark in chosen]
    axis.set_ticks([mark for mark in marks if low <= mark <= high])
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    ax.grid(axis="x" if which == "x" else "y", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)


def _legend(figure: Figure, axes: Any) -> None:
    """One legend above all panels."""
    named: dict[str, Any] = {}
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=min(4, len(named)), frameon=False)


def measured(results: dict[str, Any], gpu: model.Gpu | None) -> Measured:
    """A case of a results file."""
    return Measured(tables.case_of(results), tables.lines(results), results, gpu)
