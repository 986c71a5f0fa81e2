"""Online DPO: the model writes, a judge prefers, the model learns from its own pairs. ``python -m demo.online --help``.

Each step samples two continuations of the prompt for every pair, lets VADER say which one is the more positive, leaves
out those it cannot tell apart, scores both with a frozen copy of the model, and takes one step of DPO on them (Guo et
al., "Direct language model alignment from online AI feedback", arXiv 2402.04792).
"""

import argparse
import copy
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from demo.data import Pair, fetch_ratings, read_ratings
from demo.download import NotAvailable
from demo.judge import sample
from demo.model import LanguageModel, load_smollm2
from demo.options import at_least
from demo.scratch import build_scratch, supervise
from dpo_kernels import fused_dpo_loss, fused_sequence_logps

LEAST_GAP = 0.05  # of VADER's compound score, -1 to 1


@dataclass(frozen=True)
class Step:
    """One step: the mean score of all that was sampled, the pairs that the judge could tell apart, and their loss."""

    score: float
    pairs: int
    loss: float
    margin: float


def vader() -> Callable[[str], float]:
    """Return a judge of sentiment, -1 to 1."""
    analyzer = SentimentIntensityAnalyzer()
    return lambda text: analyzer.polarity_scores(text)["compound"]


def prefer(texts: list[str], judge: Callable[[str], float]) -> tuple[list[Pair], float]:
    """Pair the texts two by two, the better one chosen; return the pairs with a clear preference and the mean score."""
    scores = [judge(text) for text in texts]
    pairs = []
    for first in range(0, len(texts) - 1, 2):
        a, b = first, first + 1
        if abs(scores[a] - scores[b]) >= LEAST_GAP:
            better, worse = (a, b) if scores[a] > scores[b] else (b, a)
            pairs.append(Pair(texts[better], texts[worse]))
    return pairs, sum(scores) / len(scores)


def train_online(
    lm: LanguageModel,
    judge: Callable[[str], float],
    *,
    steps: int,
    pairs: int,
    tokens: int,
    lr: float,
    beta: float,
    seed: int,
) -> list[Step]:
    """Train `lm` on pairs of its own samples; the reference is the model as it comes in."""
    reference = copy.copy(lm)
    reference.causal = copy.deepcopy(lm.causal).requires_grad_(False)
    optimizer = torch.optim.AdamW(lm.causal.parameters(), lr=lr, weight_decay=0.0)
    history = []
    with tqdm(range(steps), desc="online DPO", unit="step") as bar:
        for step in bar:
            with torch.no_grad():
                texts = sample(lm, 2 * pairs, tokens, seed + step)
            preferred, score = prefer(texts, judge)
            done = Step(score, len(preferred), float("nan"), float("nan"))
            if preferred:
                batch = lm.batch(preferred)
                with torch.no_grad():
                    ref_logps = fused_sequence_logps(reference.hidden(batch), reference.head, batch.labels, shift=True)
                out = fused_dpo_loss(
                    lm.hidden(batch), lm.head, batch.labels, ref_logps=ref_logps, shift=True, beta=beta
                )
                optimizer.zero_grad()
                out.loss.backward()
                optimizer.step()
                done = Step(score, len(preferred), out.loss.item(), float(out.metrics()["rewards/margins"]))
            history.append(done)
            bar.set_postfix(score=f"{score:+.2f}", pairs=len(preferred), loss=f"{done.loss:.3f}")
    return history


def main(arguments: list[str] | None = None) -> int:
    """Run it from the command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo.online", description="Online DPO towards positive reviews.")
    parser.add_argument("--model", choices=("smollm2", "scratch"), default="smollm2", help="default: smollm2")
    parser.add_argument("--steps", type=at_least(1), default=20, help="default: 20")
    parser.add_argument("--pairs", type=at_least(1), default=8, help="sampled at each step; default: 8")
    parser.add_argument("--tokens", type=at_least(1), default=24, help="of a sample at most; default: 24")
    learning_rate = "default: 1e-6 for smollm2, 3e-4 from scratch"
    parser.add_argument("--lr", type=at_least(0.0, float), default=None, help=learning_rate)
    parser.add_argument("--beta", type=at_least(0.0, float), default=0.1, help="default: 0.1")
    parser.add_argument("--seed", type=at_least(0), default=0, help="default: 0")
    parser.add_argument("--cache", type=Path, default=Path(".demo_cache"), help="downloads; default: .demo_cache")
    parser.add_argument("--ratings", type=Path, default=None, help="sentences that a model from scratch learns from")
    parser.add_argument("--sft-steps", type=at_least(0), default=200, help="of the model from scratch; default: 200")
    options = parser.parse_args(arguments)
    try:
        lm = _model(options)
    except NotAvailable as error:
        print(f"The model cannot be had: {error}. `--model scratch` needs the ratings only.", file=sys.stderr)
        return 1
    lr = options.lr if options.lr is not None else 1e-6 if options.model == "smollm2" else 3e-4
    settings = {"steps": options.steps, "pairs": options.pairs, "tokens": options.tokens, "seed": options.seed}
    history = train_online(lm, vader(), lr=lr, beta=options.beta, **settings)
    part = max(1, len(history) // 4)
    first, last = (sum(step.score for step in steps) / part for steps in (history[:part], history[-part:]))
    print(
        f"{lm.name}: mean judgement of samples {first:+.3f} in the first {part} steps, {last:+.3f} in the last {part}."
    )
    return 0


def _model(options: argparse.Namespace) -> LanguageModel:
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.model == "smollm2":
        return load_smollm2(options.cache)
    ratings = read_ratings(options.ratings or fetch_ratings(options.cache))
    texts = [rating.text for rating in ratings]
    lm = build_scratch(texts, options.seed)
    supervise(lm, [text for text in texts if lm.length(text) <= 48], options.sft_steps, options.seed)
    return lm


if __name__ == "__main__":
    sys.exit(main())
