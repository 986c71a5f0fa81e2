"""Sequences whose tokens are split over two, three and four processes give what whole ones give."""

import pickle

import pytest

from tests.distributed import contexts, gloo
from tests.shared import made_once

CASES = [
    *((2, split) for split in ("contiguous", "zig-zag", "a rank without tokens")),
    *((3, "zig-zag"), (4, "a rank without tokens")),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    def of(world):
        folder = made_once(
            tmp_path_factory, f"context{world}", lambda out: gloo.run("all_of", world, out, world, module="contexts")
        )
        return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(world)]

    return of


@pytest.mark.parametrize("dtype", ["torch.float64", "torch.float32", "torch.bfloat16"])
@pytest.mark.parametrize("case", contexts.CASES)
@pytest.mark.parametrize(("world", "split"), CASES)
def test_split_equals_whole(found, world, split, case, dtype):
    assert [each["cases"][f"{case}, {split}, {dtype}"] for each in found(world)] == [[]] * world


def test_head_and_sequences_may_be_split_at_once(found):
    for each in found(4):
        assert each["head and sequences"]
        assert {name: off for name, off in each["head and sequences"].items() if off} == {}


@pytest.mark.parametrize("split", ["vocab_parallel", "context_parallel", "both"])
def test_the_collectives_that_run_are_those_that_the_plan_tells(found, split):
    for each in found(4):
        assert each[f"collectives, {split}"]
        assert {name: off for name, off in each[f"collectives, {split}"].items() if off} == {}


@pytest.mark.parametrize("world", [2, 3])
def test_hidden_states_that_arrive_split_along_the_tokens(found, world):
    assert [each["sharded hidden"] for each in found(world)] == [[]] * world


def test_sizes_along_the_tokens_are_kept_for_labels_of_the_same_shape_only(found):
    said = [dict(each["static sharded hidden"]) for each in found(2)]
    for rank, each in enumerate(said):
        assert f"changed: tokens of hidden {('3 to 2', '2 to 3')[rank]};" in each.pop("another split")
        assert set(each.values()) == {"right"}


def test_logits_in_the_memory_of_the_gradient(found):
    assert [each["logits in the gradient"] for each in found(2)] == [[], []]


def test_ranks_with_other_rows_plan_alike_for_a_static_capacity(found):
    for each in found(2):
        told = dict(each["static"])
        assert told.pop("small scratch") == "strategy='chunked' cannot run this: max_scored_tokens=16 doe"
        right = {"chunked": "right", "recompute": "right"}
        assert told == right | {"chunked, too few": "True", "recompute, too few": "True"}


def test_ranks_that_do_not_fit_together_are_told_so_on_every_rank(found):
    said = [dict(each["refusals"]) for each in found(2)]
    raised = "RuntimeError: context_parallel: ranks [1] have raised an error before the first product"
    assert said[0].pop("one rank raises") == said[0].pop("one rank has another dtype") == raised
    assert said[1].pop("one rank raises").startswith("ValueError: labels[1, 1] = 37 is outside [0, 37)")
    assert said[1].pop("one rank has another dtype").startswith("TypeError: ref_logps must be floating point")
    for rank, each in enumerate(said):
        assert each.pop("shift").startswith("ValueError: context_parallel goes with labels that were shifted before")
        assert each.pop("kind") == "TypeError: context_parallel must be a ContextParallel, got str"
        assert each.pop("afterwards") == "no error"
        assert len(each) == 10
        for text in each.values():
            assert text.startswith(f"ValueError: context_parallel: ranks [{1 - rank}] were given another problem")


def test_split_work_inside_a_graph_is_refused_by_its_name(found):
    for each in found(2):
        for argument, text in each["compiled"].items():
            assert f"{argument} is not supported inside torch.compile yet" in text


def test_one_rank_of_four_raises_and_all_end(found):
    said = [each["one raises"] for each in found(4)]
    wrong = {"one": (2,), "two": (0, 3), "other two": (1, 2), "none": ()}
    for name, ranks in wrong.items():
        expected = ["no error"] * 4 if not ranks else ["ValueError" if r in ranks else "RuntimeError" for r in range(4)]
        assert [each[name] for each in said] == expected
