"""The ahead-of-time gate: our kernels pass it, and each planted configuration is refused for its own reason.

The gate runs in processes of its own: whoever imports triton cannot take it back.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLANTED = "tests.triton_tools.planted"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

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
    ("eight stages", "sm_90"): ["262144 bytes of shared memory, sm_90 has 232448"],
    ("four stages on AMD", "gfx942"): ["98304 bytes of shared memory, gfx942 has 65536"],
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


def run(*arguments: str, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    # Even where the interpreter is asked for: the gate has nothing to compile in it.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    if cache is not None:
        environment["DPO_KERNELS_CHECK_CACHE"] = str(cache)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800, check=False)


def run_gate(*arguments: str, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    return run("-m", "tests.triton_tools.gate", *arguments, cache=cache)


@pytest.mark.slow
def test_every_configuration_of_every_kernel_passes() -> None:
    done = run_gate()
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_gate_bites(tmp_path: Path) -> None:
    done = run_gate("--modules", PLANTED, "--json", str(tmp_path / "table.json"))
    assert (done.returncode, done.stderr) == (1, ""), done.stdout + done.stderr
    assert len(done.stdout) < 10_000, "no compiler's output"
    table = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    said = {(entry["name"], entry["target"]): entry["reasons"] for entry in table}
    assert said.keys() == REASONS.keys()
    for key, expected in REASONS.items():
        assert len(said[key]) == len(expected), (key, said[key])
        for reason, pattern in zip(said[key], expected, strict=True):
            assert re.fullmatch(pattern, reason), (key, reason)
            assert reason in done.stdout


def test_what_was_measured_is_kept_until_it_is_damaged(tmp_path: Path) -> None:
    arguments = ("--modules", PLANTED, "--only", "good softmax", "--targets", "sm_90")
    cold = run_gate(*arguments, cache=tmp_path)
    assert cold.returncode == 0, cold.stdout + cold.stderr
    assert "compiling 1 of 1" in cold.stdout
    warm = run_gate(*arguments, cache=tmp_path)
    assert warm.returncode == 0
    assert "compiling" not in warm.stdout
    assert "good softmax" in warm.stdout
    (record,) = tmp_path.glob("*.json")
    record.write_text('{"registers"', encoding="utf-8")
    assert "compiling 1 of 1" in run_gate(*arguments, cache=tmp_path).stdout


def test_worse_code_than_before_is_seen() -> None:
    done = run(
        "-c",
        """if True:
        import dataclasses, json
        from tests.triton_tools import gate
        from tests.triton_tools.aot import Measured
        kept = json.loads(gate.KEPT.read_text())
        name, facts = next((n, f) for n, f in kept["kernels"].items() if f["matrix"] and f["widest_bits"] == 128)
        configuration, target = name.split(" @ ")
        changes = {"registers": facts["registers"] * 2, "widest_bits": 64, "matrix": {}, "shared_bytes": 0}
        worse = gate.Verdict(configuration, target, Measured(**facts | changes), [])
        same = gate.Verdict(configuration, target, Measured(**facts), [])
        print(gate.regressions([same], kept, kept["triton"]), gate.regressions([worse], kept, "0.0"))
        said = gate.regressions([worse], kept, kept["triton"])
        jobs = gate.all_jobs(gate.kernel_modules())
        missed = {f"{gate._configuration(job).name} @ {job.target}" for job in jobs} ^ set(kept["kernels"])
        print(missed, [line.split(": ")[1].split()[0] for line in said])
        """,
    )
    assert done.stdout.splitlines() == ["[] []", "set() ['registers', 'widest_bits', 'matrix']"], done.stderr


def test_nothing_to_compile_is_no_success(tmp_path: Path) -> None:
    done = run_gate("--modules", PLANTED, "--only", "no such name", cache=tmp_path)
    assert (done.returncode, done.stdout) == (1, f"no configuration to compile in {PLANTED}\n")


def test_a_kernel_without_a_configuration_is_named() -> None:
    done = run(
        "-c",
        f"""if True:
        import os
        del os.environ["TRITON_INTERPRET"]
        from tests.triton_tools import gate
        jobs = gate.all_jobs(["{PLANTED}"])
        print(*gate.ungated(["{PLANTED}"], [job for job in jobs if job.target != "sm_90"]), sep="\\n")
    """,
    )
    assert done.stdout.splitlines() == [
        f"{PLANTED}.matmul: no configuration for sm_90",
        f"{PLANTED}.softmax_rows: no configuration for sm_90, sm_100",
        f"{PLANTED}.count_up: no configuration for sm_80, sm_90, sm_100, gfx942",
        f"{PLANTED}.abort: no configuration for sm_80, sm_90, sm_100, gfx942",
    ], done.stderr
