"""The collectives of a call whose head or whose sequences are split over ranks, by number and bytes."""

import math
from typing import NamedTuple

from dpo_kernels.problem import Workload
from dpo_kernels.shapes import STATS, Schedule, accumulation_dtype, sum_dtype

INT64_BYTES = 8
# Sizes of a shard that every call exchanges: rows, bounds, vocabulary, and three sizes each of two hidden states.
SHARD_SIZES = 10


class Collective(NamedTuple):
    """Collectives of one kind in a call, forward and backward."""

    what: str  # what is exchanged
    kind: str  # "all-gather" or "all-reduce"
    number: int
    bytes: int  # that this rank brings to all of them together


class Pass(NamedTuple):
    """What the collectives of one pass over the tokens depend on."""

    workload: Workload
    schedule: Schedule
    forms_gradients: bool
    whole_stream: bool  # the backend makes the row states of all tokens in one launch


def collectives_of(policy: Pass, reference: Pass | None) -> tuple[Collective, ...]:
    """Return the collectives of a call, in the order of their first appearance. Unsplit calls have none."""
    workload = policy.workload
    found: list[Collective] = []
    if workload.shard_ranks:
        found += _of_a_split_vocabulary(policy, reference)
    if workload.context_ranks:
        found += _of_split_sequences(policy, reference)
    return tuple(each for each in found if each.number)


def _of_a_split_vocabulary(policy: Pass, reference: Pass | None) -> list[Collective]:
    workload = policy.workload
    compared = 0 if workload.static else 1
    hidden = [size for size in workload.gathered_bytes if size]
    states, argmaxes, state_bytes, argmax_bytes = _row_states(policy)
    if reference is not None:
        more, _, more_bytes, _ = _row_states(reference)
        states, state_bytes = states + more, state_bytes + more_bytes
    per_number = accumulation_dtype(workload.dtype).itemsize
    reduced = workload.reduces_hidden_grad and workload.needs_grad.hidden
    return [
        Collective("sizes of the shards", "all-gather", compared, compared * SHARD_SIZES * INT64_BYTES),
        Collective("hidden states", "all-gather", len(hidden), sum(hidden)),
        Collective("comparison of plans", "all-gather", compared, compared * INT64_BYTES),
        Collective("row states", "all-gather", states, state_bytes),
        Collective("first choices", "all-gather", argmaxes, argmax_bytes),
        Collective(
            "gradient of hidden",
            "all-reduce",
            int(reduced),
            int(reduced) * (workload.num_tokens + 1) * workload.width * per_number,
        ),
    ]


def _row_states(each: Pass) -> tuple[int, int, int, int]:
    """Return how often row states and first choices are exchanged, and the bytes of both."""
    workload, schedule = each.workload, each.schedule
    rows = [chunk.stop - chunk.start for chunk in schedule.chunks]
    if each.whole_stream:
        pieces = 1
    elif each.forms_gradients:
        oversized = [chunk for chunk in schedule.chunks if chunk.oversized]
        pieces = sum(1 for size, chunk in zip(rows, schedule.chunks, strict=True) if size and not chunk.oversized)
        pieces += sum(_cut(workload, schedule, chunk.sequences) for chunk in oversized)
    else:
        pieces = sum(1 for size in rows if size)
    if not workload.num_tokens:
        pieces = 0
    names = [name for name in workload.stats if name in STATS]
    numbers = 3 + sum(name != "top1" for name in names)
    state_bytes = numbers * workload.num_tokens * accumulation_dtype(workload.dtype).itemsize
    first = "top1" in names
    return pieces, pieces if first else 0, state_bytes, workload.num_tokens * INT64_BYTES if first else 0


def _cut(workload: Workload, schedule: Schedule, sequences: tuple[int, int]) -> int:
    """Return into how many tiles an oversized example is cut."""
    assert workload.counts is not None, "an oversized example is only planned where the counts are on the host"
    assert workload.loss is not None, "examples are those of a loss"
    counts = workload.counts[slice(*sequences)]
    sides = counts if workload.loss.difference is None else [sum(counts)]
    return sum(math.ceil(size / schedule.oversized_rows) for size in sides)


def _of_split_sequences(policy: Pass, reference: Pass | None) -> list[Collective]:
    workload = policy.workload
    compared = 0 if workload.static else 2
    real, total = sum_dtype(workload.device).itemsize, workload.num_sequences
    sums = len(policy.schedule.chunks) if policy.forms_gradients else int(not workload.per_token)
    means = sum(name in STATS for name in workload.stats)
    summed = int(reference is not None or workload.sums_reference)
    return [
        Collective("comparison of calls", "all-gather", compared, compared * INT64_BYTES),
        Collective("numbers of tokens", "all-gather", 1, (total + 1) * INT64_BYTES),
        Collective("sums of sequences", "all-gather", sums + summed, (int(sums > 0) + summed) * total * real),
        Collective("sums of statistics", "all-gather", int(means > 0), means * total * real),
    ]
