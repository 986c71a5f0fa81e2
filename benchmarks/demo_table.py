"""The measured table of docs/performance.md, from the results of ``make demo``.

``python -m benchmarks.demo_table demo_out/summary.json`` keeps what the page shows, with date and processor, in
``benchmarks/results/`` and rewrites the page's section. Without an argument it only rewrites the section. A test
compares.
"""

import argparse
import json
import platform
import re
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "demo-cpu.json"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
MIB = 2**20
KEPT = ("model", "device", "torch", "before", "after", "comparison", "stage_seconds")


def keep(summary: dict[str, Any]) -> dict[str, Any]:
    """What of a demo's summary is worth keeping, and where and when it was measured."""
    kept = {name: summary[name] for name in KEPT}
    kept["options"] = {name: summary["options"][name] for name in ("steps", "batch", "beta", "loss", "lr", "seed")}
    kept["judge"] = {when: summary[f"judged_{when}"]["score"] for when in ("before", "after")}
    kept["date"] = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    kept["processor"], kept["python"] = processor(), platform.python_version()
    return kept


def section(results: dict[str, Any]) -> str:
    """The page's section in Markdown."""
    compared, options = results["comparison"], results["options"]
    full, fused = compared["full_logits"], compared["fused"]
    before, after = results["before"], results["after"]
    rows = [
        ("training step, s", full["step_s"], fused["step_s"], "{:.2f}"),
        ("head and loss alone, s", full["head_s"], fused["head_s"], "{:.3f}"),
        ("peak extra memory of head and loss, MiB", full["peak_bytes"] / MIB, fused["peak_bytes"] / MIB, "{:.0f}"),
    ]
    table = [f"| {name} | {form.format(a)} | {form.format(b)} | {b / a:.2f} |" for name, a, b, form in rows]
    return "\n".join(
        [
            f"`make demo` on {results['processor']}, {results['device']}, torch {results['torch']}, {results['date']} "
            f"([raw numbers](../benchmarks/results/{RESULTS.name})): {results['model']}, V = 49152, H = 576, trainable "
            f"tied head, float32, {compared['rows']} × {compared['width']} tokens, {compared['scored_tokens']} scored, "
            f"medians of {compared['repeats']} runs in turn.",
            "",
            "| same batch, forward and backward | full logits | fused | fused / full |",
            "|---|---|---|---|",
            *table,
            "",
            f"The loss differs by {compared['loss_difference']:.0e}, gradients by "
            f"{compared['hidden_gradient_difference']:.0e} (hidden states) and "
            f"{compared['head_gradient_difference']:.0e} (head) in relative L2. {options['steps']} steps of "
            f"{options['batch']} pairs for positive reviews: held-out preference accuracy {before['accuracy']:.2f} → "
            f"{after['accuracy']:.2f}, reward margin {before['margin']:+.2f} → {after['margin']:+.2f}, judge's score "
            f"of samples {results['judge']['before']:+.2f} → {results['judge']['after']:+.2f}, "
            f"{sum(results['stage_seconds'].values()):.0f} s in all. GPUs: not measured.",
        ]
    )


def with_section(text: str, results: dict[str, Any]) -> str:
    """The page's text with its section made from ``results``."""
    return between_marks(text, section(results))


def between_marks(text: str, made: str) -> str:
    """The text of a page with what stands between its marks replaced."""
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{made}\n{END}", text, flags=re.DOTALL)


def main(arguments: list[str]) -> None:
    """Keep a summary if one is given, and rewrite the page's section."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_table", description=__doc__)
    parser.add_argument("summary", nargs="?", type=Path, help="a demo's summary.json, to be kept")
    summary = parser.parse_args(arguments).summary
    if summary is not None:
        kept = keep(json.loads(summary.read_text(encoding="utf-8")))
        RESULTS.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


def processor() -> str:
    """The machine's processors, by number and name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main(sys.argv[1:])
