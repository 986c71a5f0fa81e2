"""Which packed tokens go through the scratch together: whole examples in chunks, planned from lengths alone."""

from collections.abc import Sequence

from dpo_kernels.device_specs import ChunkCosts
from dpo_kernels.loss_interface import SequenceLoss
from dpo_kernels.shapes import Chunk

EXTRA_CHUNKS_TRIED = 2  # how many chunks more than needed are considered


def plan_chunks(
    counts: Sequence[int] | None,
    capacity: int,
    bounds: Sequence[int],
    tile_rows: int,
    costs: ChunkCosts | None = None,
) -> list[Chunk]:
    """Pack whole examples in their order into chunks of at most ``tile_rows`` tokens, at the least cost.

    An example longer than that is a chunk of its own, without so much as an empty one beside it. ``bounds`` are the
    first sequences of the examples, and the end; ``counts`` is None for a static capacity. Candidates are the most even
    chunks, because a GEMM of a few left-over rows costs as much as one of many, and those that fill the GEMM's tiles.
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
        full = min(tile_rows, -(-limit // costs.tile_rows) * costs.tile_rows)
        candidates += [_packed(lengths, bounds, rows, tile_rows) for rows in (limit, full)]
    return min(candidates, key=lambda chunks: cost_of_chunks(chunks, costs))


def cost_of_chunks(chunks: Sequence[Chunk], costs: ChunkCosts) -> int:
    """In rows: those of whole GEMM tiles, and what each chunk after the first costs besides."""
    tiles = sum(-(-(chunk.stop - chunk.start) // costs.tile_rows) for chunk in chunks)
    return tiles * costs.tile_rows + max(0, len(chunks) - 1) * costs.extra_chunk_cost_rows


def _least_limit(lengths: Sequence[int], bounds: Sequence[int], number: int, tile_rows: int) -> int:
    """The smallest number of rows that needs no more than so many chunks."""
    lowest, highest = max(lengths, default=0), max(tile_rows, 0)
    while lowest < highest:
        middle = (lowest + highest) // 2
        if len(_packed(lengths, bounds, middle, tile_rows)) <= number:
            highest = middle
        else:
            lowest = middle + 1
    return lowest


def _packed(lengths: Sequence[int], bounds: Sequence[int], limit: int, tile_rows: int) -> list[Chunk]:
    """Units in chunks of at most ``limit`` rows, greedily; oversized is what does not fit ``tile_rows``."""
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
    """How many extra ``(V, H)`` buffers the unscaled form of oversized examples needs."""
    sizes = [chunk.sequences[1] - chunk.sequences[0] for chunk in chunks if chunk.oversized]
    return 1 if sizes and loss.difference else max(sizes, default=0)
