"""The C++ row passes compiled by themselves, for this CPU and, emulated, for one that is not here (aarch64)."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packages import ROOT

ROWS = ROOT / "csrc" / "cpu"
HARNESS = Path(__file__).with_name("rows_alone.cpp")
# As setup.py builds them.
FLAGS = ("-std=c++17", "-O3", "-fno-trapping-math", "-fno-math-errno", "-fopenmp-simd", "-Wall", "-Wextra", "-Werror")
CROSS, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")
pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="there is no g++")


def compiled(folder: Path, compiler: str, rows: Path) -> Path:
    program, harness = folder / "rows", folder / "harness.o"
    # Without optimisation, in which Debian's gcc 12 for aarch64 ends with an internal error on this file.
    plain = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-DDPO_ROWS=base", f"-I{ROWS}"]
    subprocess.run([compiler, *plain, "-c", HARNESS, "-o", harness], check=True, timeout=300)
    subprocess.run([compiler, *FLAGS, "-static", harness, rows, "-o", program], check=True, timeout=300)
    return program


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, check=False)


def test_the_base_rows_are_right(tmp_path: Path) -> None:
    done = run(compiled(tmp_path, "g++", ROWS / "rows_base.cpp"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 14


WRONG = [
    ("rows_impl.h", "entropy -= e > 0", "entropy += e > 0"),
    ("rows_impl.h", "own = -how.others[r];", "own = how.others[r];"),
    ("codes_impl.h", "* kStepsByNat + 0.5f", "* kStepsByNat"),
    ("codes_impl.h", "p = p * t + 0.23934107f;", "p = p * t + 0.2384f;"),
    ("codes_impl.h", "code == 65535 ? 0.0f : p * power", "p * power"),
    ("codes_impl.h", "highest == Limits<float>::lowest ? 0.0f : exponential", "exponential"),
    ("codes_impl.h", "codes.highest_stride + r]", "codes.highest_stride]"),
    ("codes_impl.h", "if (how.softcap != 0.0f) own", "if (how.softcap == 0.0f) own"),
    ("codes_impl.h", "(below(codes[i]) * slope_of_code(", "(below(codes[i]) + slope_of_code("),
]


@pytest.mark.parametrize(("name", "old", "new"), WRONG)
def test_a_wrong_row_is_seen(name: str, old: str, new: str, tmp_path: Path) -> None:
    for header in ("rows.h", "rows_impl.h", "codes_impl.h", "sparse_impl.h"):
        shutil.copy(ROWS / header, tmp_path)
    text = (ROWS / name).read_text(encoding="utf-8")
    assert text.count(old) == 1
    (tmp_path / name).write_text(text.replace(old, new), encoding="utf-8")
    rows = Path(shutil.copy(ROWS / "rows_base.cpp", tmp_path))
    assert run(compiled(tmp_path, "g++", rows)).returncode == 1


@pytest.mark.skipif(CROSS is None or EMULATOR is None, reason="g++-aarch64-linux-gnu or qemu-user-static is missing")
def test_the_rows_are_right_and_vectorised_on_aarch64(tmp_path: Path) -> None:
    program = compiled(tmp_path, str(CROSS), ROWS / "rows_base.cpp")
    done = run(EMULATOR, program)
    assert done.returncode == 0, done.stdout + done.stderr
    code = run("aarch64-linux-gnu-objdump", "--disassemble", program).stdout
    passes = code[code.index("dpo_kernels4base") :]
    for instruction in (r"fmla\s+v\d+\.4s", r"fmla\s+v\d+\.2d", r"fmaxnm?\s+v\d+\.4s|fcmg[te]\s+v\d+\.4s"):
        assert re.search(instruction, passes), instruction
