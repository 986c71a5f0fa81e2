"""The fused loss against the same batch through full logits: values, gradients, time and memory."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from tqdm import tqdm

from demo.data import IGNORED, Batch
from demo.full_logits import METHODS
from demo.memory import Problem, peak_extra_bytes
from demo.model import LanguageModel
from demo.options import Options
from demo.train import Scored


@dataclass(frozen=True)
class Method:
    """One way to the loss, measured; times are medians over the repeats."""

    loss: float
    step_s: float
    head_s: float
    peak_bytes: int


@dataclass(frozen=True)
class Comparison:
    """Both ways on one batch, and how far the fused one is from full logits."""

    rows: int
    width: int
    scored_tokens: int
    repeats: int
    full_logits: Method
    fused: Method
    loss_difference: float
    hidden_gradient_difference: float
    head_gradient_difference: float


def compare(lm: LanguageModel, scored: Scored, options: Options) -> Comparison:
    """Measure both ways on `scored`, interleaved."""
    batch = lm.batch(scored.pairs)
    ref_logps = scored.stacked_ref()
    settings = options.loss_settings()
    with torch.no_grad():
        hidden = lm.hidden(batch)

    def head(method: str) -> tuple[torch.Tensor, ...]:
        leaves = hidden.clone().requires_grad_(), lm.head.detach().requires_grad_()
        loss = METHODS[method](*leaves, batch.labels, ref_logps, **settings)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    def step(method: str) -> None:
        lm.causal.zero_grad()
        METHODS[method](lm.hidden(batch), lm.head, batch.labels, ref_logps, **settings).backward()

    results = {method: head(method) for method in METHODS}
    (loss, *gradients), (fused_loss, *fused_gradients) = results["full logits"], results["fused"]
    differences = [_relative_l2(*both) for both in zip(fused_gradients, gradients, strict=True)]
    del results, gradients, fused_gradients
    with tqdm(total=4 * options.repeats + 1, desc="comparison", unit="run") as bar:
        step_s = _medians(step, options.repeats, lm.device, bar)
        head_s = _medians(head, options.repeats, lm.device, bar)
        lm.causal.zero_grad()
        peaks = _peaks(head, lm, batch, options)
        bar.update()
    losses = {"full logits": loss.item(), "fused": fused_loss.item()}
    full, fused = (Method(losses[name], step_s[name], head_s[name], peaks[name]) for name in METHODS)
    return Comparison(
        rows=batch.labels.shape[0],
        width=batch.labels.shape[1],
        scored_tokens=int((batch.labels != IGNORED).sum()),
        repeats=options.repeats,
        full_logits=full,
        fused=fused,
        loss_difference=abs(fused.loss - full.loss),
        hidden_gradient_difference=differences[0],
        head_gradient_difference=differences[1],
    )


def _medians(work: Callable[[str], object], repeats: int, device: torch.device, bar: tqdm) -> dict[str, float]:
    """Time `work` of each method; they take turns, so that a busy machine is busy for both."""
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for repeat in range(repeats):
        for method in list(METHODS)[:: 1 if repeat % 2 == 0 else -1]:
            _synchronize(device)
            start = time.perf_counter()
            work(method)
            _synchronize(device)
            seconds[method].append(time.perf_counter() - start)
            bar.update()
    return {method: median(times) for method, times in seconds.items()}


def _peaks(head: Callable[[str], object], lm: LanguageModel, batch: Batch, options: Options) -> dict[str, int]:
    if lm.device.type == "cuda":
        peaks = {}
        for method in METHODS:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            head(method)
            peaks[method] = torch.cuda.max_memory_allocated() - before
        return peaks
    problems = [
        Problem(
            method=method,
            prompt=len(lm.prompt),
            scored=(batch.labels != IGNORED).sum(-1).tolist(),
            hidden_size=lm.head.shape[1],
            vocabulary=lm.head.shape[0],
            threads=torch.get_num_threads(),
            loss=options.loss_settings(),
        )
        for method in METHODS
    ]
    return dict(zip(METHODS, peak_extra_bytes(problems), strict=True))


def _relative_l2(value: torch.Tensor, reference: torch.Tensor) -> float:
    difference, size = (value - reference).double().norm(), reference.double().norm()
    return (difference / size if size else difference).item()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
