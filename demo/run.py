"""The demo from beginning to end: preparation, reference, training, judging, comparison, report."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from demo.compare import compare
from demo.download import NotAvailable
from demo.judge import Judgement, judge_samples
from demo.model import LanguageModel
from demo.options import Options
from demo.plots import plot_history
from demo.preparation import get_model, get_pairs, get_ratings, teach
from demo.report import Record, table, write_summary
from demo.train import Scored, cache_reference, evaluate, train
from dpo_kernels import fused_dpo_loss

DONE, FAILED, BAD_OPTION, INTERRUPTED = 0, 1, 2, 130
# After Ctrl-C nobody wants to wait for the whole held-out set.
INTERRUPTED_PAIRS = 8


def run(options: Options) -> int:
    """Run the demo, leave plots and summary.json in `options.out`, and return the exit code."""
    try:
        _check(options)
    except (ValueError, TypeError) as error:
        print(f"python -m demo: {error}", file=sys.stderr)
        return BAD_OPTION
    demo = _Demo(options)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        options.cache.mkdir(parents=True, exist_ok=True)
        demo.everything()
    except KeyboardInterrupt:
        print(f"\nInterrupted in: {demo.record.stage}. Summing up what was done so far.", file=sys.stderr)
        demo.sum_up_interrupted()
    except (NotAvailable, OSError) as error:
        print(f"\nThe demo cannot go on ({demo.record.stage}): {error}", file=sys.stderr)
        return FAILED
    demo.report()
    return INTERRUPTED if demo.record.interrupted else DONE


def _check(options: Options) -> None:
    """Let the package judge the loss options before anything is downloaded."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    hidden, head = torch.zeros(2, 1, 2, device="cpu"), torch.zeros(3, 2, device="cpu")
    labels = torch.zeros(2, 1, dtype=torch.int64, device="cpu")
    fused_dpo_loss(
        hidden,
        head,
        labels,
        ref_logps=torch.zeros(2, device="cpu"),
        **options.loss_settings(),
        **options.gradient_settings(1),
    )


class _Demo:
    """The stages of one run, and what an interrupted one leaves to be summed up."""

    def __init__(self, options: Options) -> None:
        self.record = Record(options)
        self.trainee: tuple[LanguageModel, Scored] | None = None

    def everything(self) -> None:
        """Run all stages; each leaves its part in the record."""
        record = self.record
        with self.stage("ratings"):
            ratings = get_ratings(record.options)
        with self.stage("model"):
            lm = get_model(record, ratings)
        options = record.options  # those of the stand-in, if the model could not be had
        with self.stage("pairs"):
            training_pairs, held_out_pairs = get_pairs(lm, ratings, options)
        if options.model == "scratch":
            with self.stage("supervised training"):
                teach(lm, ratings, held_out_pairs, options)
        with self.stage("reference"):
            held_out = cache_reference(lm, held_out_pairs, "reference, held out")
            training = cache_reference(lm, training_pairs, "reference, training")
        self.train(lm, training, held_out)
        with self.stage("comparison"):
            batch = list(range(min(options.batch, len(training_pairs))))
            record.comparison = compare(lm, training.take(batch), options)

    def train(self, lm: LanguageModel, training: Scored, held_out: Scored) -> None:
        """Train, with the evaluations and the judge before and after."""
        record = self.record
        with self.stage("evaluation before"):
            record.before = evaluate(lm, held_out, record.options, step=0)
            record.history.evaluations.append(record.before)
            record.judged_before = self.judge(lm, "Before training")
        self.trainee = lm, held_out
        with self.stage("training"):
            train(lm, training, held_out, record.options, record.history)
            record.after = record.history.evaluations[-1]
        with self.stage("evaluation after"):
            record.judged_after = self.judge(lm, "After training")

    def judge(self, lm: LanguageModel, when: str) -> Judgement:
        """Sample and judge with the run's seed."""
        options = self.record.options
        judged = judge_samples(lm, options.samples, options.sample_tokens, options.seed)
        print(f"{when} the judge scores {options.samples} sampled continuations {judged.score:+.3f}.")
        return judged

    def sum_up_interrupted(self) -> None:
        """Mark the record, and evaluate on a few pairs what training came to."""
        record = self.record
        record.interrupted = True
        steps = record.history.steps
        if record.after or not steps or self.trainee is None:
            return
        lm, held_out = self.trainee
        count = len(held_out.pairs)
        few = held_out.take(list(range(0, count, -(-count // INTERRUPTED_PAIRS))))
        record.after = evaluate(lm, few, record.options, steps[-1].step)

    def report(self) -> None:
        """Write plots and summary, and print the table and where they are."""
        record = self.record
        written = [write_summary(record, record.options.out / "summary.json")]
        if record.history.steps:
            written += plot_history(record.history, record.options.out, record.model or "")
        print(f"\n{table(record)}\n")
        print("Written: " + " ".join(str(path) for path in written))
        print("python -m dpo_kernels says what can run on this machine, how to have the rest, and how fast it is.")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Name the stage and take its time, however it ends."""
        self.record.stage = name
        start = time.perf_counter()
        try:
            yield
        finally:
            self.record.stage_seconds[name] = time.perf_counter() - start
