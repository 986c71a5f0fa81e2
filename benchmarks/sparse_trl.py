"""The TRL example's training with exact and with sparse gradients, beside what another seed of exact gradients changes.

``python -m benchmarks.sparse_trl`` runs ``python -m examples.trl_dpo --real`` with exact gradients once for each seed,
and with sparse ones for the first seed. Each run has a process of its own. Runs of one seed see the same batches. The
losses go to ``benchmarks/results/sparse-trl-cpu.json``, in the form of ``benchmarks.sparse_training``.
"""

import argparse
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.sparse_training import ROOT, Curves, each_run, where_and_when, write
from benchmarks.trainer_table import run_example
from demo.options import Options, at_least

RESULTS = ROOT / "benchmarks" / "results" / "sparse-trl-cpu.json"
TAU = 2.0**-12
SIZES = ("steps", "batch", "held_out", "eval_every")
ASKED = (*SIZES, "learning_rate")
NAMES = {"loss": "losses", "held_out_loss": "held_out_losses", "held_out_margin": "held_out_margins"}  # the example's


def measure(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train with each seed, and with samples too for the first. Yields what there is after each run."""
    about = {
        "model": "SmolLM2-135M-Instruct",
        "tau": TAU,
        **{name: getattr(asked, name) for name in ASKED},
        **where_and_when(),
        "trl": version("trl"),
    }

    def one(gradient: str, seed: int) -> Curves:
        return curves(run_example(command_line(asked, gradient, seed)))

    others = [("dense", seed) for seed in range(1, asked.orders)]
    for runs in each_run(one, [("dense", 0), ("sparse", 0), *others]):
        yield about | {"runs": runs}


def command_line(asked: argparse.Namespace, gradient: str, seed: int) -> list[str]:
    """Return the example's options for a run."""
    same = [f"--{name.replace('_', '-')}={getattr(asked, name)}" for name in (*ASKED, "cache")]
    return [*same, "--precompute", f"--tau={TAU}", f"--gradient={gradient}", f"--seed={seed}"]


def curves(found: dict[str, Any]) -> Curves:
    """Return the curves of a run from what the example printed."""
    return {curve: found[name] for curve, name in NAMES.items()}


def build_parser() -> argparse.ArgumentParser:
    """Build the parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=at_least(1), default=getattr(Options, name))
    parser.add_argument("--learning-rate", type=at_least(0.0, float), default=Options.lr)
    parser.add_argument("--orders", type=at_least(2), default=2, help="seeds, each with its order of the batches")
    parser.add_argument("--cache", type=Path, default=Options.cache)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Train and write."""
    asked = build_parser().parse_args(argv)
    write(measure(asked), asked.out)


if __name__ == "__main__":
    main()
