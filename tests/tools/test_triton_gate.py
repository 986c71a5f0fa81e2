"""The ahead-of-time gate: our kernels pass it, and each planted configuration is refused for its own reason.

The gate runs in a process of its own: whoever imports triton cannot take it back.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.shared import made_once

ROOT = Path(__file__).resolve().parents[2]
PLANTED = "tests.triton_tools.planted"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

EVERY_TARGET = "sm_80, sm_86, sm_90, sm_100, sm_103, sm_120, gfx942, gfx950"
NARROW = r"\d{2,} accesses of 16 bits or fewer.*"
NOT_PIPELINED = "loads are not pipelined: "
# What the gate must say of tests/triton_tools/planted.py, in the order of its rules; nothing of what is good.
REASONS: dict[tuple[str, str], list[str]] = {
    ("good matmul", "sm_80"): [],
    ("good matmul", "sm_90"): [],
    ("good matmul", "sm_100"): [],
    ("good matmul for AMD", "gfx942"): [],
    ("good float32 matmul for AMD", "gfx942"): [],
    ("good softmax", "sm_90"): [],
    ("good softmax", "gfx942"): [],
    ("good matmul for 99 KiB", "sm_86"): [],
    ("good matmul for 99 KiB", "sm_120"): [],
    ("five stages", "sm_86"): ["131072 bytes of shared memory, sm_86 has 101376"],
    ("five stages", "sm_120"): ["131072 bytes of shared memory, sm_120 has 101376"],
    ("five stages", "sm_103"): [],
    ("eight stages", "sm_90"): ["262144 bytes of shared memory, sm_90 has 232448"],
    ("four stages on AMD", "gfx942"): ["98304 bytes of shared memory, gfx942 has 65536"],
    ("four stages on AMD", "gfx950"): [],
    ("square root", "sm_90"): ["the interpreter has no model of rsqrt.approx.ftz.f32"],
    ("square root", "gfx942"): ["the interpreter has no model of v_rsq_f32"],
    ("half the warps", "sm_90"): [r"\d{2,} local loads and stores in the MMA loop", r"\d{3,} bytes of stack.*"],
    ("one warp on AMD", "gfx942"): [r"\d{2,} local loads and stores in the MMA loop", r"\d{3,} bytes of stack.*"],
    ("row too long", "sm_80"): [r"\d{3,} bytes of stack, more than 128"],
    ("row too long", "sm_90"): [r"\d{3,} bytes of stack, more than 128"],
    ("float32 operands", "sm_80"): ["no mma.sync, no matrix instruction at all"],
    ("float32 operands", "sm_90"): ["no wgmma, no matrix instruction at all"],
    ("too few warps for wgmma", "sm_90"): ["no wgmma but mma.sync"],
    ("one stage", "sm_80"): [NOT_PIPELINED + "no cp.async, no TMA"],
    ("one stage", "sm_90"): [NOT_PIPELINED + "no cp.async, no TMA"],
    ("one stage", "gfx942"): [NOT_PIPELINED + "the MMA loop waits for what it loads"],
    ("odd rows without padding", "sm_90"): [NARROW],
    ("width not a multiple of 16", "sm_90"): [NARROW, NOT_PIPELINED + "no cp.async, no TMA"],
    ("more registers than ptxas has", "sm_90"): [r"does not compile: ptxas.*Insufficient registers.*"],
    ("integer turned float", "sm_90"): [r"does not compile: .*initial type int32 but is re-assigned to fp32.*"],
    ("compiler aborts", "sm_90"): ["does not compile: crash: LLVM ERROR: Cannot select: the compiler aborts"],
    ("a parameter forgotten", "sm_90"): [r"does not compile: .*disagree on the parameters total"],
}


# Runs of the gate one after another in a process that imports torch and triton once; prints what each of them said.
SESSION = """if True:
    import contextlib, dataclasses, io, json, os, sys
    from pathlib import Path
    from tests.triton_tools import gate

    folder, planted, said = Path(sys.argv[1]), sys.argv[2], {}

    def run_gate(name, cache, *arguments):
        os.environ["DPO_KERNELS_CHECK_CACHE"] = str(folder / cache)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = gate.main(["--modules", planted, *arguments])
        said[name] = code, printed.getvalue()

    run_gate("planted", "planted", "--json", str(folder / "table.json"))

    one = ("--only", "good softmax", "--targets", "sm_90")
    run_gate("cold", "one", *one)
    run_gate("warm", "one", *one)
    (record,) = (folder / "one").glob("*.json")
    record.write_text('{"registers"', encoding="utf-8")
    run_gate("damaged", "one", *one)
    run_gate("nothing", "nothing", "--only", "no such name")

    from tests.triton_tools.aot import Measured

    kept = json.loads(gate.KEPT.read_text(encoding="utf-8"))
    name, facts = next((n, f) for n, f in kept["kernels"].items() if f["matrix"] and f["widest_bits"] == 128)
    configuration, target = name.split(" @ ")
    facts = {fact: value for fact, value in facts.items() if fact != "of"}
    changes = {"registers": facts["registers"] * 2, "widest_bits": 64, "matrix": {}, "shared_bytes": 0}
    worse = gate.Verdict(configuration, target, Measured(**facts | changes), [])
    same = gate.Verdict(configuration, target, Measured(**facts), [])
    said["the same, by another version"] = [
        gate.regressions([same], kept, kept["triton"]), gate.regressions([worse], kept, "0.0")
    ]
    said["worse"] = [line.split(": ")[1].split()[0] for line in gate.regressions([worse], kept, kept["triton"])]
    ours = gate.all_jobs([gate.CONFIGURED])
    named = [f"{gate._configuration(job).name} @ {job.target}" for job in ours]
    said["unlike what is kept"] = sorted({*named} ^ {*kept["kernels"]})

    class Compiled(Exception): pass

    def compile_all(jobs, cache):
        raise Compiled(*(ours.index(job) for job in jobs))

    gate._compile_all, empty = compile_all, folder / "empty"

    def compiled(known):
        try:
            list(gate.measured_or_why(ours, empty, known))
        except Compiled as jobs:
            return [named[index] for index in jobs.args]

    known = {gate._key(job): Measured(**facts) for job in ours}
    said["compiled although known"] = compiled(known)
    del known[gate._key(ours[-1])]
    said["compiled because unknown"] = compiled(known)[-1:] == named[-1:]
    said["compiled"] = compiled(None) == named

    jobs = gate.all_jobs([planted])
    said["ungated"] = gate.ungated([planted], [job for job in jobs if job.target != "sm_90"])
    (folder / "said.json").write_text(json.dumps(said), encoding="utf-8")
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Even where the interpreter is asked for: the gate has nothing to compile in it.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800, check=False)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where SESSION has left what was said."""

    def make(folder: Path) -> None:
        done = run("-c", SESSION, str(folder), PLANTED)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr

    return made_once(tmp_path_factory, "gate", make)


@pytest.fixture(scope="module")
def said(session: Path) -> dict[str, Any]:
    return json.loads((session / "said.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_every_configuration_of_every_kernel_passes() -> None:
    """Compiled where measured.json does not know it: for one configuration of each target, and after a change."""
    done = run("-m", "tests.triton_tools.gate", "--known")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_gate_bites(session: Path, said: dict[str, Any]) -> None:
    code, printed = said["planted"]
    assert code == 1
    assert len(printed) < 10_000, "no compiler's output"
    table = json.loads((session / "table.json").read_text(encoding="utf-8"))
    reasons = {(entry["name"], entry["target"]): entry["reasons"] for entry in table}
    assert reasons.keys() == REASONS.keys()
    for key, expected in REASONS.items():
        assert len(reasons[key]) == len(expected), (key, reasons[key])
        for reason, pattern in zip(reasons[key], expected, strict=True):
            assert re.fullmatch(pattern, reason), (key, reason)
            assert reason in printed


def test_what_was_measured_is_kept_until_it_is_damaged(said: dict[str, Any]) -> None:
    assert said["cold"][0] == said["warm"][0] == said["damaged"][0] == 0
    assert "compiling 1 of 1" in said["cold"][1]
    assert "compiling" not in said["warm"][1]
    assert "good softmax" in said["warm"][1]
    assert "compiling 1 of 1" in said["damaged"][1]


def test_what_is_known_is_compiled_once_for_each_target(said: dict[str, Any]) -> None:
    targets = [name.split(" @ ")[1] for name in said["compiled although known"]]
    assert sorted(targets) == ["gfx942", "gfx950", "sm_100", "sm_103", "sm_120", "sm_80", "sm_86", "sm_90"]
    assert said["compiled because unknown"]
    assert said["compiled"]


def test_worse_code_than_before_is_seen(said: dict[str, Any]) -> None:
    assert said["the same, by another version"] == [[], []]
    assert said["worse"] == ["registers", "widest_bits", "matrix"]
    assert said["unlike what is kept"] == []


def test_nothing_to_compile_is_no_success(said: dict[str, Any]) -> None:
    assert said["nothing"] == [1, f"no configuration to compile in {PLANTED}\n"]


def test_a_kernel_without_a_configuration_is_named(said: dict[str, Any]) -> None:
    assert said["ungated"] == [
        f"{PLANTED}.matmul: no configuration for sm_90",
        f"{PLANTED}.softmax_rows: no configuration for sm_86, sm_90, sm_100, sm_103, sm_120, gfx950",
        f"{PLANTED}.normalise_rows: no configuration for sm_80, sm_86, sm_90, sm_100, sm_103, sm_120, gfx950",
        f"{PLANTED}.count_up: no configuration for {EVERY_TARGET}",
        f"{PLANTED}.abort: no configuration for {EVERY_TARGET}",
    ]
