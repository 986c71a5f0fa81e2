"""PNG plots of the training: loss, reward margin and preference accuracy over the steps."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from demo.train import History, Metrics

# From the palette of Okabe and Ito, which stays apart under every kind of colour blindness.
BLUE, ORANGE = "#0072B2", "#D55E00"
WINDOW = 5

PLOTS = {
    "loss": "DPO loss",
    "margin": "reward margin (chosen - rejected)",
    "accuracy": "preference accuracy",
}


def plot_history(history: History, folder: Path, title: str) -> list[Path]:
    """Write one PNG for each of PLOTS into `folder` and return their paths."""
    return [_plot(history, name, label, folder / f"{name}.png", title) for name, label in PLOTS.items()]


def _plot(history: History, name: str, label: str, path: Path, title: str) -> Path:
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps, values = _series(history.steps, name)
    if steps:
        axes.plot(steps, values, color=BLUE, alpha=0.3, linewidth=1, label="training batch")
        axes.plot(steps, _trailing_mean(values), color=BLUE, linewidth=2, label=f"training, mean of {WINDOW} steps")
    steps, values = _series(history.evaluations, name)
    if steps:
        pairs = history.evaluations[0].pairs
        axes.plot(steps, values, "o--", color=ORANGE, linewidth=2, markersize=7, label=f"held out, {pairs} pairs")
    if name == "accuracy":
        axes.set_ylim(-0.03, 1.03)
        axes.axhline(0.5, color="0.6", linewidth=1, linestyle=":", label="chance")
    axes.set(xlabel="training step", ylabel=label, title=title)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(path)
    return path


def _series(metrics: Sequence[Metrics], name: str) -> tuple[list[int], list[float]]:
    return [entry.step for entry in metrics], [getattr(entry, name) for entry in metrics]


def _trailing_mean(values: Sequence[float]) -> list[float]:
    windows = (values[max(0, end - WINDOW) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]
