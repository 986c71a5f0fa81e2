"""The demo's training with exact and with sparse gradients: what a sample changes, beside what another data order does.

``python -m benchmarks.sparse_training`` trains SmolLM2-135M-Instruct on the demo's pairs once for each kind of gradient
and each order of the batches. The pairs, the held-out pairs and the model at the start are the same for all runs, and
runs of one order see the same batches. The losses go to ``benchmarks/results/sparse-training-cpu.json``.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo_table import processor
from demo.data import fetch_ratings, read_ratings
from demo.model import load_smollm2
from demo.options import Options, at_least
from demo.preparation import get_pairs
from demo.train import History, cache_reference, train

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "sparse-training-cpu.json"
GRADIENTS = ("dense", "sparse")
SETTINGS = ("steps", "batch", "max_length", "tau", "beta", "lr", "eval_every")
CURVES = ("loss", "held_out_loss", "held_out_margin")
ASKED = ("steps", "batch", "max_length", "held_out", "eval_every")  # options with the demo's names and defaults
Run = dict[str, Any]  # gradient, order, and a list of numbers for each of CURVES
Curves = dict[str, list[float]]


def measure(options: Options, orders: int) -> Iterator[dict[str, Any]]:
    """Train with each kind of gradient and each order of the batches. Yields what there is after each run."""
    lm = load_smollm2(options.cache)
    training, held_out = get_pairs(lm, read_ratings(fetch_ratings(options.cache)), options)
    held_out_scored = cache_reference(lm, held_out, "reference, held out")
    training_scored = cache_reference(lm, training, "reference, training")
    begin = {name: value.clone() for name, value in lm.causal.state_dict().items()}
    about = {
        "model": lm.name,
        **{name: getattr(options, name) for name in SETTINGS},
        "pairs": len(training),
        "held_out": len(held_out),
        **where_and_when(),
    }

    def one(gradient: str, order: int) -> Curves:
        lm.causal.load_state_dict(begin)
        history = History()
        train(lm, training_scored, held_out_scored, replace(options, gradient=gradient, seed=order), history)
        return _curves(history)

    for runs in each_run(one, [(gradient, order) for order in range(orders) for gradient in GRADIENTS]):
        yield about | {"runs": runs}


def where_and_when() -> dict[str, str]:
    """Return processor, version of torch, and date."""
    return {
        "processor": processor(),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def each_run(one: Callable[[str, int], Curves], wanted: Sequence[tuple[str, int]]) -> Iterator[list[Run]]:
    """Call ``one`` with each wanted gradient and order of the batches. Yields the runs so far after each."""
    runs: list[Run] = []
    for gradient, order in wanted:
        runs.append({"gradient": gradient, "order": order, **one(gradient, order)})
        print(f"{gradient}, order {order}: held-out loss {runs[-1]['held_out_loss'][-1]:.4f}", flush=True)
        yield runs


def write(found: Iterator[dict[str, Any]], out: Path) -> None:
    """Write each record in place of the one before it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for record in found:
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _curves(history: History) -> Curves:
    return {
        "loss": [each.loss for each in history.steps],
        "held_out_loss": [each.loss for each in history.evaluations],
        "held_out_margin": [each.margin for each in history.evaluations],
    }


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ASKED:
        parser.add_argument(f"--{name.replace('_', '-')}", type=at_least(1), default=getattr(Options, name))
    parser.add_argument("--orders", type=at_least(2), default=2, help="orders of the batches")
    parser.add_argument("--threads", type=at_least(1), default=torch.get_num_threads())
    parser.add_argument("--cache", type=Path, default=Options.cache)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    options = Options(**{name: getattr(asked, name) for name in ASKED}, cache=asked.cache)
    write(measure(options, asked.orders), asked.out)


if __name__ == "__main__":
    main()
