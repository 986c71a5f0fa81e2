"""Chunks of whole examples: which packed tokens go through the scratch together. Only lengths decide it."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

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
    lengths = [sum(counts[bounds[example] : bounds[example + 1]]) for example in range(examples)]
    chunks = _packed(lengths, bounds, tile_rows, tile_rows)
    if any(chunk.oversized for chunk in chunks):
        return chunks
    candidates = []
    for number in range(len(chunks), len(chunks) + 1 + (EXTRA_CHUNKS_TRIED if costs.tile_rows > 1 else 0)):
        limit = _least_limit(lengths, bounds, number, tile_rows)
        rounded_limit = min(tile_rows, -(-limit // costs.tile_rows) * costs.tile_rows)
        candidates += [_packed(lengths, bounds, rows, tile_rows) for rows in (limit, rounded_limit)]
    return min(candidates, key=lambda chunks: cost_of_chunks(chunks, costs))


def with_counts(chunks: Sequence[Chunk], counts: Sequence[int]) -> list[Chunk]:
    """Return chunks of the same examples for other numbers of scored tokens, ``counts`` of each sequence."""
    ends = [0, *accumulate(counts)]
    return [replace(chunk, start=ends[chunk.sequences[0]], stop=ends[chunk.sequences[1]]) for chunk in chunks]


def cost_of_chunks(chunks: Sequence[Chunk], costs: ChunkCosts) -> int:
    """Return the cost in rows: the rows of whole GEMM tiles, and a fixed cost for each chunk after the first."""
    tiles = sum(-(-(chunk.stop - chunk.start) // costs.tile_rows) for chunk in chunks)
    return tiles * costs.tile_rows + max(0, len(chunks) - 1) * costs.extra_chunk_cost_rows


def _least_limit(lengths: Sequence[int], bounds: Sequence[int], number: int, tile_rows: int) -> int:
    """Return the smallest limit of rows with which ``number`` chunks are enough."""
    lowest, highest = max(lengths, default=0), max(tile_rows, 0)
    while lowest < highest:
        middle = (lowest + highest) // 2
        if len(_packed(lengths, bounds, middle, tile_rows)) <= number:
            highest = middle
        else:
            lowest = middle + 1
    return lowest


def _packed(lengths: Sequence[int], bounds: Sequence[int], limit: int, tile_rows: int) -> list[Chunk]:
    """Fill chunks of at most ``limit`` rows greedily. A chunk of more than ``tile_rows`` rows is oversized."""
    chunks: list[Chunk] = []
    first, start, stop = 0, 0, 0

    def close(last: int) -> None:
        chunks.append(Chunk(first, last, (bounds[first], bounds[last]), start, stop, stop - start > tile_rows))

    for example, length in enumerate(lengths):
        if example > first and stop + length - start > limit:
            close(example)
            first, start = example, stop
        stop += length
    if len(lengths) > first:
        close(len(lengths))
    return chunks


def oversized_buffers(chunks: Sequence[Chunk], loss: SequenceLoss) -> int:
    """Return how many accumulators, ``(V, H)`` each, the oversized examples need."""
    sizes = [chunk.sequences[1] - chunk.sequences[0] for chunk in chunks if chunk.oversized]
    return 1 if sizes and loss.difference else max(sizes, default=0)
