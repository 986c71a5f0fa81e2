"""A cover holds every pair of values, every combination that it is told to hold whole, and little else."""

import itertools

import pytest

from tests.covers import combinations_of, cover

SWITCHES = {f"switch {number}": (False, True) for number in range(12)}
KINDS = {"strategy": "abcde", "dtype": (1, 2, 3), "layout": "wxyz", "frozen": (False, True), "bias": (False, True)}
# what: (factors, factors to be combined whole, how many of any others, the most rows that a greedy cover may take)
COVERS = {
    "one factor": ({"dtype": (1, 2, 3)}, (), 2, 3),
    "two are the product": ({"strategy": "abc", "dtype": (1, 2)}, (), 2, 6),
    "pairs": (KINDS, (), 2, 24),
    "many switches": (SWITCHES, (), 2, 14),
    "three whole": (KINDS, (("strategy", "dtype", "frozen"),), 2, 32),
    "two sets of three": (KINDS, (("strategy", "dtype", "frozen"), ("dtype", "layout", "bias")), 2, 40),
    "any three": (KINDS, (), 3, 70),
    "any three and four": (KINDS, (("strategy", "dtype", "frozen", "bias"),), 3, 80),
}


@pytest.mark.parametrize("what", COVERS)
def test_every_combination_that_is_promised_occurs(what):
    factors, whole, together, most = COVERS[what]
    rows = cover(factors, *whole, together=together)
    assert all(list(row) == list(factors) for row in rows)
    assert all(row[name] in choices for row in rows for name, choices in factors.items())
    for group in (*itertools.combinations(factors, min(together, len(factors))), *whole):
        found = {tuple(row[name] for name in group) for row in rows}
        assert found == set(itertools.product(*(factors[name] for name in group))), group
    assert {row[name] for row in rows for name in factors} == {v for choices in factors.values() for v in choices}
    assert len(rows) <= most


def test_the_same_rows_each_time():
    assert cover(KINDS) == cover(dict(KINDS))


def test_a_cover_of_nothing_has_no_rows():
    assert cover({}) == []
    assert combinations_of({}) == []
