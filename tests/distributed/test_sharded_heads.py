"""A model that an engine shards trains as one process with the joint batch does."""

import pickle

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from tests.distributed import gloo, own_loops, training
from tests.shared import made_once

# Starts of the processes: the module that runs on them, the group of its cases, and how many processes there are.
STARTS = {
    "FSDP2": ("training", "FSDP2", 2),
    "on three": ("training", "on three", 3),
    "DDP and FSDP1": ("training", "DDP and FSDP1", 2),
    "ZeRO": ("training", "ZeRO", 2),
    "loops": ("own_loops", "FSDP2", 2),
    "ZeRO loops": ("own_loops", "ZeRO", 2),
}
CASES = [
    pytest.param(start, case, id=f"{start}: {case}")
    for start, (module, group, _) in STARTS.items()
    for case in {"training": training, "own_loops": own_loops}[module].CASES[group]
]


def found_by(start, factory):
    module, group, world = STARTS[start]
    if group == "ZeRO":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    folder = made_once(
        factory,
        f"heads {start}",
        lambda out: gloo.run("every_case", world, out, group, module=module),
    )
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(world)]


@pytest.mark.parametrize(("start", "case"), CASES)
def test_training_equals_one_process(tmp_path_factory, start, case):
    found = found_by(start, tmp_path_factory)
    assert [each[case] for each in found] == [[]] * len(found)


def test_ranks_stay_in_step_and_are_told_what_cannot_be(tmp_path):
    for said in gloo.run("others", 2, tmp_path, module="own_loops"):
        assert said["checked"] == [True, True]
        assert said["without gradients"] == [True, "DTensor"]
        assert said["larger unit"].startswith("Linear has DTensor weights, but fully_shard was not called with it")
        assert said["FSDP1"].startswith("FSDP1 does not reduce gradients of weights")
        assert said["FSDP1, own"] == said["FSDP1"]
        assert said["adapter apart"].startswith("the head has an adapter whose weight is sharded")
