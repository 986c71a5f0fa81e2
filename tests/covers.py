"""Few cases that stand for the product of all factors: every pair of values meets in one of them.

A fault that needs one value of one factor, or two of two, is seen by such a cover as by the whole product; one that
needs three together is seen only where those factors are named as ``whole``, or with ``together=3``.
"""

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

Combination = tuple[tuple[str, Hashable], ...]  # of factors and their values


def cover(
    factors: Mapping[str, Iterable[Hashable]], *whole: tuple[str, ...], together: int = 2
) -> list[dict[str, Any]]:
    """Rows with a value of every factor, the same ones each time.

    Every combination of values of any ``together`` factors occurs, and of those that are in ``whole`` together.
    Greedy: a row begins with what is missing first, and takes of each other factor what adds the most.
    """
    values = {name: tuple(choices) for name, choices in factors.items()}
    missing = dict.fromkeys(combinations_of(values, *whole, together=together))
    holding: dict[tuple[str, Hashable], list[Combination]] = defaultdict(list)
    for combination in missing:
        for item in combination:
            holding[item].append(combination)
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for name, choices in values.items():
            if name not in row:
                gains = [_gain(missing, holding[name, value], row | {name: value}) for value in choices]
                row[name] = choices[gains.index(max(gains))]
        for item in row.items():
            holding[item] = [each for each in holding[item] if each in missing and not _holds(row, each)]
        for combination in [each for each in missing if _holds(row, each)]:
            del missing[combination]
        rows.append({name: row[name] for name in values})
    return rows


def combinations_of(
    factors: Mapping[str, Iterable[Hashable]], *whole: tuple[str, ...], together: int = 2
) -> list[Combination]:
    """What ``cover`` promises, the largest first."""
    groups = [*whole, *(group for size in range(1, together + 1) for group in itertools.combinations(factors, size))]
    return [
        tuple(zip(group, chosen, strict=True))
        for group in sorted(dict.fromkeys(groups), key=len, reverse=True)
        for chosen in itertools.product(*(factors[name] for name in group))
    ]


def _holds(row: Mapping[str, Any], combination: Combination) -> bool:
    return all(name in row and row[name] == value for name, value in combination)


def _gain(missing: Mapping[Combination, None], candidates: Iterable[Combination], row: Mapping[str, Any]) -> int:
    """How much of what is missing a row would have."""
    return sum(each in missing and _holds(row, each) for each in candidates)
