"""The benchmark suite measures what it says, refuses what is wrong, and survives what goes wrong."""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    bars,
    cases,
    data,
    devices,
    environment,
    measure,
    model,
    providers,
    report,
    run,
    store,
    tables,
    truth,
)
from benchmarks.cases import CASES, Case
from benchmarks.providers import Outputs, Provider, Unavailable, peers
from dpo_kernels.device_specs import GPUS

ROOT = Path(__file__).parents[2]
TINY = Case(
    "test/tiny", "cpu", "Small enough for a test", ("test",), 32, 199, 24, 2, "float32", prompt=0.25, level="all"
)
GPU_TINY = dataclasses.replace(TINY, name="test/gpu", device="cuda", reference="own")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    """The tiny cases are registered, threads are put back, and no file is fsynced a thousand times."""
    monkeypatch.setitem(CASES, TINY.name, TINY)
    monkeypatch.setitem(CASES, GPU_TINY.name, GPU_TINY)
    monkeypatch.setattr(store.os, "fsync", lambda _: None)
    monkeypatch.setattr(environment, "commit_and_changes", lambda: {"commit": "0" * 40, "dirty": False})


def few(**planted):
    """Ours by torch, full logits, the floor, and what a test plants."""
    known = providers.registry()
    return {name: known[name] for name in ("floor", "full logits", "ours/torch/chunked")} | planted


def measured(out, known, *arguments, device=None, name=TINY.name):
    """Run the suite on a tiny case; its status and the case's results."""
    command = ["--only", name, "--out", str(out), "--rounds", "2", "--threads", "1", "--in-process", *arguments]
    if device is None:
        command += ["--device", "cpu"]
    status = run.main(command, known, device)
    return status, store.load(out)["cases"][name]


def planted(change, **options):
    """Full logits with a fault."""
    right = providers.registry()["full logits"]

    def build(drawn, variant):
        step = right.build(drawn, variant)
        return lambda: change(drawn, step())

    return Provider("planted", "planted", "a fault", build, **options)


# --- registries -------------------------------------------------------------------------------------------------------


def test_every_case_and_provider_says_what_it_is():
    for name, case in CASES.items():
        assert (case.name, case.device in ("cpu", "cuda")) == (name, True)
        assert case.about
        assert case.groups
        assert case.level in cases.LEVELS
        assert case.reference in cases.REFERENCES
        assert case.device == "cpu" or name.startswith(("gpu", "test"))
    for name, provider in providers.registry().items():
        assert provider.name == name
        assert len(provider.about) > 20
        assert provider.family in ("ours", "floor") or provider.family
        assert provider.objective(TINY) in truth.OBJECTIVES


def test_cases_cover_what_was_asked_for():
    shapes = {(c.hidden, c.vocab) for c in CASES.values() if c.device == "cuda"}
    asked = {(4096, 128256), (3584, 151936), (4096, 151936), (5120, 151936), (2304, 256000), (3584, 256000)}
    assert asked | {(4096, 32000), (2048, 128256)} <= shapes
    assert {c.tokens for c in CASES.values() if "gpu-scaling" in c.groups} >= {2048, 131072}
    cpu = [c for c in CASES.values() if "cpu" in c.groups]
    assert {(c.hidden, c.vocab) for c in cpu} == set(cases.CPU_SHAPES)
    assert {(c.dtype, c.trainable) for c in cpu} == {(d, t) for d in ("float32", "bfloat16") for t in (True, False)}
    assert {v for c in CASES.values() if c.device == "cpu" for v in [c.vocab]} >= {32000, 49152, 128256}
    assert {c.reference for c in CASES.values()} == set(cases.REFERENCES)
    longest = CASES["gpu-axes/long-pair"]
    assert longest.lengths == (32768, 32768)


@pytest.mark.parametrize("name", [name for name in CASES if "cpu/" not in name])
def test_lengths_add_up(name):
    case = CASES[name]
    assert sum(case.lengths) == case.tokens
    assert len(case.lengths) == case.sequences
    assert min(case.lengths) > 0
    assert case.prompt_length + max(case.lengths) <= case.width
    shares = case.prompt + case.padding
    assert math.isclose(1 - case.tokens / case.positions, shares, abs_tol=0.05)


def test_selection_and_listing(capsys):
    assert {c.name for c in cases.select(["cpu"], "cpu")} == {n for n, c in CASES.items() if "cpu" in c.groups}
    assert all("bf16" in c.name for c in cases.select(["cpu/*/bf16/*"], "cpu"))
    assert cases.select([], "cuda", quick=True)
    assert run.main(["--only", "no such case", "--device", "cpu"]) == 2
    assert run.main(["--providers", "nobody", "--device", "cpu"]) == 2
    assert run.main(["--list", "--device", "cpu", "--quick"]) == 0
    printed = capsys.readouterr().out
    for name in [*providers.registry(), "quick/256x8192/n128/fp32/trainable", "cpu-axes"]:
        assert name in printed


# --- data and truth ---------------------------------------------------------------------------------------------------


def test_logits_are_peaked_like_a_trained_models():
    drawn = data.make(CASES["quick/1024x32000/n256/fp32/half"], torch.device("cpu"))
    found = data.statistics(drawn)
    assert 0.3 <= found["target_probability"] <= 0.5
    assert 1 <= found["entropy_nats"] <= 3
    assert 1e-5 < found["keep_rate"] < 1e-3
    scored = (drawn.labels != data.IGNORE).sum(1)
    assert tuple(scored.tolist()) == drawn.case.lengths


@pytest.mark.parametrize("objective", truth.OBJECTIVES)
@pytest.mark.parametrize("reference", cases.REFERENCES)
def test_the_full_size_truth_agrees_with_the_oracle(objective, reference):
    if objective == "cross-entropy" and reference != "cached":
        pytest.skip("it has no reference")
    drawn = data.make(dataclasses.replace(TINY, reference=reference), torch.device("cpu"))
    reduced = truth.Reduced(drawn)
    loss, logps, dX, dW = reduced.oracle(objective)
    drawn.hidden.grad, drawn.weight.grad = dX.float(), dW.float()
    sketch = truth.sketch(drawn, objective)
    errors = sketch.errors(drawn, loss, logps)
    assert max(errors.values()) < 2e-5, errors
    drawn.weight.grad = 1.5 * dW.float()
    assert sketch.errors(drawn, loss, logps)["dW"] == pytest.approx(0.5, rel=1e-4)


def test_a_frozen_head_gets_no_gradient_and_no_bar():
    drawn = data.make(dataclasses.replace(TINY, trainable=False), torch.device("cpu"))
    outputs = providers.registry()["full logits"].build(drawn, {})()
    assert set(truth.Reduced(drawn).errors("dpo", outputs.loss, outputs.logps)) == {"loss", "logps", "dX"}
    assert drawn.weight.grad is None


@pytest.mark.parametrize("reference", cases.REFERENCES)
def test_every_provider_that_runs_here_is_right(reference):
    """All but the compiled ones, which take seconds: they are gated where they are measured."""
    case = dataclasses.replace(TINY, reference=reference, dtype="bfloat16")
    drawn = data.make(case, torch.device("cpu"))
    reduced = truth.Reduced(drawn)
    ran = set()
    slow = {"full logits, compiled", "cut-cross-entropy, unfiltered", "TRL chunked head"}
    for name, provider in providers.registry().items():
        if name in slow or not provider.gated:
            continue
        for variant in provider.variants(case):
            drawn.clear()
            try:
                outputs = provider.build(drawn, variant)()
            except Unavailable:
                continue
            objective = provider.objective(case)
            errors = reduced.errors(objective, outputs.loss, outputs.logps)
            assert truth.is_green(errors, truth.allowed(reduced.plain, drawn, drawn, objective)), (name, errors)
            ran.add(name)
    assert {"full logits", "ours/torch/chunked", "ours/torch/recompute", "ours/torch/streaming"} <= ran


def test_a_masked_batch_is_timed_without_its_mask_too():
    known = providers.registry()
    case = dataclasses.replace(TINY, prompt=0.5, groups=("half",))
    drawn = data.make(case, torch.device("cpu"))
    masked, whole = known["ours/torch/chunked"], known["ours/torch/chunked, every position"]
    assert whole.runs_in(case)
    assert not whole.runs_in(TINY)
    for provider, positions in ((masked, case.tokens), (whole, case.positions)):
        drawn.clear()
        provider.build(drawn, {})()
        assert int(drawn.hidden.grad.abs().sum(dim=-1).gt(0).sum()) == positions


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_tiny_case_from_end_to_end(tmp_path, capsys):
    out = tmp_path / "results.json"
    status, found = measured(out, few())
    assert status == 0
    assert found["done"]
    assert set(found["rows"]) == {"floor", "full logits", "ours/torch/chunked"}
    for name, row in found["rows"].items():
        assert [number for number, _ in row["rounds"]] == [0, 1], name
        assert all(seconds > 0 for _, times in row["rounds"] for seconds in times)
        if name != "floor":
            assert row["gate"]["green"]
            assert row["full_size"]["green"]
            assert set(row["gate"]["errors"]) == {"loss", "logps", "dX", "dW"}
            assert row["memory"]["extra_bytes"] >= 0
    assert float(found["rows"]["ours/torch/chunked"]["token_error"]) < 1e-4
    assert {"date", "commit", "dirty", "torch", "triton", "python", "threads", "peers"} <= set(found["environment"])
    assert found["data"]["keep_rate"] > 0
    assert not out.with_suffix(".jsonl").exists()
    printed = capsys.readouterr().out
    assert "keep-rate" in printed
    assert "p20" in printed
    assert store.load(out)["machine"]["kind"] == "cpu"


def _scaled(drawn, outputs):
    drawn.weight.grad.mul_(1.5)
    return outputs


def _swapped(drawn, outputs):
    drawn.hidden.grad.neg_()
    return outputs


def _nan(drawn, outputs):
    drawn.hidden.grad[0, -1, 0] = math.nan
    return outputs


def _no_gradient(drawn, outputs):
    drawn.weight.grad = None
    return outputs


def _wrong_loss(drawn, outputs):
    return Outputs(outputs.loss + 0.01, outputs.logps)


@pytest.mark.parametrize("fault", [_scaled, _swapped, _nan, _no_gradient, _wrong_loss])
def test_the_gate_refuses_a_wrong_provider(tmp_path, fault):
    _, found = measured(tmp_path / "results.json", few(planted=planted(fault)))
    row = found["rows"]["planted"]
    assert row["reason"].startswith("wrong: ")
    assert not row["gate"]["green"]
    assert row["rounds"] == []
    assert len(found["rows"]["ours/torch/chunked"]["rounds"]) == 2
    line = next(one for one in tables.lines(found) if one.provider == "planted")
    assert line.seconds is None
    assert "wrong: " in tables.terminal(found)


SLIGHT = 1e-3  # of a gradient, or absolutely: ten times and more what the gate allows in float32 at this size


def _slightly(name):
    """A fault in one of the numbers, small enough for a wide gate."""

    def change(drawn, outputs):
        loss, logps = outputs.loss.detach(), outputs.logps.detach().clone()
        if name == "loss":
            return Outputs(loss + SLIGHT, logps)
        if name == "logps":
            logps[0] += SLIGHT  # of one sequence: a mean over all would hide half of it and more
        else:
            {"dX": drawn.hidden, "dW": drawn.weight}[name].grad.mul_(1 + SLIGHT)
        return Outputs(loss, logps)

    return change


@pytest.mark.parametrize("name", ["loss", "logps", "dX", "dW"])
def test_the_gate_is_narrow(name):
    drawn = data.make(TINY, torch.device("cpu"))
    reduced = truth.Reduced(drawn)
    allowed = truth.allowed(reduced.plain, drawn, drawn, "dpo")
    assert allowed[name] < SLIGHT / 5, "or the fault below shows nothing"
    for change, wrong in ((lambda drawn, outputs: outputs, set()), (_slightly(name), {name})):
        drawn.clear()
        outputs = planted(change).build(drawn, {})()
        errors = reduced.errors("dpo", outputs.loss, outputs.logps)
        assert {key for key, error in errors.items() if not error <= allowed[key]} == wrong
        assert truth.is_green(errors, allowed) == (not wrong)


def test_errors_are_the_largest_and_not_the_mean():
    drawn = data.make(TINY, torch.device("cpu"))
    reduced = truth.Reduced(drawn)
    right = providers.registry()["full logits"].build(drawn, {})()
    logps, tokens = right.logps.detach().clone(), reduced.oracle("dpo")[1]
    logps[1] = tokens[1] + 0.5
    assert reduced.errors("dpo", right.loss, logps)["logps"] == pytest.approx(0.5, rel=1e-6)
    hidden, weight = drawn.hidden.detach().double(), drawn.weight.detach().double()
    exact = (hidden @ weight.t()).log_softmax(-1).gather(-1, drawn.labels.clamp(min=0)[..., None])[..., 0]
    by_token = exact[drawn.labels != data.IGNORE]
    by_token[3] -= 0.25
    assert reduced.token_error(by_token) == pytest.approx(0.25, rel=1e-6)
    verdict = bars._judge("x", 1.0, {"a": 0.1, "b": 1.5, "c": 0.1}, 3, applies=True)
    assert (verdict.value, verdict.verdict) == ("1.50 (b; 3 of 3 cases)", "missed")


def test_what_is_wrong_at_full_size_only_is_refused_too(tmp_path):
    """A fault that begins after 64 tokens is not on the reduced copy."""

    def late(drawn, outputs):
        if drawn.case.tokens > 64:
            drawn.weight.grad.mul_(1.1)
        return outputs

    case = dataclasses.replace(TINY, name="test/longer", tokens=160)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CASES, case.name, case)
        _, found = measured(tmp_path / "results.json", few(planted=planted(late)), name=case.name)
    row = found["rows"]["planted"]
    assert row["gate"]["green"]
    assert not row["full_size"]["green"]
    assert row["rounds"] == []
    assert row["reason"].startswith("wrong: dW")


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (MemoryError("64 GiB"), "out of memory: 64 GiB"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), "out of memory"),
        (ValueError("no such size\nlong story"), "failed: ValueError: no such size"),
        (Unavailable("needs a tea kettle"), "needs a tea kettle"),
    ],
)
def test_a_provider_that_fails_is_a_row(tmp_path, raised, said):
    def fail(drawn, outputs):
        raise raised

    _, found = measured(tmp_path / "results.json", few(planted=planted(fail)))
    assert said in found["rows"]["planted"]["reason"]
    assert len(found["rows"]["floor"]["rounds"]) == 2


@pytest.mark.parametrize("module", ["trl", "liger_kernel", "cut_cross_entropy", "quack"])
def test_a_missing_peer_is_a_row_with_a_reason(tmp_path, monkeypatch, module):
    for name in list(sys.modules):
        if name == module or name.startswith(module + "."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    mine = {"trl": "TRL", "liger_kernel": "Liger", "cut_cross_entropy": "cut-cross-entropy", "quack": "quack"}[module]
    absent = {name: p for name, p in providers.registry().items() if name.startswith(mine)}
    _, found = measured(tmp_path / "results.json", few(**absent))
    for name in absent:
        assert "pip install" in found["rows"][name]["reason"]
        assert found["rows"][name]["rounds"] == []


def test_liger_tries_chunk_sizes_and_shows_its_best(tmp_path):
    pytest.importorskip("liger_kernel")
    assert [v["chunk_size"] for v in peers.liger_sizes(dataclasses.replace(TINY, pairs=8))] == [1, 4, 8]
    _, found = measured(tmp_path / "results.json", few(**{"Liger DPO": providers.registry()["Liger DPO"]}))
    row = found["rows"]["Liger DPO"]
    assert row["gate"]["green"]
    assert {tried["variant"]["chunk_size"] for tried in row["sweep"]} == {1, 2}
    best = min(row["sweep"], key=lambda tried: tried["seconds"])
    assert row["variant"] == best["variant"]


# --- what is timed ----------------------------------------------------------------------------------------------------


class Clock(devices.Cpu):
    """A call takes what its step says, else a second; ``log`` holds the names of the steps that were timed."""

    def __init__(self):
        super().__init__()
        self.taken, self.log = ("", 1.0), []

    def seconds(self, call):
        self.taken = ("", 1.0)
        call()
        self.log.append(self.taken[0])
        return self.taken[1]

    def provider(self, name, seconds, **options):
        """Full logits by another name, for so many seconds by variant."""
        right = providers.registry()["full logits"]

        def build(drawn, variant):
            step, number = right.build(drawn, {}), variant.get("number", 0)

            def timed():
                outputs = step()
                self.taken = (name, seconds[number])
                return outputs

            return timed

        variants = [{"number": number} for number in range(len(seconds))]
        return Provider(name, name, "of a known duration", build, variants=lambda case: variants, **options)


def test_the_fastest_variant_is_the_one_that_is_timed(tmp_path):
    clock = Clock()
    known = few(varied=clock.provider("varied", [3.0, 1.0, 2.0]))
    _, found = measured(tmp_path / "results.json", known, device=clock)
    row = found["rows"]["varied"]
    assert row["variant"] == {"number": 1}
    assert [tried["seconds"] for tried in row["sweep"]] == [3.0, 1.0, 2.0]
    assert row["rounds"] == [[0, [1.0]], [1, [1.0]]]


def test_each_round_begins_with_another_provider(tmp_path):
    """Whoever comes first finds other caches and clocks than whoever comes last: everybody does, in turn."""
    clock = Clock()
    known = {name: clock.provider(name, [1.0]) for name in ("a", "b", "c")}
    measured(tmp_path / "results.json", known, "--rounds", "4", device=clock)
    assert [clock.log[at : at + 3] for at in range(0, 12, 3)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    assert len(clock.log) == 12


@pytest.mark.parametrize("name", [TINY.name, GPU_TINY.name])
def test_no_call_finds_the_gradients_of_another(tmp_path, monkeypatch, name):
    """Adding to a gradient that is there costs more than writing one."""
    fresh = []

    def build(drawn, variant):
        step = providers.registry()["full logits"].build(drawn, variant)

        def seen():
            fresh.append(drawn.hidden.grad is None and drawn.weight.grad is None)
            return step()

        return seen

    device = None
    if name == GPU_TINY.name:
        monkeypatch.setattr(devices, "L2_FLUSH_BYTES", 4096)
        device = devices.Cuda(FakeCuda(), torch.device("cpu"))
    watched = Provider("watched", "watched", "looks", build, variants=lambda case: [{}, {}], compiles=("cpu", "cuda"))
    _, found = measured(tmp_path / "results.json", few(watched=watched), device=device, name=name)
    assert len(found["rows"]["watched"]["rounds"]) == 2
    assert len(fresh) >= 9  # checked, two variants of two calls each, two for the memory, and two rounds
    assert all(fresh)


# --- resuming ---------------------------------------------------------------------------------------------------------


class _Stop(BaseException):
    """As a kill: nobody catches it."""


def _stopping(after):
    """A provider that stops the process at its so many-th call."""
    calls = []

    def count(drawn, outputs):
        calls.append(1)
        if len(calls) == after:
            raise _Stop
        return outputs

    return planted(count), calls


def test_resuming_measures_nothing_again(tmp_path):
    out = tmp_path / "results.json"
    known = few()
    measured(out, known)
    before = out.read_text()

    def never(drawn, variant):
        raise AssertionError("measured again")

    measured(out, {name: dataclasses.replace(p, build=never) for name, p in known.items()}, "--resume")
    assert out.read_text() == before


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_a_killed_run_goes_on_where_it_was(tmp_path, after):
    """Stopped in the check, the memory pass, the first and the second round; then resumed."""
    out = tmp_path / "results.json"
    provider, _ = _stopping(after)
    with pytest.raises(_Stop):
        measured(out, few(planted=provider))
    journal = out.with_suffix(".jsonl")
    pieces = [json.loads(line) for line in journal.read_text().splitlines()]
    times = {(e["provider"], e["round"]): e["seconds"] for e in pieces if e["event"] == "time"}
    assert bool(times) == (after > 2)
    with journal.open("a") as file:
        file.write('{"event": "time", "name": "test/ti')  # the kill came while this was written
    provider, calls = _stopping(0)
    status, found = measured(out, few(planted=provider), "--resume")
    assert status == 0
    assert found["done"]
    assert {name: len(row["rounds"]) for name, row in found["rows"].items()} == dict.fromkeys(found["rows"], 2)
    for (name, number), seconds in times.items():
        assert [number, seconds] in found["rows"][name]["rounds"]
    kept = sum(
        e["event"] == "row" and e["provider"] == "planted" and bool({"gate", "memory"} & e["row"].keys())
        for e in pieces
    )
    assert len(calls) <= 5 - kept
    assert not journal.exists()


def test_a_broken_journal_is_an_error_unless_it_is_the_last_line(tmp_path):
    out = tmp_path / "results.json"
    out.with_suffix(".jsonl").write_text('{"event": "ca\n{"event": "done", "name": "x"}\n')
    with pytest.raises(ValueError, match="line 1: not JSON"):
        store.Store(out, {"name": "here"})


def test_another_version_does_not_finish_what_one_began(tmp_path, monkeypatch):
    """A finished case keeps its version; half a case, or one that lacks a provider, is measured again."""
    out = tmp_path / "results.json"
    measured(out, few())
    old = out.read_text()
    monkeypatch.setattr(environment, "commit_and_changes", lambda: {"commit": "1" * 40, "dirty": False})
    measured(out, few(), "--resume")
    assert out.read_text() == old
    provider, _ = _stopping(0)
    _, found = measured(out, few(planted=provider), "--resume")
    assert found["environment"]["commit"] == "1" * 40
    assert found["rows"]["floor"]["rounds"] != json.loads(old)["cases"][TINY.name]["rows"]["floor"]["rounds"]
    provider, _ = _stopping(4)
    with pytest.raises(_Stop):
        measured(out, few(planted=provider))
    monkeypatch.setattr(environment, "commit_and_changes", lambda: {"commit": "2" * 40, "dirty": False})
    provider, calls = _stopping(0)
    _, found = measured(out, few(planted=provider), "--resume")
    assert found["environment"]["commit"] == "2" * 40
    assert len(calls) == 4


def test_results_of_another_machine_are_not_overwritten(tmp_path):
    out = tmp_path / "results.json"
    store.Store(out, {"name": "there"}).write()
    with pytest.raises(ValueError, match="was measured on 'there'"):
        store.Store(out, {"name": "here"})


# --- processes --------------------------------------------------------------------------------------------------------

DYING = """
import json, os, signal, sys
asked = json.loads(sys.stdin.read())
def tell(**event):
    print(json.dumps(event), flush=True)
if "reason" not in asked["had"]["rows"].get("full logits", {}):
    tell(event="row", provider="floor", row={"family": "floor", "gate": None})
    tell(event="start", provider="full logits", what="check")
    os.kill(os.getpid(), signal.SIGKILL)
tell(event="time", provider="floor", round=0, seconds=[1.0])
tell(event="done")
"""


def test_a_process_that_dies_costs_one_row(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "WORKER", [sys.executable, "-c", DYING])
    out = tmp_path / "results.json"
    assert run.main(["--only", TINY.name, "--out", str(out), "--device", "cpu"], few()) == 0
    rows = store.load(out)["cases"][TINY.name]["rows"]
    assert "killed by signal 9" in rows["full logits"]["reason"]
    assert rows["floor"]["rounds"] == [[0, [1.0]]]


def test_a_piece_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    hang = DYING.replace("os.kill(os.getpid(), signal.SIGKILL)", "import time; time.sleep(60)")
    monkeypatch.setattr(run, "WORKER", [sys.executable, "-c", hang])
    monkeypatch.setattr(run, "PIECE_SECONDS", 0.5)
    out = tmp_path / "results.json"
    assert run.main(["--only", TINY.name, "--out", str(out), "--device", "cpu"], few()) == 0
    assert "stopped after" in store.load(out)["cases"][TINY.name]["rows"]["full logits"]["reason"]


def test_a_process_that_never_starts_is_not_a_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "WORKER", [sys.executable, "-c", "raise SystemExit('no torch here')"])
    out = tmp_path / "results.json"
    assert run.main(["--only", TINY.name, "--out", str(out), "--device", "cpu"], few()) == 1
    assert "no torch here" in capsys.readouterr().err


def test_a_real_worker(tmp_path):
    """The documented command on its smallest case, in a process of its own."""
    out = tmp_path / "results.json"
    command = ["--only", "quick/256x8192/n128/fp32/frozen", "--providers", "ours/torch/chunked", "--rounds", "2"]
    assert run.main([*command, "--device", "cpu", "--threads", "1", "--out", str(out)]) == 0
    rows = store.load(out)["cases"]["quick/256x8192/n128/fp32/frozen"]["rows"]
    assert set(rows) == {"floor", "full logits", "ours/torch/chunked"}
    assert all(len(row["rounds"]) == 2 for row in rows.values())
    assert rows["full logits"]["memory"]["extra_bytes"] is not None


# --- devices ----------------------------------------------------------------------------------------------------------


def test_peak_memory_of_a_cpu_is_that_of_the_call():
    device = devices.Cpu()
    size = 64 * 2**20

    def call():
        temporary = torch.ones(2 * size // 4)
        return temporary[: size // 4].clone()

    peak, kept = device.peak_bytes(call)
    if peak is None:
        pytest.skip("no counters of peak memory here")
    assert kept.numel() * 4 == size
    assert 2.98 * size < peak < 3.3 * size
    del kept
    assert device.peak_bytes(call)[0] == pytest.approx(peak, rel=0.1)


class FakeCuda:
    """As much of ``torch.cuda`` as the suite calls; every call takes 2 ms of a clock of its own."""

    def __init__(self):
        self.now, self.allocated, self.log = 0.0, 100, []
        api = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = api.now
                api.now += 2.0

            def elapsed_time(self, end):
                assert api.log[-1] == "synchronize"
                return end.at - self.at

        self.Event = Event

    def current_device(self):
        return 0

    def synchronize(self):
        self.log.append("synchronize")

    def empty_cache(self):
        self.log.append("empty")

    def reset_peak_memory_stats(self):
        self.peak = self.allocated

    def memory_allocated(self):
        return self.allocated

    def max_memory_allocated(self):
        return self.peak + 10**6

    def get_device_properties(self, _):
        return SimpleNamespace(
            name="NVIDIA H200", total_memory=141 * 10**9, multi_processor_count=132, major=9, minor=0
        )


def test_the_gpu_path_with_a_fake_gpu(tmp_path, monkeypatch):
    """Events, L2 flush, peak memory, three samples a round, driver and device: all but the GPU."""
    monkeypatch.setattr(devices, "L2_FLUSH_BYTES", 4096)
    monkeypatch.setattr(environment, "output_of", lambda *command: "580.1" if command[0] == "nvidia-smi" else None)
    device = devices.Cuda(FakeCuda(), torch.device("cpu"))
    device._flush.fill_(1)
    out = tmp_path / "gpu.json"
    known = few() | {name: p for name, p in providers.registry().items() if name.startswith("ours/triton")}
    _, found = measured(out, known, device=device, name=GPU_TINY.name)
    assert not device._flush.any()
    row = found["rows"]["ours/torch/chunked"]
    assert [len(times) for _, times in row["rounds"]] == [measure.GPU_REPEATS] * 2
    assert {seconds for _, times in row["rounds"] for seconds in times} == {2e-3}
    assert row["memory"]["extra_bytes"] == 10**6 - row["memory"]["output_bytes"]
    assert found["environment"]["driver"] == "580.1"
    assert "need CUDA" in found["rows"]["ours/triton/chunked"]["reason"]
    assert store.load(out)["machine"] | {"memory_bytes": 0} == {
        "kind": "cuda",
        "name": "NVIDIA H200",
        "memory_bytes": 0,
        "multiprocessors": 132,
        "capability": "9.0",
        "slug": "nvidia-h200",
    }


def test_a_broken_gpu_ends_the_process_and_costs_one_row(tmp_path, monkeypatch):
    def illegal(drawn, outputs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(devices, "L2_FLUSH_BYTES", 4096)
    device = devices.Cuda(FakeCuda(), torch.device("cpu"))
    known = few(planted=planted(illegal))
    status, found = measured(tmp_path / "gpu.json", known, device=device, name=GPU_TINY.name)
    assert status == 1
    assert "illegal memory access" in found["rows"]["planted"]["reason"]
    status, found = measured(tmp_path / "gpu.json", known, "--resume", device=device, name=GPU_TINY.name)
    assert status == 0
    assert len(found["rows"]["ours/torch/chunked"]["rounds"]) == 2


def test_no_cuda_is_an_error_in_words(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


# --- the static model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", list(GPUS.values()), ids=list(GPUS))
def test_the_model_orders_what_can_be_ordered(gpu):
    for case in (case for case in CASES.values() if case.name.startswith("gpu")):
        ways = {way: model.predict(case, gpu, way) for way in model.WAYS}
        assert all(one.over_floor >= 1 for one in ways.values()), case.name
        assert ways["floor"].over_floor == 1
        assert ways["chunked"].units == pytest.approx(case.units)
        if case.trainable:
            assert ways["chunked"].seconds < ways["recompute"].seconds < ways["streaming"].seconds, case.name
            assert ways["recompute"].units == pytest.approx(case.units + 1)
        else:
            assert ways["chunked"].seconds == ways["recompute"].seconds
        assert ways["full logits, compiled"].seconds < ways["full logits"].seconds
    slower = CASES["gpu/llama3-8b/n8192/bf16/trainable"]
    assert model.predict(slower, GPUS["A100"], "floor").seconds > model.predict(slower, gpu, "floor").seconds * 0.99


def test_what_the_host_adds_is_in_the_model():
    """The counted launches, at their usual cost, and the wait for the first GEMM; a short step notices most."""
    case, gpu = CASES["gpu/llama3-8b/n8192/bf16/trainable"], GPUS["H200"]
    shares = []
    for tokens in (512, 2048, 8192):
        work = model.ours_chunked(dataclasses.replace(case, tokens=tokens), gpu)
        chunks = -(-tokens // model.chunk_rows(dataclasses.replace(case, tokens=tokens)))
        assert work.launches == model.launches_of_ours(chunks, trainable=True, scores_reference=False)
        assert work.steps["host"] == model.IDLE_SECONDS
        assert 0 < work.steps["small kernels"] < work.launches * model.LAUNCH_SECONDS
        assert sum(work.steps.values()) == pytest.approx(work.seconds)
        shares.append((work.steps["host"] + work.steps["small kernels"]) / work.seconds)
    assert shares == sorted(shares, reverse=True)


def test_every_shortfall_names_what_causes_it():
    """The terms are the whole difference, so none is hidden in another; most bars are reached on an H200."""
    for gpu in GPUS.values():
        found = model.against_bars(CASES.values(), gpu)
        assert len(found) >= 20
        for one in found:
            case = CASES[one.case]
            assert one.predicted == pytest.approx(1 / model.predict(case, gpu, "chunked").over_floor)
            assert sum(one.terms.values()) == pytest.approx(1 / one.predicted - 1)
            assert {"reduce", "gradient"} & one.terms.keys() or "reduce and gradient" in one.terms
            assert list(one.terms.values()) == sorted(one.terms.values(), reverse=True)


def test_peers_are_predicted_at_their_best():
    found = model.against_peers(CASES.values(), GPUS["H200"])
    assert {one.what for one in found} == {way for way, _ in model.PEER_BARS}
    for one in found:
        ours, theirs = (model.predict(CASES[one.case], GPUS["H200"], way) for way in ("chunked", one.what))
        assert one.predicted == pytest.approx(theirs.seconds / ours.seconds)


def test_a_frozen_head_is_read_once_and_a_narrow_reference_not_at_all():
    gpu = GPUS["H200"]
    frozen = CASES["gpu/llama3-8b/n8192/bf16/frozen"]
    steps = {"logits", "reduce and gradient", "dX", "pack rows", "small kernels", "host"}
    assert set(model.ours_chunked(frozen, gpu).steps) == steps
    gpu = dataclasses.replace(gpu, streaming_measured=True)
    shared = dataclasses.replace(CASES["gpu-axes/own-reference"], hidden=1024)
    assert "reference rows" not in model.ours_chunked(shared, gpu).steps
    assert "reference rows" in model.ours_chunked(dataclasses.replace(shared, hidden=2048), gpu).steps


def test_the_model_keeps_its_promise_on_published_numbers():
    found = model.published()
    assert len([one for one in found if one.bound is not None]) >= 9
    for one in found:
        if one.bound is not None:
            assert abs(one.off) <= one.bound, one
        else:
            assert one.off < -0.2, "a kernel that is not modelled is slower than the model, or it would be promised"


# --- the report -------------------------------------------------------------------------------------------------------


def results_of(name, kind, chosen, **machine):
    """Planted results: ours at 1.09 of the floor, full logits at 2, TRL missing."""
    known = providers.registry()
    env = environment.record("cpu", 2) | ({"driver": "580.1", "cuda": "13.0"} if kind == "cuda" else {})
    state = {"schema": store.SCHEMA, "machine": {"kind": kind, "name": name, **machine}, "cases": {}}
    drawn = {"target_probability": 0.4, "entropy_nats": 2.0, "keep_rate": 2e-4, "largest_logit": 20.0, "rows": 64}
    for case in chosen:
        events = [{"event": "case", "case": store._plain(case), "environment": env}, {"event": "data", "data": drawn}]
        ours = "ours/cpp/chunked" if kind == "cpu" else "ours/triton/chunked"
        for provider, factor, mib in (
            ("floor", 1.0, 0),
            (ours, 1.09, 50),
            ("full logits", 2.0, 400),
            ("Liger DPO", 2.5, 300),
        ):
            errors = {"loss": [1e-7, 1], "logps": [1e-5, 1], "dX": [1e-3 * factor, 1], "dW": [1e-3, 1]}
            gate = None if provider == "floor" else {"green": True, "errors": errors}
            row = {
                "family": known[provider].family,
                "gate": gate,
                "memory": {"extra_bytes": mib * 2**20},
                "token_error": 1e-5,
            }
            events.append({"event": "row", "provider": provider, "row": row})
            for number in range(3):
                seconds = factor * case.unit_flop * case.units / 1e11 * (1 + 0.01 * number)
                events.append({"event": "time", "provider": provider, "round": number, "seconds": [seconds]})
        missing = {"family": "TRL", "reason": "TRL cannot be imported"}
        events.append({"event": "row", "provider": "TRL chunked head", "row": missing})
        for event in [*events, {"event": "done"}]:
            store.fold(state, {**event, "name": case.name})
    return state


@pytest.fixture
def planted_results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    cpu = [case for case in CASES.values() if {"cpu", "cpu-axes"} & set(case.groups)]
    gpu = [case for case in CASES.values() if {"gpu-models", "gpu-scaling"} & set(case.groups)]
    for slug, state in (
        ("cpu-one", results_of("2 × One", "cpu", cpu, flags=["avx512_bf16"])),
        ("nvidia-h200", results_of("NVIDIA H200", "cuda", gpu)),
    ):
        (folder / f"{slug}.json").write_text(store.dump(state))
    (folder / "demo-cpu.json").write_text('{"model": "another kind of file"}')
    return folder


def test_the_report_has_a_page_per_machine(planted_results, tmp_path):
    pages, readme, performance = tmp_path / "pages", tmp_path / "README.md", tmp_path / "performance.md"
    for page in (readme, performance):
        page.write_text(f"# x\n\n{report.BEGIN}\nold\n{report.END}\n")
    command = ["--results", str(planted_results), "--pages", str(pages)]
    command += ["--readme", str(readme), "--performance", str(performance)]
    assert report.main(command) == 0
    names = {path.name for path in pages.iterdir()}
    assert {"README.md", "model.md", "cpu-one.md", "nvidia-h200.md", "nvidia-a100.md", "nvidia-h100.md"} <= names
    for picture in ("over-floor", "speed-up", "memory", "accuracy", "scaling"):
        assert f"cpu-one-{picture}.png" in names
        assert f"](cpu-one-{picture}.png)" in (pages / "cpu-one.md").read_text()
    index = (pages / "README.md").read_text()
    assert "[NVIDIA A100](nvidia-a100.md) | **not measured**" in index
    assert "[NVIDIA H200](nvidia-h200.md) | 28" in index
    assert "Not measured" in (pages / "nvidia-h100.md").read_text()
    page = (pages / "nvidia-h200.md").read_text()
    assert "predicted on H200" in page
    assert "driver 580.1" in page
    assert "TRL cannot be imported" in page
    assert "| **1.09** (cpp/chunked) | 2.00 | – | 2.50 | 50 | 400 |" in performance.read_text()
    assert (
        "| H=1024 V=128256 N=2048 | **17.8 s, 50 MiB** | 32.6 s, 400 MiB | – | 40.7 s, 300 MiB |" in readme.read_text()
    )
    for page in (readme, performance):
        assert "Not measured, only predicted: [A100]" in page.read_text()
    for picture in re.findall(r'(?:src|srcset)="([^"]+)"', readme.read_text()):
        assert (tmp_path / picture).read_text().startswith("<?xml")
    for path in pages.glob("*.md"):
        for link in (part.split(")")[0] for part in path.read_text().split("](")[1:]):
            assert link.startswith("../../") or (pages / link).exists(), (path.name, link)
    assert report.main([*command, "--check"]) == 0
    changed = json.loads((planted_results / "cpu-one.json").read_text())
    for number in range(3):
        changed["cases"]["cpu/1024x32000/n2048/fp32/trainable"]["rows"]["ours/cpp/chunked"]["rounds"][number][1][0] *= (
            1.5
        )
    (planted_results / "cpu-one.json").write_text(json.dumps(changed))
    assert report.main([*command, "--check"]) == 1


def test_the_readme_shows_the_newest_machine_of_each_kind(planted_results):
    found = report.machines(planted_results)
    old, plain = (json.loads(json.dumps(found["cpu-one"])) for _ in range(2))
    for case in old["cases"].values():
        case["environment"]["date"] = "2020-01-01"
    plain["machine"] = plain["machine"] | {"flags": ["avx2"], "name": "2 × Plain"}
    known = found | {"a-old": old, "b-plain": plain}
    assert list(report.readme_machines(known)) == ["cpu-one", "nvidia-h200"]
    assert "Measured too: [2 × One](docs/benchmarks/a-old.md), [2 × Plain](docs/benchmarks/b-plain.md)." in (
        report.readme_section(known)
    )
    dtypes = {slug: {case["case"]["dtype"] for case in report.readme_cases(state)} for slug, state in known.items()}
    assert dtypes["b-plain"] == {"float32"}
    assert dtypes["cpu-one"] == dtypes["nvidia-h200"] == {"bfloat16"}


def test_a_page_without_markers_is_an_error():
    with pytest.raises(ValueError, match="no section between"):
        report.with_section("# nothing", "")


def test_the_readme_and_the_pages_are_what_the_results_say(monkeypatch):
    """`python -m benchmarks.report` makes them."""
    monkeypatch.delitem(CASES, GPU_TINY.name)  # planted above, and predicted for GPUs if it were left
    assert report.stale(store.RESULTS, report.PAGES, report.README, report.PERFORMANCE) == []


def test_the_bars_of_planted_results(planted_results, capsys):
    assert bars.main([str(planted_results / "cpu-one.json")]) == 0
    printed = capsys.readouterr().out.splitlines()
    verdicts = {line[16:].split(": <")[0].strip(): line[:16].strip() for line in printed if ": <" in line}
    assert verdicts["bf16, trainable, N=2048: time over the floor"] == "MET"
    assert verdicts["fp32, trainable, N=2048: time over the floor"] == "MET"
    assert verdicts["time over full logits, every shape, head and dtype"] == "MET"
    assert verdicts["time over TRL chunked head, every shape, head and dtype"] == "NOT MEASURED"
    assert verdicts["peak extra memory over that of Liger DPO, every shape, head and dtype"] == "MET"
    assert verdicts["bf16 on a CPU: error of token log-probs against float64, nats"] == "MET"
    state = store.load(planted_results / "cpu-one.json")
    found = list(bars.Bars(state, "full logits").all())
    assert found[0].verdict == "missed"
    name = "cpu/1024x32000/n256-half/fp32/trainable"
    rows = state["cases"][name]["rows"]
    masked = rows[bars.OURS] | {"rounds": [[0, [1.2]], [1, [1.5]], [2, [2.7]]]}
    whole = masked | {"rounds": [[0, [2.0]], [1, [3.0]], [2, [3.0]]]}
    rows.update({bars.OURS: masked, f"{bars.OURS}, every position": whole})
    half = next(bar for bar in bars.Bars(state).all() if bar.what.startswith("fp32, N=256: half"))
    assert (half.value, half.verdict) == (f"0.60 ({name}; 1 of 4 cases)", "not measured")
    state["machine"]["flags"] = []
    assert next(iter(bars.Bars(state, "full logits").all())).verdict == "does not apply"


def test_quantiles_and_ratios():
    assert store.quantile([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.2) == 2.0
    row = {"rounds": [[0, [2.0]], [1, [9.0, 8.0, 10.0]]]}
    floor = {"rounds": [[0, [1.0]], [1, [3.0]], [2, [5.0]]]}
    assert store.ratios(row, floor) == [2.0, 3.0]
    assert store.over({"rows": {"a": row, "floor": floor}}, "a") == 2.5
    assert measure.Effort(60.0, 3, 15).rounds(10.0) == 6
    assert measure.Effort(60.0, 3, 15).rounds(100.0) == 3
