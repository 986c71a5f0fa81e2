"""``precompute_reference_logps``: the same numbers as batch by batch, kept, resumed, refused."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

from safetensors.torch import load_file

from dpo_kernels.integrations.precompute import FINAL, PART, model_fingerprint, precompute_reference_logps
from tests.test_integration_transformers import V, tiny


def rows(count=9, seed=0):
    g = torch.Generator().manual_seed(seed)

    def ids(least, most):
        return torch.randint(3, V, (int(torch.randint(least, most, (), generator=g)),), generator=g).tolist()

    return [{"prompt_ids": ids(1, 5), "chosen_ids": ids(1, 9), "rejected_ids": ids(1, 9)} for _ in range(count)]


def directly(model, row, side, max_length=None):
    ids = torch.tensor(row["prompt_ids"] + row[f"{side}_ids"])[:max_length]
    with torch.no_grad():
        logp = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    start = len(row["prompt_ids"])
    return sum(float(logp[i - 1, ids[i]]) for i in range(start, len(ids)))


def quiet(*args, **options):
    return precompute_reference_logps(*args, progress=False, **options)


@pytest.mark.parametrize(("batch_size", "max_length"), [(1, None), (4, None), (100, 6)])
def test_every_row_has_its_own_log_prob(tmp_path, batch_size, max_length):
    model, data = tiny("gemma2"), rows()
    got = quiet(model, data, tmp_path, batch_size=batch_size, max_length=max_length)
    for side in ("chosen", "rejected"):
        expected = torch.tensor([directly(model, row, side, max_length) for row in data])
        torch.testing.assert_close(got[f"ref_{side}_logps"], expected, rtol=1e-5, atol=1e-4)
    kept = load_file(tmp_path / FINAL)
    assert all(torch.equal(kept[name], value) for name, value in got.items())
    assert [file.name for file in tmp_path.iterdir()] == [FINAL]


def test_the_second_time_nothing_is_computed(tmp_path, monkeypatch):
    model, data = tiny("llama"), rows()
    first = quiet(model, data, tmp_path)
    monkeypatch.setattr(model.model, "forward", None)
    second = quiet(model, data, tmp_path, batch_size=2)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_that_stopped_goes_on_where_it_was(tmp_path):
    model, data = tiny("llama"), rows(12)
    whole = quiet(model, data, tmp_path / "whole", batch_size=4)
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == 5:  # the first is the head's self-check
            raise KeyboardInterrupt

    handle = model.model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        quiet(model, data, tmp_path / "cut", batch_size=4, save_every=1)
    assert len(list((tmp_path / "cut").glob(PART))) == 3
    again = quiet(model, data, tmp_path / "cut", batch_size=4, save_every=1)
    handle.remove()
    assert len(calls) == 5 + 1 + 3
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert [file.name for file in (tmp_path / "cut").iterdir()] == [FINAL]


KILLED = """
import sys, time, torch
from dpo_kernels.integrations.precompute import precompute_reference_logps
from tests.test_integration_precompute import rows, tiny
torch.set_num_threads(1)
model = tiny("llama")
model.model.register_forward_pre_hook(lambda *_: time.sleep(0.2))
precompute_reference_logps(model, rows(200), sys.argv[1], batch_size=4, save_every=2, progress=False)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_whole_files(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    until = time.monotonic() + 120
    while len(list(tmp_path.glob(PART))) < 3 and time.monotonic() < until:
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    parts = list(tmp_path.glob(PART))
    assert len(parts) >= 3
    model, data = tiny("llama"), rows(200)
    got = quiet(model, data, tmp_path, batch_size=4)
    expected = quiet(model, data, tmp_path / "other", batch_size=4)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("what", ["model", "data set", "option"])
@pytest.mark.parametrize("finished", [True, False])
def test_what_does_not_match_is_refused(tmp_path, what, finished):
    model, data, options = tiny("llama"), rows(), {}
    quiet(model, data, tmp_path)
    if not finished:
        part = load_file(tmp_path / FINAL)
        assert part
        (tmp_path / FINAL).rename(tmp_path / "part-000000.safetensors")
    if what == "model":
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    elif what == "data set":
        data[4]["rejected_ids"][-1] ^= 1
    else:
        options = {"max_length": 6}
    with pytest.raises(ValueError, match=f"another {what}: give another path"):
        quiet(model, data, tmp_path, **options)
    got = quiet(model, data, tmp_path, overwrite=True, **options)
    assert float(got["ref_chosen_logps"][0]) == pytest.approx(directly(model, data[0], "chosen", **options), abs=1e-4)


def test_an_adapter_that_is_off_is_another_model():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    on = model_fingerprint(model)
    with model.disable_adapter():
        assert model_fingerprint(model) != on
    assert model_fingerprint(model) == on
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model_fingerprint(model) != on


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        ([], {}, "no rows"),
        ([{"prompt": "a", "chosen": "b"}], {}, "no prompt_ids"),
        (None, {"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_arguments(data, options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        quiet(tiny("llama"), rows() if data is None else data, tmp_path, **options)


def test_a_progress_bar(tmp_path, capsys):
    precompute_reference_logps(tiny("llama"), rows(), tmp_path)
    assert "reference log-probs: 100%" in capsys.readouterr().err
