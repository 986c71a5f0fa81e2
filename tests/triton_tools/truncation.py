"""What tensor cores' sums, cut towards zero, cost a bfloat16 log-prob: ``python -m tests.triton_tools.truncation``.

The command prints a table of errors of token log-probs against float64, in nats. ``--write`` puts it into
docs/performance.md. Nothing of it was measured on a GPU: the sums are those of ``gpu_arithmetic.truncating_product``.

Every cut makes a partial sum smaller, so all logits shrink, each by about the same part of itself. The log-prob of a
label near the row's maximum hardly changes. That of an unlikely label, whose logit lies far below, comes out too high.
The number of cuts grows with H, and their size with the logits.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from tests.triton_tools.gpu_arithmetic import GROUP_BITS, truncating_product

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
BEGIN, END = "<!-- truncation: begin -->", "<!-- truncation: end -->"
TOKENS, VOCAB = 16, 8192
# Of a model's logits, nats. The largest of VOCAB normal numbers is about four deviations.
DEVIATIONS = {25: 6.25, 45: 11.25}
HOPPER, AMPERE = GROUP_BITS // 16, GROUP_BITS // 32  # products that are added at a time


class Errors(NamedTuple):
    """Of the log-probs of some labels against float64, in nats."""

    largest: float
    mean: float  # with its sign

    def __str__(self) -> str:
        return f"{self.largest:.1e} ({self.mean:+.1e})"


def problem(width: int, largest: int, vocab: int = VOCAB) -> tuple[torch.Tensor, torch.Tensor]:
    """Bfloat16 hidden states (TOKENS, H) and a head (V, H), whose logits reach about ``largest``."""
    g = torch.Generator().manual_seed(width + largest)
    x = torch.randn(TOKENS, width, generator=g).bfloat16()
    w = (torch.randn(vocab, width, generator=g) * (DEVIATIONS[largest] / width**0.5)).bfloat16()
    return x, w


def errors(logits: torch.Tensor, exact: torch.Tensor) -> dict[str, Errors]:
    """Of each row's most likely label, and of as many others, taken from the unlikely half."""
    off = logits.double().log_softmax(-1) - exact.log_softmax(-1)
    order = exact.argsort(-1, descending=True)
    labels = {"likely": order[:, :1], "unlikely": order[:, VOCAB // 2 :: 64]}
    found = {name: off.gather(1, at) for name, at in labels.items()}
    return {name: Errors(float(e.abs().max()), float(e.mean())) for name, e in found.items()}


def rows(width: int, largest: int) -> dict[str, dict[str, Errors]]:
    """Errors by arithmetic, then by kind of label."""
    x, w = problem(width, largest)
    exact = x.double() @ w.double().t()
    operands = x.float().numpy(), w.float().numpy().T
    zero = np.zeros((TOKENS, VOCAB), np.float32)
    cut = {group: torch.from_numpy(truncating_product(*operands, zero, group)) for group in (HOPPER, AMPERE)}
    logits = {"CPU": x.float() @ w.float().t(), "H100": cut[HOPPER], "A100": cut[AMPERE], "bfloat16": exact.bfloat16()}
    return {name: errors(value, exact) for name, value in logits.items()}


def table() -> str:
    """In Markdown: the largest error and, in parentheses, the mean one with its sign."""
    lines = [
        "| H | largest logit | label | float32 sums, as on a CPU | an H100's, modelled | an A100's | bfloat16 logits |",
        "|---|---|---|---|---|---|---|",
    ]
    for width in (4096, 8192):
        for largest in DEVIATIONS:
            found = rows(width, largest)
            for label in ("likely", "unlikely"):
                cells = [str(found[name][label]) for name in ("CPU", "H100", "A100", "bfloat16")]
                lines.append(f"| {' | '.join([str(width), str(largest), label, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.triton_tools.truncation", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    options = parser.parse_args()
    made = table()
    print(made)
    if options.write:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
