"""``dpo_kernels.records.dataclass`` beside the decorator of the standard library."""

import dataclasses

import pytest

from dpo_kernels import records


def classes(**options):
    """The same class by the two decorators."""

    def body():
        class Point:
            x: int
            y: object = None
            hidden: int = dataclasses.field(default=0, repr=False, compare=False)

        return Point

    return [make(**options)(body()) for make in (records.dataclass, dataclasses.dataclass)]


@pytest.mark.parametrize("options", [{"frozen": True}, {"frozen": True, "eq": False}, {"frozen": False}])
def test_a_record_compares_prints_and_hashes_as_the_standard_one(options):
    ours, theirs = classes(**options)
    for cls in (ours, theirs):
        point, same, other = cls(1, (2,)), cls(1, (2,), hidden=3), cls(1, (3,))
        by_value = options.get("eq", True)
        assert repr(same).endswith("Point(x=1, y=(2,))")
        assert (point == same, point == other, point == (1, (2,))) == (by_value, False, False)
        if not options["frozen"]:
            with pytest.raises(TypeError, match="unhashable"):
                hash(point)
            continue
        assert (hash(point) == hash(same)) == by_value
        with pytest.raises(dataclasses.FrozenInstanceError):
            point.x = 2
        with pytest.raises(dataclasses.FrozenInstanceError):
            del point.x
    assert ours(1) != theirs(1)
    assert repr(ours(1)) == repr(theirs(1))
    if options == {"frozen": True}:
        assert hash(ours(1, "a")) == hash(theirs(1, "a"))


def test_a_record_keeps_methods_of_its_own_and_may_hold_itself():
    @records.dataclass(frozen=True)
    class Own:
        x: list

        def __eq__(self, other):
            return True

        def __hash__(self):
            return 7

    own = Own([])
    own.x.append(own)
    assert (own == 3, hash(own)) == (True, 7)
    assert repr(own).endswith("Own(x=[...])")


def test_a_subclass_adds_its_fields():
    base, _ = classes(frozen=True)

    @records.dataclass(frozen=True)
    class Sub(base):
        z: int = 5

    assert repr(dataclasses.replace(Sub(1), z=6)).endswith("Sub(x=1, y=None, z=6)")
    assert Sub(1) == Sub(1) != Sub(1, z=6)
    assert Sub(1) != base(1)
