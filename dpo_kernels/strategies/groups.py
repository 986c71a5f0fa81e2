"""Which rows go through the scratch together: whole units in groups, planned from lengths alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_kernels.device_specs import ChunkCosts
from dpo_kernels.loss_interface import SequenceLoss

EXTRA_CHUNKS_TRIED = 2  # than needed that are considered


@dataclass(frozen=True)
class Group:
    """Units ``first..last-1``, their sequences and packed rows, and whether they are one unit cut into tiles."""

    first: int
    last: int
    sequences: tuple[int, int]
    start: int
    stop: int
    oversized: bool


def plan_groups(
    counts: Sequence[int] | None,
    capacity: int,
    bounds: Sequence[int],
    tile_rows: int,
    chunking: ChunkCosts | None = None,
) -> list[Group]:
    """Pack whole units in their order into groups of at most ``tile_rows`` rows, at the least cost by ``chunking``.

    A unit longer than that is a group of its own, without so much as an empty one beside it. ``bounds`` are the first
    sequences of the units, and the end; ``counts`` is None for a static capacity. Considered are the most even groups,
    because a GEMM of a few left-over rows costs as much as one of many, and those that fill the GEMM's tiles.
    """
    chunking = chunking or ChunkCosts()
    units = len(bounds) - 1
    if counts is None:
        return [Group(0, units, (bounds[0], bounds[-1]), 0, capacity, oversized=False)]
    lengths = [sum(counts[bounds[unit] : bounds[unit + 1]]) for unit in range(units)]
    groups = _packed(lengths, bounds, tile_rows, tile_rows)
    if any(group.oversized for group in groups):
        return groups
    candidates = []
    for number in range(len(groups), len(groups) + 1 + (EXTRA_CHUNKS_TRIED if chunking.tile_rows > 1 else 0)):
        limit = _least_limit(lengths, bounds, number, tile_rows)
        full = min(tile_rows, -(-limit // chunking.tile_rows) * chunking.tile_rows)
        candidates += [_packed(lengths, bounds, rows, tile_rows) for rows in (limit, full)]
    return min(candidates, key=lambda groups: cost_of_groups(groups, chunking))


def cost_of_groups(groups: Sequence[Group], chunking: ChunkCosts) -> int:
    """In rows: those of whole GEMM tiles, and what each group after the first costs besides."""
    tiles = sum(-(-(group.stop - group.start) // chunking.tile_rows) for group in groups)
    return tiles * chunking.tile_rows + max(0, len(groups) - 1) * chunking.extra_chunk_cost_rows


def _least_limit(lengths: Sequence[int], bounds: Sequence[int], number: int, tile_rows: int) -> int:
    """The smallest number of rows that needs no more than so many groups."""
    lowest, highest = max(lengths, default=0), max(tile_rows, 0)
    while lowest < highest:
        middle = (lowest + highest) // 2
        if len(_packed(lengths, bounds, middle, tile_rows)) <= number:
            highest = middle
        else:
            lowest = middle + 1
    return lowest


def _packed(lengths: Sequence[int], bounds: Sequence[int], limit: int, tile_rows: int) -> list[Group]:
    """Units in groups of at most ``limit`` rows, greedily; oversized is what does not fit ``tile_rows``."""
    groups: list[Group] = []
    first, start, stop = 0, 0, 0

    def close(last: int) -> None:
        groups.append(Group(first, last, (bounds[first], bounds[last]), start, stop, stop - start > tile_rows))

    for unit, length in enumerate(lengths):
        if unit > first and stop + length - start > limit:
            close(unit)
            first, start = unit, stop
        stop += length
    if len(lengths) > first:
        close(len(lengths))
    return groups


def oversized_buffers(groups: Sequence[Group], loss: SequenceLoss) -> int:
    """How many extra ``(V, H)`` buffers the unscaled form of oversized units needs."""
    sizes = [group.sequences[1] - group.sequences[0] for group in groups if group.oversized]
    return 1 if sizes and loss.difference else max(sizes, default=0)
