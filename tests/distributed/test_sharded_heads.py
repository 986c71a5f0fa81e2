"""A model that an engine shards trains as one process with the joint batch does."""

import pickle

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from dpo_kernels.distributed import unsharded
from tests.distributed import gloo, own_loops, training
from tests.shared import made_once

pytestmark = pytest.mark.slow

# Starts of the processes: how many there are, and the groups of cases that run on them.
STARTS = {
    "torch": (2, [("training", "FSDP2"), ("training", "DDP and FSDP1"), ("own_loops", "FSDP2")]),
    "DeepSpeed": (2, [("training", "ZeRO"), ("own_loops", "ZeRO")]),
    "four": (4, [("training", "on four"), ("own_loops", "on four")]),
}
MODULES = {"training": training, "own_loops": own_loops}
CASES = [
    pytest.param(start, f"{module} {group}: {case}", id=f"{module} {group}: {case}")
    for start, (_, groups) in STARTS.items()
    for module, group in groups
    for case in MODULES[module].CASES[group]
]


@pytest.fixture(scope="module")
def found_by(tmp_path_factory):
    def found_by(start):
        world, groups = STARTS[start]
        if start == "DeepSpeed":
            pytest.importorskip("deepspeed", reason="deepspeed is not installed")

        def make(out):
            try:
                gloo.run("everything", world, out, groups, module="own_loops", seconds=500)
            except AssertionError as error:  # every test of this start fails, but it is not started again
                (out / "failed").write_text(str(error))

        folder = made_once(tmp_path_factory, f"heads-{start}", make)
        assert not (folder / "failed").exists(), (folder / "failed").read_text()
        return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(world)]

    return found_by


@pytest.mark.parametrize(("start", "case"), CASES)
def test_training_equals_one_process(found_by, start, case):
    found = found_by(start)
    assert [each[case] for each in found] == [[]] * len(found)


def test_a_rank_whose_batch_is_padding_compares_in_step_with_the_others(found_by):
    assert [each["checked"] for each in found_by("four")] == [[True, True]] * 4


def test_without_gradients_the_head_is_a_shard_again_after_the_context(found_by):
    assert [each["without gradients"] for each in found_by("four")] == [[True, "DTensor"]] * 4


def test_a_backward_pass_after_the_engine_has_freed_the_head_is_told_so(found_by):
    for each in found_by("four"):
        again, gathered = each["freed"]
        assert again.startswith("the head's weight was freed before this backward pass")
        assert gathered == "no error"


def test_results_keep_their_precision_whatever_the_unit_returns(found_by):
    assert [each["dtypes"] for each in found_by("four")] == [["torch.float32", "torch.bfloat16"] * 2] * 4


@pytest.mark.parametrize(
    ("case", "words"),
    {
        "larger unit": "Linear has DTensor weights, but fully_shard was not called with it",
        "FSDP1": "FSDP1 does not reduce gradients of weights that are gathered outside of a forward",
        "FSDP1, own": "FSDP1 does not reduce gradients of weights that are gathered outside of a forward",
        "not attached": "an engine shards the head, and its weight is whole in the head's own forward only",
        "adapter apart": "the head has an adapter whose weight is sharded",
        "rows, outside": "sparse_weight_grad does not go with FSDP2, which reduces dense gradients over ranks",
        "rows, own unit": "sparse_weight_grad does not go with FSDP2, which reduces dense gradients over ranks",
        "rows, larger unit": "sparse_weight_grad does not go with FSDP2, which reduces dense gradients over ranks",
        "rows, FSDP1": "sparse_weight_grad needs a weight that is a parameter itself",
    }.items(),
)
def test_what_cannot_be_is_said(found_by, case, words):
    for each in found_by("four"):
        assert each[case].startswith(words)


def test_a_weight_is_no_module():
    with (
        pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, got Tensor: pass the head"),
        unsharded(torch.ones(3, 2)),
    ):
        pass
