"""DPO with the fused loss: the reference's log-probs cached first, then the loop and its evaluations."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from demo.data import Pair, batches_forever
from demo.model import LanguageModel
from demo.options import Options
from dpo_kernels import DPOLossOutput, fused_dpo_loss, fused_sequence_logps

EVALUATION_PAIRS = 8  # in one forward pass without gradients
WARMUP_STEPS = 5
# Log-ratios closer than this differ by rounding only: before training the policy is the reference.
TIE_NATS = 1e-3


@dataclass(frozen=True)
class Scored:
    """Pairs with the reference's cached log-probs: (P, 2) float32, chosen and rejected."""

    pairs: list[Pair]
    ref_logps: torch.Tensor

    def take(self, indices: list[int]) -> "Scored":
        """Return the pairs at `indices`."""
        return Scored([self.pairs[index] for index in indices], self.ref_logps[indices])

    def stacked_ref(self) -> torch.Tensor:
        """Return the log-probs as `fused_dpo_loss` takes them: (2P,), chosen first."""
        return self.ref_logps.T.reshape(-1)


@dataclass(frozen=True)
class Metrics:
    """Loss, reward margin and preference accuracy over some pairs, after `step` training steps."""

    step: int
    loss: float
    margin: float
    accuracy: float
    pairs: int


@dataclass
class History:
    """What training left behind so far; it is filled step by step, so that an interrupted run keeps it."""

    steps: list[Metrics] = field(default_factory=list)
    evaluations: list[Metrics] = field(default_factory=list)
    stopped_early: bool = False


def cache_reference(lm: LanguageModel, pairs: list[Pair], description: str) -> Scored:
    """Score `pairs` with the model as it is now, which is the reference of the training that follows."""
    # Rows of like length together: less padding to compute.
    order = sorted(range(len(pairs)), key=lambda index: lm.length(pairs[index].chosen))
    ref_logps = torch.empty(len(pairs), 2, device=lm.device)
    with torch.no_grad(), tqdm(total=len(pairs), desc=description, unit="pair") as bar:
        for start in range(0, len(order), EVALUATION_PAIRS):
            indices = order[start : start + EVALUATION_PAIRS]
            batch = lm.batch([pairs[index] for index in indices])
            logps = fused_sequence_logps(lm.hidden(batch), lm.head, batch.labels, shift=True)
            ref_logps[indices] = logps.view(2, -1).T
            bar.update(len(indices))
    return Scored(pairs, ref_logps)


def pair_loss(lm: LanguageModel, scored: Scored, options: Options, step: int) -> DPOLossOutput:
    """Return the fused loss of the model on `scored`: the forward of training step `step`."""
    batch = lm.batch(scored.pairs)
    return fused_dpo_loss(
        lm.hidden(batch),
        lm.head,
        batch.labels,
        ref_logps=scored.stacked_ref(),
        shift=True,
        **options.loss_settings(),
        **options.gradient_settings(step),
    )


def evaluate(lm: LanguageModel, held_out: Scored, options: Options, step: int) -> Metrics:
    """Return the model's metrics on `held_out`."""
    count = len(held_out.pairs)
    total = torch.zeros(3, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        for start in range(0, count, EVALUATION_PAIRS):
            part = held_out.take(list(range(start, min(start + EVALUATION_PAIRS, count))))
            metrics = metrics_of(pair_loss(lm, part, options, step), options, step)
            means = torch.tensor([metrics.loss, metrics.margin, metrics.accuracy], dtype=torch.float64, device="cpu")
            total += metrics.pairs * means
    loss, margin, accuracy = (total / count).tolist()
    return Metrics(step, loss, margin, accuracy, count)


def train(lm: LanguageModel, data: Scored, held_out: Scored, options: Options, history: History) -> None:
    """Train `lm` on `data`, evaluating on `held_out` every so often; `history` grows on the way."""
    # Decay would pull the weights to zero rather than to the reference.
    optimizer = torch.optim.AdamW(lm.causal.parameters(), lr=options.lr, weight_decay=0.0, fused=True)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
    batches = batches_forever(len(data.pairs), options.batch, options.seed)
    with tqdm(total=options.steps, desc="DPO training", unit="step") as bar:
        for step in range(1, options.steps + 1):
            out = pair_loss(lm, data.take(next(batches)), options, step)
            optimizer.zero_grad()
            out.loss.backward()
            with uninterrupted():
                optimizer.step()
                warmup.step()
                metrics = metrics_of(out, options, step)
                history.steps.append(metrics)
            bar.update()
            bar.set_postfix(_shown(metrics) | _shown_held_out(history))
            if step % options.eval_every == 0 or step == options.steps:
                history.evaluations.append(evaluate(lm, held_out, options, step))
                bar.set_postfix(_shown(metrics) | _shown_held_out(history))
                if exhausted(history.evaluations, options.patience) and step < options.steps:
                    history.stopped_early = True
                    return


def metrics_of(out: DPOLossOutput, options: Options, step: int) -> Metrics:
    """Return a batch's metrics; where the model prefers neither side, the accuracy counts half a pair."""
    margins = out.chosen_rewards - out.rejected_rewards
    ties = margins.abs() <= TIE_NATS * options.beta
    accuracy = torch.where(ties, 0.5, (margins > 0).float())
    return Metrics(step, out.loss.item(), margins.mean().item(), accuracy.mean().item(), pairs=len(margins))


def exhausted(evaluations: list[Metrics], patience: int) -> bool:
    """Say whether the last `patience` evaluations brought no better accuracy than the ones before them."""
    if not patience or len(evaluations) <= patience:
        return False
    accuracies = [evaluation.accuracy for evaluation in evaluations]
    return max(accuracies[-patience:]) <= max(accuracies[:-patience])


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold a Ctrl-C back until the block is done: no half-made optimizer step is left to be evaluated."""
    interrupted = False

    def remember(_signal: int, _frame: object) -> None:
        nonlocal interrupted
        interrupted = True

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        raise KeyboardInterrupt


def _shown(metrics: Metrics) -> dict[str, str]:
    return {
        "loss": f"{metrics.loss:.3f}",
        "margin": f"{metrics.margin:+.2f}",
        "accuracy": f"{metrics.accuracy:.2f}",
    }


def _shown_held_out(history: History) -> dict[str, str]:
    return {"held-out": f"{history.evaluations[-1].accuracy:.2f}"} if history.evaluations else {}
