"""``dpo_kernels.records.dataclass`` beside the decorator of the standard library."""

import copy
import dataclasses
import inspect
import pickle
import re

import pytest
import torch

from dpo_kernels import records


@records.dataclass(frozen=True)
class Point:
    """A record that pickle finds."""

    x: object


@records.dataclass(frozen=True)
class Named:
    """A record with a default value that is made."""

    x: object
    names: list = dataclasses.field(default_factory=list)


class Plain(Point):
    """A subclass that is no data class."""


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


@pytest.mark.parametrize("frozen", [True, False])
def test_a_record_is_made_from_arguments_as_by_the_standard_decorator(frozen):
    def body():
        class Made:
            """Each kind of field."""

            given: int
            plain: tuple = (1, 2)
            fresh: list = dataclasses.field(default_factory=list)
            later: int = dataclasses.field(init=False)
            inner: dict = dataclasses.field(init=False, default_factory=dict)
            fixed: int = dataclasses.field(init=False, default=4)

            def __post_init__(self):
                object.__setattr__(self, "later", self.given + 1)

        return Made

    ours, theirs = (make(frozen=frozen)(body()) for make in (records.dataclass, dataclasses.dataclass))
    calls = [((3,), {}), ((3, (), [5]), {}), ((), {"fresh": [6], "given": 7})]
    for positional, named in calls:
        assert repr(ours(*positional, **named)) == repr(theirs(*positional, **named))
    assert ours(1).fresh is not ours(1).fresh
    assert ours(1).inner is not ours(1).inner
    for positional, named in [
        ((), {}),
        ((1, 2, 3, 4), {}),
        ((1,), {"given": 2}),
        ((1,), {"later": 2}),
        ((1,), {"x": 2}),
    ]:
        with pytest.raises(TypeError) as said:
            ours(*positional, **named)
        with pytest.raises(TypeError, match=re.escape(str(said.value))):
            theirs(*positional, **named)
    assert str(inspect.signature(ours)) == str(inspect.signature(theirs))
    changed = dataclasses.replace(ours(1, fresh=[2]), given=5)
    assert (changed.later, changed.fresh, dataclasses.asdict(changed)["fixed"]) == (6, [2], 4)
    assert copy.deepcopy(changed) == changed


def test_a_record_is_pickled():
    assert pickle.loads(pickle.dumps(Point(1))) == Point(1)


def test_only_a_plain_subclass_of_a_frozen_record_takes_other_attributes():
    plain = Plain(1)
    plain.other = 2
    assert plain.other == 2
    del plain.other
    for refused in (
        lambda: setattr(plain, "x", 2),
        lambda: delattr(plain, "x"),
        lambda: setattr(Point(1), "other", 2),
        lambda: delattr(Point(1), "other"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            refused()
    assert plain.x == 1
    assert not hasattr(plain, "other")


def test_a_compiled_function_makes_records():
    @torch.compile(fullgraph=True, backend="eager")
    def changed(x):
        point = dataclasses.replace(Point(x), x=x + 1)
        return point.x * 2 + len(Named(x).names) + len(Named(x, ["a", "b"]).names)

    assert changed(torch.ones(())) == 6


def test_a_compiled_function_keeps_a_record_over_a_graph_break():
    @torch.compile(backend="eager")
    def kept(x):
        point = Point(x + 1)
        torch._dynamo.graph_break()
        return point

    assert kept(torch.ones(())) == Point(torch.tensor(2.0))
