"""An unbiased sample of the logits' gradient, so that most of its products need not be computed.

A row of the gradient is ``p - onehot`` up to factors. The label's entry and all entries with ``p > tau`` are kept as
they are. An entry below is kept with about the probability ``p / tau``, and then has about the value ``tau``. Its
expectation is exactly ``p``, and a row keeps at most ``1 / tau`` large entries and about as many small ones.

The small entries of a block of ``BLOCK`` columns are sampled systematically (Madow, Annals of Mathematical Statistics
20, 1949): they lie side by side on a line, each as long as its probability, and those are kept on which a grid of
spacing 1 falls that begins at a random place. So a block needs one random number. Lengths are whole numbers of
``1 / UNITS``, at least one, and at most ``UNITS`` where a unit of a tiny ``tau`` underflows. Sums of whole numbers do
not depend on their order, and the kept value is ``p`` over the rounded length, so that rounding adds no bias.

The random number of a block is a function of the seed, the token's row and the block (Philox-4x32-10: Salmon et al.,
Parallel random numbers: as easy as 1, 2, 3, SC 2011). So chunks, threads and backends do not change the sample, as far
as they agree on the probabilities.

Whether a sample is worth it must not depend on the sample. A small one would be taken and a large one given up, and
the mean over seeds would be too small. So the expected number of entries decides, which no random number changes.
"""

import torch
from torch import Tensor

from dpo_kernels.shapes import Sampling

BLOCK = 256  # columns; a tile of logits begins at a multiple
UNITS = 2**20  # of a probability of 1; a block sums to at most 2**28 of them
_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def most_entries(rows: int, cols: int, share: float, tau: float) -> tuple[int, int]:
    """Return how many entries of a tile may be expected where its sample is taken, and how many are kept at most.

    ``share`` is the part of the tile whose products cost as much as those of the whole tile. A row of finite logits is
    expected to keep ``1 / tau`` entries at most, the label, and what rounding adds. A block keeps at most one entry
    more than is expected of it.
    """
    limit = min(int(share * rows * cols), rows * (int(min(1.01 / tau, cols)) + 2))
    return limit, min(limit + rows * -(-cols // BLOCK), rows * cols)


def philox(counter: tuple[Tensor | int, ...], key: tuple[Tensor | int, ...]) -> tuple[Tensor | int, ...]:
    """Return four words of Philox-4x32-10. Counters are four words, and keys two, as int64 in ``[0, 2**32)``."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _product(a: int, b: Tensor | int) -> tuple[Tensor | int, Tensor | int]:
    """Return the upper and the lower 32 bits of a product of words, of which no step leaves 63 bits."""
    upper = (a >> 16) * b + (((a & 0xFFFF) * b) >> 16)
    return upper >> 16, ((upper & 0xFFFF) << 16) | (((a & 0xFFFF) * b) & 0xFFFF)


def grid_starts(seed: int | Tensor, tokens_C: Tensor, start: int, cols: int) -> Tensor:
    """Return where the grid of each block begins, ``(C, blocks)`` int64 in ``[0, UNITS)``.

    Args:
        seed: an int, or a 0-d int64 tensor.
        tokens_C: ``(C,)`` int64, row of each token in the flattened input.
        start: the vocabulary's column that comes first, a multiple of ``BLOCK``.
        cols: the number of columns.

    """
    blocks = torch.arange(start // BLOCK, start // BLOCK + -(-cols // BLOCK), device=tokens_C.device)
    token = tokens_C[:, None]
    counter = (token & _WORD, (token >> 32) & _WORD, blocks[None, :], torch.zeros_like(blocks)[None, :])
    word = philox(counter, (seed & _WORD, (seed >> 32) & _WORD))[0]
    assert isinstance(word, Tensor)
    return word >> (32 - UNITS.bit_length() + 1)


def sample(
    e: Tensor, label: Tensor, sumexp_C: Tensor, tokens_C: Tensor, start: int, sampling: Sampling
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose entries of rows of ``exp(z - max)``, and return which, and what they count as.

    Args:
        e: ``(C, Vt)`` exponentials.
        label: ``(C, Vt)`` bool, true at the label, which is kept and has its own value.
        sumexp_C: ``(C,)`` sum of the exponentials of whole rows.
        tokens_C: ``(C,)`` int64, row of each token in the flattened input.
        start: the vocabulary's column that comes first in the tile, a multiple of ``BLOCK``.
        sampling: threshold and seed.

    Returns:
        ``(C, Vt)`` bool, ``(C, Vt)`` values of the kept entries in the dtype of ``e``, and ``(C,)`` int64 numbers that
        are expected to be kept, whatever the seed.

    """
    rows, cols = e.shape
    threshold = (sampling.tau * sumexp_C)[:, None]
    small = (e > 0) & (e <= threshold) & ~label  # NaN is not, and so is kept
    length = torch.where(small, torch.floor(e * (UNITS / threshold) + 0.5).clamp(1.0, UNITS), 0.0)
    lengths = torch.nn.functional.pad(length.to(torch.int64), (0, -cols % BLOCK)).view(rows, -1, BLOCK)
    ends = lengths.cumsum(2) + grid_starts(sampling.seed, tokens_C, start, cols)[:, :, None]
    hit = (ends // UNITS != (ends - lengths) // UNITS).view(rows, -1)[:, :cols]
    values = torch.where(small, e * (UNITS / length.clamp(min=1.0)), e)
    large = label | ~(e <= threshold)
    expected = large.sum(dim=1) + lengths.sum(dim=(1, 2)) // UNITS
    return torch.where(small, hit, large), values, expected
