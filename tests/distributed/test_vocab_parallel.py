"""A head that is split over two, three and four processes gives what the whole one gives."""

import pickle

import pytest

from dpo_kernels.distributed import VocabParallel
from tests.distributed import gloo, ranks
from tests.shared import made_once

# Shards of other sizes, an empty one, and more ranks than tokens.
SIZES = {"2": [20, 17], "3": [3, 0, 34], "4": [1, 1, 1, 0]}


@pytest.fixture(scope="module", params=SIZES)
def found(request, tmp_path_factory):
    sizes = SIZES[request.param]
    folder = made_once(
        tmp_path_factory, f"vocab{request.param}", lambda out: gloo.run("every_case", len(sizes), out, sizes)
    )
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(len(sizes))]


@pytest.mark.parametrize("dtype", ["torch.float64", "torch.float32", "torch.bfloat16"])
@pytest.mark.parametrize("case", ranks.CASES)
def test_split_equals_whole(found, case, dtype):
    if case.startswith("padded rows") and len(found) == 4:
        pytest.skip("three tokens are too few for padding")
    assert [each[f"{case}, {dtype}"] for each in found] == [[]] * len(found)


def test_ranks_that_do_not_fit_together_are_told_so_on_every_rank(tmp_path):
    said = gloo.run("refusals", 2, tmp_path, [20, 17])
    words = {
        "one rank trains": "ValueError: vocab_parallel: ranks [",
        "betas": "ValueError: vocab_parallel: ranks [",
        "scratches": "ValueError: vocab_parallel: ranks [",
        "whole reference": "ValueError: ref_weight has 37 rows, expected this rank's ",
        "shapes": "ValueError: vocab_parallel: ranks [",
        "losses": "ValueError: vocab_parallel: ranks [",
        "a label": "ValueError: labels[1, 1] = 37 is outside [0, 37)",
        "bounds": "ValueError: the shard of rank 1 begins at 0, but those before it end at 20",
        "size": "ValueError: vocab_size=38 is more than the 37 rows that the ranks hold together",
        "one bound": "ValueError: start and stop go together",
        "divergences": "ValueError: vocab_parallel: ranks [",
        "no tensor": "ValueError: weight is no matrix on some rank",
        "bias no tensor": "TypeError: bias must be a tensor, got float",
        "kind": "TypeError: vocab_parallel must be a VocabParallel, got str",
        "group": "TypeError: group must be a ProcessGroup",
    }
    assert said[0].pop("one rank raises") == (
        "RuntimeError: vocab_parallel: ranks [1] have raised an error before the first product"
    )
    assert said[1].pop("one rank raises").startswith("ValueError: bias has shape (37,), expected (17,)")
    # The last rank has the padding, so that only there the buffer is cut before it is looked at.
    assert {each.pop("main_grad no tensor").split(":")[0] for each in said} <= {"TypeError", "RuntimeError"}
    for each in said:
        assert {name: text[: len(words[name])] for name, text in each.items()} == words


def test_meshes_bounds_and_gradients_that_the_caller_adds_up(tmp_path):
    assert gloo.run("in_a_mesh", 2, tmp_path, [20, 17]) == [[], []]


def test_without_a_process_group_it_says_what_is_missing():
    with pytest.raises(ValueError, match="init_process_group"):
        VocabParallel(None)
