"""TRL's own trainer and the fused one on the demo's real model: the table of docs/integrations/trl.md.

``python -m benchmarks.trainer_table --rounds 3 --steps 8`` trains both in turn, each time in a process of its own with
the same seed and data (``python -m examples.trl_dpo --real``), keeps what they logged in ``benchmarks/results/`` and
rewrites the page's section; ``--rounds 0`` only rewrites it. A test compares.
"""

import argparse
import json
import statistics
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.demo_table import between_marks, processor
from demo.options import at_least

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "trainer-cpu.json"
PAGE = ROOT / "docs" / "integrations" / "trl.md"
TRAINERS = {"DPOTrainer": ["--stock"], "FusedDPOTrainer": []}
Runs = dict[str, list[dict[str, Any]]]  # by trainer, in the order in which they ran


def measure(rounds: int, steps: int, batch: int, held_out: int, cache: Path) -> dict[str, Any]:
    """Train with each trainer in turn, ``rounds`` times."""
    runs: Runs = {name: [] for name in TRAINERS}
    options = ["--steps", str(steps), "--batch", str(batch), "--held-out", str(held_out)]
    for _ in tqdm(range(rounds), desc="rounds", unit="round"):
        for name, extra in TRAINERS.items():
            runs[name].append(run_example([*options, "--cache", str(cache), *extra]))
    packages = {name: version(name) for name in ("torch", "trl", "transformers")}
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    sizes = {"steps": steps, "batch": batch, "held_out": held_out}
    return {"runs": runs, **sizes, "packages": packages, "processor": processor(), "date": date}


def run_example(options: list[str]) -> dict[str, Any]:
    """Run ``examples.trl_dpo --real`` in a process of its own, and return what it found."""
    command = [sys.executable, "-m", "examples.trl_dpo", "--real", *options]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def section(results: dict[str, Any]) -> str:
    """The page's section in Markdown."""
    stock, fused = (results["runs"][name] for name in TRAINERS)
    packages = ", ".join(f"{name} {number}" for name, number in results["packages"].items())
    curves = [run["losses"] for run in (*stock, *fused)]
    apart = max(abs(a - b) for curve in curves for a, b in zip(curves[0], curve, strict=True))
    rows = [
        ("steps per second, median", "steps_per_second", "{:.3f}"),
        ("peak resident memory of the process, MiB", "peak_resident_mb", "{:.0f}"),
        ("first loss", "first_loss", "{:.4f}"),
        ("last loss", "last_loss", "{:.4f}"),
        ("held-out loss before", "eval_loss before", "{:.4f}"),
        ("held-out loss after", "eval_loss", "{:.4f}"),
        ("held-out reward margin after", "eval_rewards/margins", "{:.4f}"),
        ("held-out accuracy after", "eval_rewards/accuracies", "{:.2f}"),
    ]
    table = []
    for what, key, form in rows:
        a, b = (statistics.median(run[key] for run in runs) for runs in (stock, fused))
        ratio = f"{b / a:.2f}" if key in ("steps_per_second", "peak_resident_mb") else ""
        table.append(f"| {what} | {form.format(a)} | {form.format(b)} | {ratio} |")
    return "\n".join(
        [
            f"SmolLM2-135M-Instruct (V = 49152, tied head) and movie reviews, float32, {results['steps']} steps of "
            f"{results['batch']} pairs with a reference model, {len(stock)} runs of each in turn, same seed, on "
            f"{results['processor']}, {packages}, {results['date']} "
            f"([raw numbers](../../benchmarks/results/{RESULTS.name}), `python -m benchmarks.trainer_table`):",
            "",
            "| | DPOTrainer | FusedDPOTrainer | fused / stock |",
            "|---|---|---|---|",
            *table,
            "",
            f"Curves: no loss of any step of any run is further than {apart:.0e} from that of the first stock run. "
            "GPUs: not measured.",
        ]
    )


def with_section(text: str, results: dict[str, Any]) -> str:
    """The page's text with its section made from ``results``."""
    return between_marks(text, section(results))


def main(arguments: list[str]) -> None:
    """Measure unless there are no rounds, and rewrite the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainer_table", description=__doc__)
    parser.add_argument("--rounds", type=at_least(0), default=3)
    parser.add_argument("--steps", type=at_least(1), default=8)
    parser.add_argument("--batch", type=at_least(1), default=4, help="pairs in a step")
    parser.add_argument("--held-out", type=at_least(1), default=8, help="pairs to evaluate on")
    parser.add_argument("--cache", type=Path, default=Path(".demo_cache"), help="where the demo keeps its downloads")
    asked = parser.parse_args(arguments)
    if asked.rounds:
        results = measure(asked.rounds, asked.steps, asked.batch, asked.held_out, asked.cache)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
