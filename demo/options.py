"""What the demo can be told on its command line, and its defaults."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Options:
    """The demo's settings; `given` names those that came from the command line."""

    model: str = "smollm2"
    steps: int = 40
    batch: int = 4
    beta: float = 0.1
    loss: str = "sigmoid"
    label_smoothing: float = 0.0
    gradient: str = "dense"
    tau: float = 2.0**-12
    lr: float = 4e-5
    seed: int = 0
    max_length: int = 40
    held_out: int = 40
    eval_every: int = 5
    patience: int = 0
    samples: int = 48
    sample_tokens: int = 24
    sft_steps: int = 400
    repeats: int = 3
    threads: int = 0
    device: str = "auto"
    out: Path = Path("demo_out")
    cache: Path = Path(".demo_cache")
    ratings: Path | None = None
    given: frozenset[str] = frozenset()

    def for_model(self, model: str) -> "Options":
        """Return these options for `model`, with its own defaults where nothing was given on the command line."""
        own = SCRATCH_DEFAULTS if model == "scratch" else {}
        values: dict[str, Any] = {name: value for name, value in own.items() if name not in self.given}
        return replace(self, model=model, **values)

    def loss_settings(self) -> dict[str, Any]:
        """Return the loss's keyword arguments for `fused_dpo_loss`."""
        return {"beta": self.beta, "loss_type": self.loss, "label_smoothing": self.label_smoothing}

    def gradient_settings(self, step: int) -> dict[str, Any]:
        """Return what a training step adds to them: its own sample, where gradients are sparse."""
        return {"gradient": self.gradient, "tau": self.tau, "seed": (self.seed * 2**32 + step) % 2**63}


# A model of a million parameters takes, and needs, other steps than one of 135 million.
SCRATCH_DEFAULTS = {"steps": 150, "batch": 8, "lr": 8e-4, "samples": 128}


def parse_options(argv: list[str] | None = None) -> Options:
    """Parse a command line."""
    given = vars(build_parser().parse_args(argv))
    options = Options(**given, given=frozenset(given))
    return options.for_model(options.model)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser; an option that is not given leaves no attribute: the dataclass holds the defaults."""
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="Train a small language model with DPO towards positive movie reviews, and compare the "
        "fused loss with the same loss through full logits.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument

    def number(name: str, low: float, text: str, kind: type = int) -> None:
        attribute = name.removeprefix("--").replace("-", "_")
        default = getattr(Options, attribute)
        other = SCRATCH_DEFAULTS.get(attribute)
        shown = f"{default:g}" if other is None else f"{default:g}, scratch: {other:g}"
        metavar = "N" if kind is int else "X"
        add(name, type=at_least(low, kind), metavar=metavar, help=f"{text} (default {shown})")

    add(
        "--model",
        choices=("smollm2", "scratch"),
        help="SmolLM2-135M-Instruct (default) or one made from scratch",
    )
    number("--steps", 1, "training steps")
    number("--batch", 1, "preference pairs in a step")
    number("--beta", 0.0, "beta of the loss", float)
    add("--loss", metavar="NAME", help=f"a loss of dpo_kernels that uses a reference (default {Options.loss})")
    number("--label-smoothing", 0.0, "share of preferences taken to be wrong", float)
    add("--gradient", choices=("dense", "sparse"), help="sparse trains with gradients of samples (default dense)")
    number("--tau", 0.0, "threshold of the samples", float)
    number("--lr", 0.0, "AdamW's learning rate, after a short warm-up", float)
    number("--seed", 0, "seed of the pairs, the batches and the samples")
    number("--max-length", 8, "longest prompt and completion, in tokens")
    number("--held-out", 1, "pairs kept for the evaluation")
    number("--eval-every", 1, "steps between two evaluations")
    number("--patience", 0, "stop after this many evaluations without better held-out accuracy, 0 = never")
    number("--samples", 1, "continuations sampled for the judge, before and after")
    number("--sample-tokens", 1, "tokens in a sampled continuation")
    number("--sft-steps", 0, "steps of supervised training of the model from scratch before DPO")
    number("--repeats", 1, "timed repeats in the comparison")
    number(
        "--threads",
        0,
        "torch's CPU threads, 0 = time a forward pass with several numbers and take the fastest",
    )
    add("--device", choices=("auto", "cpu", "cuda"), help="auto takes a GPU where there is one (default auto)")
    add("--out", type=Path, metavar="DIR", help=f"plots and summary.json go here (default {Options.out})")
    add("--cache", type=Path, metavar="DIR", help=f"downloads are kept here (default {Options.cache})")
    add(
        "--ratings",
        type=Path,
        metavar="FILE",
        help="use this file of id, rating, text (tab-separated), no download",
    )
    return parser


def at_least(low: float, kind: type = int) -> Callable[[str], Any]:
    """Return what argparse converts a finite number of at least `low` with."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least {low:g}")
        return value

    convert.__name__ = kind.__name__  # argparse names the type in its message
    return convert
