"""The C++ row passes compiled by themselves, for this CPU and, emulated, for one that is not here (aarch64)."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import machine
from tests.packages import ROOT

ROWS = ROOT / "csrc" / "cpu"
HARNESS = Path(__file__).with_name("rows_alone.cpp")
# As setup.py builds them.
FLAGS = ("-std=c++17", "-O3", "-fno-trapping-math", "-fno-math-errno", "-fopenmp-simd", "-Wall", "-Wextra", "-Werror")
CROSS, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static")
pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="there is no g++")


def compiled(folder: Path, compiler: str, rows: Path) -> Path:
    program, harness = folder / "rows", folder / "harness.o"
    namespace = rows.stem.removeprefix("rows_")
    # Without optimisation, in which Debian's gcc 12 for aarch64 ends with an internal error on this file.
    plain = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", f"-DDPO_ROWS={namespace}", f"-I{ROWS}"]
    subprocess.run([compiler, *plain, "-c", HARNESS, "-o", harness], check=True, timeout=300)
    subprocess.run([compiler, *FLAGS, "-static", harness, rows, "-o", program], check=True, timeout=300)
    return program


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("isa", [machine.row_instruction_set() or "base", *machine.lesser_instruction_sets()])
def test_the_rows_are_right(isa: str, tmp_path: Path) -> None:
    done = run(compiled(tmp_path, "g++", ROWS / f"rows_{isa}.cpp"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 23


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
    ("codes_impl.h", "if (codes.data) encode(tile, codes, first, last)", "if (codes.data) encode(tile, codes, 0, 1)"),
    ("sparse_impl.h", "at = behind;", ""),
    ("sparse_impl.h", "memset(block.length + size,", "memset(block.length + size + 1,"),
    ("sparse_impl.h", "if (number % kStarts == 0)", "if (number == 0)"),
    ("sparse_impl.h", "(start / kSampleBlock)", "(start % kSampleBlock)"),
    ("sparse_impl.h", "block.e[i] * (T(kUnits) / static_cast<T>(block.length[i]))", "block.e[i]"),
    ("sparse_impl.h", "if (columns[k] == label)", "if (columns[k] < label)"),
]
WRONG_AVX512 = [
    ("codes_avx512.h", "label >= 0 && label < kCodedCols)", "label >= 0 && label < 0)"),
    ("codes_avx512.h", " || highest - highest != 0.0f) {", ") {"),
    (
        "codes_avx512.h",
        "_mm512_max_ps(_mm512_loadu_ps(z + i * kLanes), best[i % 4])",
        "_mm512_loadu_ps(z + i * kLanes)",
    ),
    ("codes_avx512.h", "_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7)", "_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7)"),
    ("codes_avx512.h", "_mm512_fnmadd_ps(high, by_nat, half), last)", "_mm512_fnmadd_ps(high, by_nat, last), last)"),
    ("codes_avx512.h", "total[i % 4 + 1] = ", "total[i % 4] = "),
    ("sparse_avx512.h", "_mm512_alignr_epi32(v, zero, 12)", "_mm512_alignr_epi32(v, zero, 13)"),
    ("sparse_avx512.h", "_mm512_set1_epi32(at), 15", "_mm512_set1_epi32(at + kUnits), 15"),
    ("sparse_avx512.h", "_mm512_shuffle_i32x4(low, high, 0xdd)", "_mm512_shuffle_i32x4(low, high, 0x88)"),
    ("sparse_avx512.h", "_mm512_set1_epi32(starts[g])", "_mm512_set1_epi32(block.at)"),
    ("sparse_avx512.h", "_mm512_maskz_compress_ps(mask, value)", "value"),
    ("sparse_avx512.h", "if (accumulate) sums", "if (!accumulate) sums"),
    ("sparse_avx512.h", "_mm512_and_si512(both, upper)", "_mm512_or_si512(both, upper)"),
    ("sparse_avx512.h", "add(add_pairs<1>, 32);", "add(add_pairs<1>, 64);"),
]


@pytest.mark.parametrize(("name", "old", "new"), WRONG)
def test_a_wrong_row_is_seen(name: str, old: str, new: str, tmp_path: Path) -> None:
    assert_seen("base", name, old, new, tmp_path)


@pytest.mark.skipif(machine.row_instruction_set() != "avx512", reason="this CPU has no AVX-512")
@pytest.mark.parametrize(("name", "old", "new"), WRONG_AVX512)
def test_a_wrong_register_is_seen(name: str, old: str, new: str, tmp_path: Path) -> None:
    assert_seen("avx512", name, old, new, tmp_path)


def assert_seen(isa: str, name: str, old: str, new: str, folder: Path) -> None:
    for header in ROWS.glob("*.h"):
        shutil.copy(header, folder)
    text = (ROWS / name).read_text(encoding="utf-8")
    assert text.count(old) == 1
    (folder / name).write_text(text.replace(old, new), encoding="utf-8")
    rows = Path(shutil.copy(ROWS / f"rows_{isa}.cpp", folder))
    assert run(compiled(folder, "g++", rows)).returncode == 1


@pytest.mark.skipif(CROSS is None or EMULATOR is None, reason="g++-aarch64-linux-gnu or qemu-user-static is missing")
def test_the_rows_are_right_and_vectorised_on_aarch64(tmp_path: Path) -> None:
    program = compiled(tmp_path, str(CROSS), ROWS / "rows_base.cpp")
    done = run(EMULATOR, program)
    assert done.returncode == 0, done.stdout + done.stderr
    code = run("aarch64-linux-gnu-objdump", "--disassemble", program).stdout
    passes = code[code.index("dpo_kernels4base") :]
    for instruction in (r"fmla\s+v\d+\.4s", r"fmla\s+v\d+\.2d", r"fmaxnm?\s+v\d+\.4s|fcmg[te]\s+v\d+\.4s"):
        assert re.search(instruction, passes), instruction
