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

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dpo_kernels.integrations import precompute, precompute_files, precompute_rows
from dpo_kernels.integrations.precompute import FINAL, PART, precompute_reference_logps
from tests.integration_helpers import V, leaving, rows, tiny


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


def test_a_model_that_ran_meanwhile_finds_its_files(tmp_path):
    model = leaving("recurrent_gemma")
    first = quiet(model, rows(), tmp_path)
    second = quiet(model, rows(), tmp_path)
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
import pathlib, sys, time, torch
from dpo_kernels.integrations.precompute import PART, precompute_reference_logps
from tests.integration_helpers import rows, tiny
torch.set_num_threads(1)
model = tiny("llama")
folder = pathlib.Path(sys.argv[1])
model.model.register_forward_pre_hook(lambda *_: time.sleep(600 if len(list(folder.glob(PART))) == 3 else 0))
precompute_reference_logps(model, rows(40), folder, batch_size=4, save_every=2, progress=False)
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
    assert len(parts) == 3
    model, data = tiny("llama"), rows(40)
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


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_log_probs_of_another_adapter_are_not_served(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def adapted(alpha, name="default"):
        torch.manual_seed(4)
        model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"], lora_alpha=alpha), name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.2)
        return model.eval()

    data = rows()
    plain = quiet(tiny("llama"), data, tmp_path / "plain")
    first = quiet(adapted(8), data, tmp_path)
    with pytest.raises(ValueError, match="another model: give another path"):
        quiet(adapted(64), data, tmp_path)
    model = adapted(8, name="another")
    assert all(torch.equal(first[name], value) for name, value in quiet(model, data, tmp_path).items())
    with model.disable_adapter():
        assert all(torch.equal(plain[name], value) for name, value in quiet(model, data, tmp_path / "plain").items())
    assert (first["ref_chosen_logps"] - plain["ref_chosen_logps"]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        ([], {}, "no rows"),
        ([{"prompt": "a", "chosen": "b"}], {}, "no prompt_ids"),
        ([{"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": None}], {}, "row 0 of dataset has no rejected_ids"),
        (None, {"batch_size": 0}, "batch_size must be at least 1"),
        (None, {"pad_token_id": -1}, rf"pad_token_id must be an id of the model, 0 to {V - 1}, got -1"),
    ],
)
def test_bad_values(data, options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        quiet(tiny("llama"), rows() if data is None else data, tmp_path, **options)


@pytest.mark.parametrize("side", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("wrong", [-200, -1, V])
def test_ids_that_the_model_does_not_have_are_named_before_it_sees_them(side, wrong, tmp_path):
    data, model = rows(), tiny("llama")
    place = len(data[4][f"{side}_ids"])
    data[4][f"{side}_ids"] = [*data[4][f"{side}_ids"], wrong]
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    words = rf"row 4 of dataset: {side}_ids has the token id {wrong} at position {place}, .* 0 to {V - 1}"
    with pytest.raises(ValueError, match=words):
        quiet(model, data, tmp_path)


def test_ids_that_are_cut_off_may_be_any(tmp_path):
    data = rows()
    data[0] = {"prompt_ids": [3, 4], "chosen_ids": [5, -200], "rejected_ids": [6, 7]}
    data[1] = {"prompt_ids": [3, 4, 5, 6], "chosen_ids": [-200], "rejected_ids": [V]}
    assert len(quiet(tiny("llama"), data, tmp_path, max_length=3)["ref_chosen_logps"]) == len(data)


class DatasetDict(dict):
    """As in datasets."""


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda data: DatasetDict(train=data, test=data), "a DatasetDict of train, test: give one split"),
        (lambda data: {name: [row[name] for row in data] for name in data[0]}, r"from_dict\(columns\)"),
        (lambda data: pytest.importorskip("pandas").DataFrame(data), r"a DataFrame, which .*to_dict\('records'\)"),
        (lambda data: Stream([{**data[0], "chosen_ids": [3.0]}]), r"row 0 of dataset: chosen_ids .*\[3\.0\]"),
        (lambda data: Stream([data[0], {**data[0], "prompt_ids": "text"}]), "row 1 of dataset: prompt_ids .*got text"),
        (lambda data: Stream([{**data[0], "rejected_ids": torch.tensor(3)}]), r"rejected_ids .*got tensor\(3\)"),
        (lambda data: 5, "rows by index or a stream of rows, got int"),
        (lambda data: ["text"] * 3, "row 0 of dataset must be a mapping with prompt_ids, got str"),
        (lambda data: [{**data[0], "chosen_ids": [3.0]}], r"row 0 of dataset: chosen_ids must be token ids .*\[3\.0\]"),
        (lambda data: [{**data[0], "prompt_ids": "text"}], "row 0 of dataset: prompt_ids must be token ids"),
        (lambda data: [{**data[0], "prompt_ids": [[3, 4]]}], "row 0 of dataset: prompt_ids must be token ids"),
        (lambda data: [{**data[0], "rejected_ids": 3}], "row 0 of dataset: rejected_ids must be token ids"),
    ],
)
def test_what_is_not_a_data_set_of_rows_is_refused_with_what_to_do(wrong, words, tmp_path):
    with pytest.raises(TypeError, match=words):
        quiet(tiny("llama"), wrong(rows()), tmp_path)
    with pytest.raises(TypeError, match="pad_token_id must be an integer, got None"):
        quiet(tiny("llama"), rows(), tmp_path, pad_token_id=None)


class Counted(torch.utils.data.IterableDataset):
    """A stream of torch's that knows how long it is."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        yield from self.data

    def __len__(self):
        return len(self.data)


class Stream:
    """Rows one after the other, with no length and no index."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        yield from self.data


@pytest.mark.parametrize(
    "kind", ["iterable", "generator", "datasets", "torch", "iterators", "tensors", "bytes", "arrays", "records"]
)
def test_a_stream_and_other_rows_simply_work(kind, tmp_path):
    model, data = tiny("llama"), rows()
    expected = quiet(model, data, tmp_path)
    given = {
        "iterable": lambda: Stream(data),
        "generator": lambda: ({**row, "text": "not looked at"} for row in data),
        "datasets": lambda: pytest.importorskip("datasets").Dataset.from_list(data).to_iterable_dataset(),
        "torch": lambda: Counted(data),
        "iterators": lambda: ({name: iter(ids) for name, ids in row.items()} for row in data),
        "tensors": lambda: ({name: torch.tensor(ids) for name, ids in row.items()} for row in data),
        "bytes": lambda: ({name: bytes(ids) for name, ids in row.items()} for row in data),
        "arrays": lambda: [{name: torch.tensor(ids) for name, ids in row.items()} for row in data],
        "records": lambda: pytest.importorskip("pandas").DataFrame(data).to_dict("records"),
    }[kind]()
    got = quiet(model, given, tmp_path, batch_size=2)  # served from disk: the same data set
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_a_stream_is_kept_in_little_memory():
    kept = precompute_rows.rows_by_index(Stream([{"prompt_ids": list(range(1000, 2000)), "text": "left out"}]))
    assert set(kept[0]) == {"prompt_ids"}
    assert sys.getsizeof(kept[0]["prompt_ids"]) < 5000
    large = precompute_rows.rows_by_index(
        Stream([{"prompt_ids": [1, 2**40]}])
    )  # which no model has: refused as any other id
    assert list(large[0]["prompt_ids"]) == [1, 2**40]


def test_every_row_is_fetched_once_for_the_fingerprint():
    fetched = []

    class Fetching(list):
        def __getitem__(self, number):
            fetched.append(number)
            return super().__getitem__(number)

    precompute_rows.TokenRows(Fetching(rows(5)), None, (V, V))
    assert fetched == list(range(5))


@pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "other tensors", "nan", "short"])
@pytest.mark.parametrize("name", [FINAL, "part-000000.safetensors"])
def test_a_file_that_cannot_be_read_is_named_and_overwritten(name, damage, tmp_path):
    model, data = tiny("llama"), rows()
    expected = quiet(model, data, tmp_path)
    whole, file = (tmp_path / FINAL).read_bytes(), tmp_path / name
    with safe_open(tmp_path / FINAL, framework="pt") as opened:
        key = opened.metadata()
    (tmp_path / FINAL).unlink()
    if damage in ("empty", "cut", "garbage"):
        file.write_bytes({"empty": b"", "cut": whole[:-3], "garbage": b"garbage" * 99}[damage])
    else:
        count = len(data) - (damage == "short")
        values = torch.full((count,), torch.nan if damage == "nan" else -3.0)
        sequences = torch.arange(count) + (99 if damage == "short" else 0)
        tensors = {"ref_chosen_logps": values, "ref_rejected_logps": values.clone()}
        if name != FINAL:
            tensors = {"sequences": sequences, "logps": values}
        save_file({"other": values} if damage == "other tensors" else tensors, file, metadata=key)
    words = "holds log-probs that are not numbers" if damage == "nan" else r"cannot be read \(.*\)"
    with pytest.raises(ValueError, match=rf"{file} {words}: give another path, or overwrite=True"):
        quiet(model, data, tmp_path)
    got = quiet(model, data, tmp_path, overwrite=True)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert [file.name for file in tmp_path.iterdir()] == [FINAL]
    assert all(torch.equal(load_file(tmp_path / FINAL)[name], value) for name, value in expected.items())


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_log_probs_that_are_not_numbers_are_neither_kept_nor_returned(value, tmp_path, monkeypatch):
    model, data = tiny("llama"), rows(12)
    computed, sizes = precompute.fused_sequence_logps, []

    def broken(hidden, *args, **options):
        sizes.append(len(hidden))
        logps = computed(hidden, *args, **options)
        return logps.index_fill(0, torch.tensor([1]), value) if len(sizes) == 3 else logps

    monkeypatch.setattr(precompute, "fused_sequence_logps", broken)
    with pytest.raises(ValueError, match=rf"row \d+ of dataset: the (chosen|rejected) log-prob is {value}"):
        quiet(model, data, tmp_path, batch_size=4, save_every=1)
    assert sizes == [4, 4, 4]  # not at the end of hours
    parts = [load_file(file)["logps"] for file in tmp_path.glob(PART)]
    assert len(parts) == 2
    assert torch.isfinite(torch.cat(parts)).all()
    got = quiet(model, data, tmp_path, batch_size=4)
    assert all(torch.equal(got[n], v) for n, v in quiet(model, data, tmp_path / "other", batch_size=4).items())


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path, monkeypatch):
    model, data = tiny("llama"), rows(12)
    save, written = precompute_files.save_file, []

    def interrupted(tensors, file, metadata):
        written.append(file.name)
        if len(written) == 2:
            file.write_bytes(b"half of it")
            raise KeyboardInterrupt
        save(tensors, file, metadata=metadata)

    monkeypatch.setattr(precompute_files, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quiet(model, data, tmp_path, batch_size=4, save_every=1)
    assert [file.name for file in tmp_path.iterdir()] == ["part-000000.safetensors"]
    (tmp_path / "part-000001.unfinished").write_bytes(b"left by a process that was killed")
    got = quiet(model, data, tmp_path, batch_size=4, save_every=1)
    assert [file.name for file in tmp_path.iterdir()] == [FINAL]
    assert not any(name.endswith(".safetensors") for name in written)
    expected = quiet(model, data, tmp_path / "other", batch_size=4)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_a_model_whose_layers_are_offloaded(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, data = tiny("llama"), rows()
    expected = quiet(model, data, tmp_path)
    accelerate.cpu_offload(model.model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    got = quiet(model, data, tmp_path / "offloaded")
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    quiet(model, data, tmp_path)


def test_the_check_of_the_head_can_be_left_out(tmp_path):
    model, data = tiny("llama"), rows()
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + torch.arange(float(V)))
    with pytest.raises(RuntimeError, match=r"does not reproduce the logits.*check=False"):
        quiet(model, data, tmp_path)
    got = quiet(model, data, tmp_path, check=False)
    expected = quiet(tiny("llama"), data, tmp_path / "other")
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_a_progress_bar(tmp_path, capsys):
    precompute_reference_logps(tiny("llama"), rows(), tmp_path)
    assert "reference log-probs: 100%" in capsys.readouterr().err
