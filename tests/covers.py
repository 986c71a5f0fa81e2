"""Few cases that stand for the product of all factors: every pair of values meets in one of them.

A fault that needs one value of one factor, or two of two, is seen by such a cover as by the whole product; one that
needs three together is seen only where those factors are named as ``whole``.
"""

import itertools
from collections.abc import Hashable, Iterable, Mapping
from typing import Any


def cover(factors: Mapping[str, Iterable[Hashable]], *whole: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows with a value of every factor, the same ones each time.

    Every pair of values of two factors occurs, and every combination of those factors that are in ``whole`` together.
    Greedy: a row begins with what is missing first, and takes of each other factor what adds the most.
    """
    values = {name: tuple(choices) for name, choices in factors.items()}
    missing = dict.fromkeys(combinations_of(values, *whole))
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for name in values:
            if name not in row:
                row[name] = max(values[name], key=lambda value: _gain(missing, row | {name: value}))
        for combination in [each for each in missing if _holds(row, each)]:
            del missing[combination]
        rows.append({name: row[name] for name in values})
    return rows


def combinations_of(
    factors: Mapping[str, Iterable[Hashable]], *whole: tuple[str, ...]
) -> list[tuple[tuple[str, Hashable], ...]]:
    """What ``cover`` promises: combinations of (factor, value), the largest first."""
    pairs, alone = itertools.combinations(factors, 2), itertools.combinations(factors, 1)
    groups = sorted(dict.fromkeys((*whole, *pairs, *alone)), key=len, reverse=True)
    return [
        tuple(zip(group, chosen, strict=True))
        for group in groups
        for chosen in itertools.product(*(factors[name] for name in group))
    ]


def _holds(row: Mapping[str, Any], combination: tuple[tuple[str, Hashable], ...]) -> bool:
    return all(name in row and row[name] == value for name, value in combination)


def _gain(missing: Iterable[tuple[tuple[str, Hashable], ...]], row: Mapping[str, Any]) -> int:
    return sum(_holds(row, combination) for combination in missing)
