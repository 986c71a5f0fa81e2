"""``FusedDPOTrainer`` and ``patch_trl`` on two processes, under FSDP and DeepSpeed as accelerate sets them up."""

import functools

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("datasets", reason="datasets is not installed")
pytest.importorskip("trl", reason="trl is not installed")
pytest.importorskip("peft", reason="peft is not installed")

from tests.distributed import gloo
from tests.trl_helpers import NOT_LOGGED_TWICE, OTHERS_WARNINGS

pytestmark = [*OTHERS_WARNINGS, pytest.mark.slow]

DPO = {
    "FSDP": [
        *(("FSDP2", name) for name in ("llama", "gemma2", "llama, LoRA", "gemma2, LoRA, precomputed")),
        ("FSDP1", "llama"),
    ],
    "ZeRO": [
        *(("ZeRO-3", name) for name in ("llama", "gemma2", "loaded, LoRA", "gemma2, LoRA, precomputed")),
        ("ZeRO-2", "llama"),
    ],
}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Runs all cases of a kind of engine in one start of two processes, at the first test that wants one of them."""

    @functools.cache
    def start(kind):
        if kind == "ZeRO":
            pytest.importorskip("deepspeed", reason="deepspeed is not installed")
        folder = tmp_path_factory.mktemp(kind)
        return gloo.run("against_stock", 2, folder, DPO[kind], str(folder), module="trl_engines")[0]

    return start


def assert_logs_agree(stock, ours):
    assert len(ours) == len(stock)
    for theirs, mine in zip(stock, ours, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            if not any(word in key for word in NOT_LOGGED_TWICE):
                assert abs(mine[key] - value) <= 1e-5 * max(1.0, abs(value)), key


@pytest.mark.parametrize(
    ("kind", "engine", "case"),
    [(kind, *pair) for kind, pairs in DPO.items() for pair in pairs],
    ids=lambda value: value,
)
def test_logs_and_parameters_are_those_of_trl(kind, engine, case, started):
    stock, ours = started(kind)[engine, case]
    assert ours["reason"] == ""
    assert ours["engine"] == {"FSDP": "FSDP", "ZeRO": "DEEPSPEED"}[kind]
    assert_logs_agree(stock["log"], ours["log"])
    assert any("eval_rewards/margins" in entry for entry in ours["log"])
    assert ours["parameters"].keys() == stock["parameters"].keys()
    for name, value in stock["parameters"].items():
        torch.testing.assert_close(ours["parameters"][name], value, rtol=1e-5, atol=2e-6, msg=f"{name}: {{}}".format)
