"""The gate of the CUDA kernels: ours pass it, and each planted kernel is refused for its own reason."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda_tools.gate import find_nvcc

ROOT = Path(__file__).resolve().parents[2]
PLANTED = "tests/cuda_tools/planted.cu"
NVCC = find_nvcc()

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")

REASONS: dict[str, list[str]] = {
    "good": [],
    "spilling": [r"\d{2,} bytes spilled", r"64 registers, two blocks of 1024 threads leave 32"],
    "hungry": [r"(8|9|1\d)\d registers, two blocks of 512 threads leave 64"],
    "unbounded": [r"\d{2} registers, two blocks of 1024 threads leave 32"],
    "indexed": [r"64 bytes of stack"],
    "reduce_rows<float>": [r"the widest load has 32 bits, not 128"],
    "dlogits_rows": [r"the widest store has 32 bits, not 128"],
}


def run_gate(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.cuda_tools.gate", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@needs_nvcc
@pytest.mark.slow
def test_every_kernel_passes() -> None:
    done = run_gate()
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert done.stdout.count("reduce_rows<float, true>") == 3
    again = run_gate()
    assert float(re.findall(r"([\d.]+) s$", again.stdout.strip())[0]) < 3, "nothing was remembered"


@needs_nvcc
def test_the_gate_bites(tmp_path: Path) -> None:
    said = tmp_path / "table.json"
    cache = {"DPO_KERNELS_CHECK_CACHE": str(tmp_path / "cache")}
    done = run_gate("--sources", PLANTED, "--targets", "sm_90", "--json", str(said), **cache)
    assert (done.returncode, done.stderr) == (1, ""), done.stdout + done.stderr
    table = {entry["name"]: entry["reasons"] for entry in json.loads(said.read_text(encoding="utf-8"))}
    assert table.keys() == REASONS.keys()
    for name, expected in REASONS.items():
        assert len(table[name]) == len(expected), (name, table[name])
        for reason, pattern in zip(table[name], expected, strict=True):
            assert re.fullmatch(pattern, reason), (name, reason)
        assert (f"{name} on sm_90: " in done.stdout) == bool(expected)


@needs_nvcc
def test_what_does_not_compile_is_refused_in_a_line(tmp_path: Path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void f(int* p) { *p = undeclared; }\n")
    done = run_gate("--sources", str(source), "--targets", "sm_90", DPO_KERNELS_CHECK_CACHE=str(tmp_path))
    assert done.returncode == 1
    (reason,) = [line for line in done.stdout.splitlines() if line.startswith("broken.cu")]
    assert re.match(r"broken.cu on sm_90: does not compile: .*identifier \"undeclared\" is undefined", reason)


@needs_nvcc
def test_a_target_that_nvcc_does_not_know_is_skipped(tmp_path: Path) -> None:
    source = tmp_path / "empty.cu"
    source.write_text("__global__ void f(int* p) { *p = 1; }\n")
    targets = ("--targets", "sm_90", "sm_999")
    done = run_gate("--sources", str(source), *targets, DPO_KERNELS_CHECK_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert re.search(r"^sm_999 +skipped: this nvcc does not know it$", done.stdout, re.MULTILINE)


def test_without_nvcc_nothing_is_checked(tmp_path: Path) -> None:
    done = run_gate(PATH=str(tmp_path), CUDA_HOME=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "nvcc is not installed: not checked\n", "")
