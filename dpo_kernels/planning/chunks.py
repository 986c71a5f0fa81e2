"""Chunks of whole examples: which packed tokens go through the scratch together. Only lengths decide it."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from dpo_kernels.device_specs import ChunkCosts
from dpo_kernels.loss_interface import SequenceLoss
from dpo_kernels.shapes import Chunk

# The plan also tries up to this many chunks more than needed. The number is a choice and not measured. Each further
# chunk has a fixed cost, so many more of them would hardly pay.
EXTRA_CHUNKS_TRIED = 2


def plan_chunks(
    counts: Sequence[int] | None,
    capacity: int,
    bounds: Sequence[int],
    tile_rows: int,
    costs: ChunkCosts | None = None,
) -> list[Chunk]:
    """Pack whole examples in their order into chunks of at most ``tile_rows`` tokens, at the least cost.

    Two kinds of division are compared. One makes the chunks as even as possible, because a last chunk of few rows takes
    almost as long as one of many. The other fills the tiles of the GEMM.

    Args:
        counts: scored tokens of each sequence, or None where the host does not know them. All tokens are then one
            chunk.
        capacity: packed tokens, counted or not.
        bounds: first sequence of each example, then the number of sequences.
        tile_rows: rows of logits that the scratch holds.
        costs: what chunks cost on the device.

    Returns:
        The chunks in order. An example of more than ``tile_rows`` tokens is a chunk of its own, marked as oversized.
        Not even an empty example shares it.

    """
    costs = costs or ChunkCosts()
    examples = len(bounds) - 1
    if counts is None:
        return [Chunk(0, examples, (bounds[0], bounds[-1]), 0, capacity, oversized=False)]
    if examples and (total := sum(counts[bounds[0] : bounds[-1]])) <= tile_rows:
        return [Chunk(0, examples, (bounds[0], bounds[-1]), 0, total)]  # no division costs less, in rows or in chunks
    rows_before = [0, *accumulate(counts)]
    ends = [rows_before[bound] - rows_before[bounds[0]] for bound in bounds]
    longest = max((stop - start for start, stop in pairwise(ends)), default=0)
    filled = _filled(ends, tile_rows)
    if longest <= tile_rows:
        candidates = []
        for number in range(len(filled) - 1, len(filled) + (EXTRA_CHUNKS_TRIED if costs.tile_rows > 1 else 0)):
            limit = _least_limit(ends, number, longest, tile_rows)
            rounded_limit = min(tile_rows, -(-limit // costs.tile_rows) * costs.tile_rows)
            candidates += [_filled(ends, rows) for rows in (limit, rounded_limit)]
        filled = min(candidates, key=lambda firsts: cost_of_chunks([ends[first] for first in firsts], costs))
    return [
        Chunk(first, last, (bounds[first], bounds[last]), ends[first], ends[last], ends[last] - ends[first] > tile_rows)
        for first, last in pairwise(filled)
    ]


def with_counts(chunks: Sequence[Chunk], counts: Sequence[int]) -> list[Chunk]:
    """Return chunks of the same examples for other numbers of scored tokens, ``counts`` of each sequence."""
    ends = [0, *accumulate(counts)]
    return [replace(chunk, start=ends[chunk.sequences[0]], stop=ends[chunk.sequences[1]]) for chunk in chunks]


def cost_of_chunks(ends: Sequence[int], costs: ChunkCosts) -> int:
    """Return the cost in rows: the rows of whole GEMM tiles, and a fixed cost for each chunk after the first.

    ``ends`` are the first row of each chunk, and the row after the last chunk.
    """
    tiles = sum(-(-(stop - start) // costs.tile_rows) for start, stop in pairwise(ends))
    return tiles * costs.tile_rows + max(0, len(ends) - 2) * costs.extra_chunk_cost_rows


def _least_limit(ends: Sequence[int], number: int, lowest: int, highest: int) -> int:
    """Return the smallest limit of rows, from ``lowest`` to ``highest``, with which ``number`` chunks are enough."""
    # Fewer rows than an even share are not enough, and each chunk misses its share by less than one example.
    even = -(-ends[-1] // max(number, 1))
    highest = max(0, min(highest, even + lowest))
    lowest = max(lowest, even)
    while lowest < highest:
        middle = (lowest + highest) // 2
        if _suffices(ends, middle, number):
            highest = middle
        else:
            lowest = middle + 1
    return lowest


def _suffices(ends: Sequence[int], limit: int, number: int) -> bool:
    """Return whether ``number`` chunks of at most ``limit`` rows hold all examples, none of which is longer."""
    first, rows = 0, ends[-1]
    for _ in range(number):
        if ends[first] + limit >= rows:
            return True
        first = bisect_right(ends, ends[first] + limit, lo=first) - 1
    return False


def _filled(ends: Sequence[int], limit: int) -> list[int]:
    """Return the first example of each chunk, and the number of examples, if chunks are filled to ``limit`` rows.

    ``ends`` are the rows before each example, and all rows. An example of more rows than the limit is a chunk alone.
    """
    firsts, examples = [0], len(ends) - 1
    while firsts[-1] < examples:
        first = firsts[-1]
        firsts.append(max(first + 1, bisect_right(ends, ends[first] + limit, lo=first) - 1))
    return firsts


def oversized_buffers(chunks: Sequence[Chunk], loss: SequenceLoss) -> int:
    """Return how many accumulators, ``(V, H)`` each, the oversized examples need."""
    sizes = [chunk.sequences[1] - chunk.sequences[0] for chunk in chunks if chunk.oversized]
    return 1 if sizes and loss.difference else max(sizes, default=0)
