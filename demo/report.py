"""What a run of the demo found: the record that fills up on the way, its table and its summary.json."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from demo.compare import Comparison
from demo.judge import Judgement
from demo.options import Options
from demo.train import History, Metrics

SHOWN_SAMPLES = 3
NOTHING = "-"


@dataclass
class Record:
    """Everything a run found so far; None where it has not come to it."""

    options: Options
    model: str | None = None
    note: str | None = None
    device: str | None = None
    threads: int | None = None
    thread_seconds: dict[int, float] = field(default_factory=dict)
    training_pairs: int | None = None
    history: History = field(default_factory=History)
    before: Metrics | None = None
    after: Metrics | None = None
    judged_before: Judgement | None = None
    judged_after: Judgement | None = None
    comparison: Comparison | None = None
    stage: str = "start"
    stage_seconds: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False


def write_summary(record: Record, path: Path) -> Path:
    """Write the record as JSON."""
    summary = asdict(record) | {"torch": torch.__version__}
    path.write_text(json.dumps(summary, indent=2, default=_jsonable) + "\n", encoding="utf-8")
    return path


def table(record: Record) -> str:
    """Return the closing table."""
    lines = [*_outcome_lines(record), ""]
    if record.comparison:
        lines += [*_comparison_lines(record.comparison), ""]
    for when, judged in (("before", record.judged_before), ("after", record.judged_after)):
        texts = judged.texts[:SHOWN_SAMPLES] if judged else []
        lines += [f"  sampled {when + ':':8}{' '.join(text.split())}" for text in texts]
    seconds = record.stage_seconds
    lines += [
        "",
        f"{sum(seconds.values()):.0f} s: " + ", ".join(f"{name} {s:.0f}" for name, s in seconds.items()),
    ]
    return "\n".join(lines)


def _outcome_lines(record: Record) -> list[str]:
    before, after = record.before, record.after
    judged = record.judged_before, record.judged_after
    pairs = f"{before.pairs} pairs" if before else "no pairs yet"
    if before and after and before.pairs != after.pairs:
        pairs += f" before, {after.pairs} after"
    lines = [
        f"{record.model or 'No model yet'} on {record.device or 'no device yet'}: {len(record.history.steps)} steps "
        f"of {record.options.batch} pairs, {record.options.loss} loss, beta {record.options.beta:g}",
        _row("", "before", "after"),
        _row(
            f"held-out preference accuracy ({pairs})",
            *(_metric(m, "accuracy", "{:.3f}") for m in (before, after)),
        ),
        _row("held-out reward margin", *(_metric(m, "margin", "{:+.3f}") for m in (before, after))),
        _row("held-out loss", *(_metric(m, "loss", "{:.4f}") for m in (before, after))),
        _row(
            f"judge's score (-1 to 1) of {record.options.samples} samples",
            *(f"{j.score:+.3f} ± {j.error:.3f}" if j else NOTHING for j in judged),
        ),
        _row("share of samples judged positive", *(_metric(j, "positive", "{:.0%}") for j in judged)),
    ]
    if record.note:
        lines.append(record.note)
    if record.history.stopped_early:
        lines.append("Stopped early: held-out preference accuracy no longer improved.")
    if record.interrupted:
        lines.append(f"Interrupted in: {record.stage}.")
    return lines


def _comparison_lines(comparison: Comparison) -> list[str]:
    full, fused = comparison.full_logits, comparison.fused
    return [
        f"The same batch ({comparison.rows} x {comparison.width} tokens, {comparison.scored_tokens} scored), "
        f"medians of {comparison.repeats} in turn",
        _row("", "full logits", "fused", "fused / full"),
        _row("loss", f"{full.loss:.6f}", f"{fused.loss:.6f}", f"{comparison.loss_difference:.1e} apart"),
        _row("training step, forward and backward", *_times(full.step_s, fused.step_s)),
        _row("head and loss alone, forward and backward", *_times(full.head_s, fused.head_s)),
        _row(
            "peak extra memory of head and loss",
            f"{full.peak_bytes / 1e6:.1f} MB",
            f"{fused.peak_bytes / 1e6:.1f} MB",
            f"{fused.peak_bytes / full.peak_bytes:.2f}" if full.peak_bytes else NOTHING,
        ),
        f"  gradients differ (relative L2) by {comparison.hidden_gradient_difference:.1e} (hidden states) "
        f"and {comparison.head_gradient_difference:.1e} (head)",
    ]


def _times(full_s: float, fused_s: float) -> tuple[str, str, str]:
    return f"{full_s:.3f} s", f"{fused_s:.3f} s", f"{fused_s / full_s:.2f}"


def _row(name: str, *cells: str) -> str:
    return f"  {name:48}" + "".join(f"{cell:>15}" for cell in cells)


def _metric(source: Metrics | Judgement | None, name: str, pattern: str) -> str:
    return NOTHING if source is None else pattern.format(getattr(source, name))


def _jsonable(value: object) -> object:
    return sorted(value) if isinstance(value, frozenset) else str(value)
