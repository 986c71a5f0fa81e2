"""The CUDA operators' glue: it needs no CUDA header, finds its launchers, and hands everything over in its place."""

import ctypes
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from tests.cuda_tools import equivalence
from tests.cuda_tools.emulation import (
    COMPILE,
    HAS_COMPILER,
    KERNELS,
    NO_COMPILER,
    TOOLS,
    compile_fibers,
    compile_object,
    includes,
)
from tests.cuda_tools.operators import Operators, by_copies
from tests.shared import made_once

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAS_COMPILER, reason=NO_COMPILER)]

TORCH = [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
GLUE = KERNELS / "ops_cuda.cpp"
NVCC = shutil.which("nvcc")
CXX = "-std=c++17"  # as the build of the extension has it


@pytest.mark.parametrize(("source", "launched"), [(GLUE, 6), (KERNELS / "module.cpp", 1)], ids=["glue", "module"])
def test_it_compiles_without_cudas_headers_and_finds_every_launcher(
    tmp_path: Path, source: Path, launched: int
) -> None:
    glue, launchers = tmp_path / "ops_cuda.o", tmp_path / "launch.o"
    command = ["g++", CXX, "-Wall", "-Wextra", "-Werror", "-O0", "-fPIC", *TORCH, source]
    if NVCC is None:  # nothing to find launchers in: the code is not needed
        subprocess.run([*command, "-fsyntax-only"], check=True, timeout=300)
        return
    subprocess.run([*command, "-c", "-o", glue], check=True, timeout=300)
    flags = ["-O0", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC", "-arch=sm_90"]
    subprocess.run([NVCC, *flags, "-c", KERNELS / "launch.cu", "-o", launchers], check=True, timeout=300)

    def ours(kind: str, file: Path) -> set[str]:
        said = subprocess.run(["nm", kind, file], check=True, capture_output=True, text=True, timeout=60)
        return {line.split()[-1] for line in said.stdout.splitlines() if "dpo_kernels4cuda" in line}

    wanted = ours("--undefined-only", glue)
    assert len(wanted) == launched, wanted
    assert wanted <= ours("--defined-only", launchers)


# --- the glue on emulated kernels ---------------------------------------------------------------------------


class Emulated(Operators):
    """Those of the glue on emulated kernels."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(library)
        super().__init__(torch.ops.dpo_emulated)
        self._library = ctypes.CDLL(str(library))

    def order(self, order: int) -> None:
        self._library.emulated_order(ctypes.c_uint(order))


def replaced(pattern: str, new: str, text: str) -> str:
    text, count = re.subn(pattern, lambda _: new, text, flags=re.DOTALL)
    assert count == 1, pattern
    return text


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    """The glue with its schemas, registered for the CPU under another name, and its streams left out."""
    return Emulated(made_once(tmp_path_factory, "glue", compile_glue) / "glue.so")


def compile_glue(folder: Path) -> None:
    schemas = (KERNELS.parent / "ops.cpp").read_text(encoding="utf-8")
    found = re.search(r"STABLE_TORCH_LIBRARY_FRAGMENT\(dpo_kernels, m\) \{.*?\n\}\n", schemas, re.DOTALL)
    assert found is not None
    source = GLUE.read_text(encoding="utf-8")
    source = replaced(r"TORCH_LIBRARY_IMPL\(dpo_kernels, CUDA, m\)", "TORCH_LIBRARY_IMPL(dpo_emulated, CPU, m)", source)
    text = source + found[0].replace("dpo_kernels", "dpo_emulated")
    glue = folder / "glue.cpp"
    # Beside the glue, so that it is found before the one beside the source.
    (folder / "on_device.h").write_text(
        "namespace dpo_kernels { struct OnDevice { explicit OnDevice(const Tensor&) {} void* stream() const { return"
        " nullptr; } }; }\n"
    )
    glue.write_text(text.replace('"../checks.h"', f'"{KERNELS.parent / "checks.h"}"'), encoding="utf-8")
    objects = [
        compile_object(glue, folder / "glue.o", "-O0", CXX, f"-I{KERNELS}", *TORCH),
        compile_object(TOOLS / "emulated.cpp", folder / "emulated.o", "-O0", *includes(KERNELS)),
        compile_fibers(folder),
    ]
    library = folder / "glue.so"
    torchs = [*(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([COMPILE[0], "-shared", *objects, *torchs, "-o", library], check=True, timeout=300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_argument_arrives_in_its_place(operators: Emulated, dtype: torch.dtype) -> None:
    layout = equivalence.Layout(3, 1)
    for stats in ((), ("entropy",), ("mean_logits",), ("top1",), ("log_sum_p2",)):
        equivalence.check_reduce(operators, dtype, [1000, 31], layout, stats)
    for softcap in (None, 30.0):
        equivalence.check_logits(operators, dtype, 1000, layout, softcap is None, softcap=softcap)
    narrow = (None, torch.bfloat16, torch.float16) if dtype == torch.float32 else (None,)
    for out in narrow:
        equivalence.check_dlogits(operators, dtype, out, 1000, (layout, layout), softcap=30.0)
        equivalence.check_dlogits(operators, dtype, out, 1000, scaled=False)
    for weights in (None, torch.float32, torch.float64):
        for smoothing in (0.0, 0.1):
            equivalence.check_sequence_loss(operators, [3, 0, 70, 64], dtype, weights, smoothing)
    equivalence.check_sequence_loss(operators, [], dtype)


def test_copies_lie_as_what_they_copy(operators: Emulated) -> None:
    """As the tests on hardware hand tensors over: what is written beside its place would be seen there too."""
    through, layout = Operators(operators.ops, by_copies("cpu")), equivalence.Layout(3, 1)
    equivalence.check_logits(through, torch.float32, 1000, layout)
    equivalence.check_reduce(through, torch.float32, [1000, 31], layout)
    equivalence.check_dlogits(through, torch.float32, torch.bfloat16, 1000, (layout, layout), softcap=30.0)
    equivalence.check_dlogits(through, torch.float64, None, 1000)
    equivalence.check_sequence_loss(through, [3, 0, 70, 64], torch.float32, torch.float64)
    equivalence.check_sequence_loss_edges(through)
    guards = equivalence.Guards()
    inside = guards.around(torch.zeros(4))
    by_copies("cpu")(lambda tensor: tensor.as_strided((6,), (1,), tensor.storage_offset() - 1).fill_(1.0), inside)
    assert inside.eq(1).all()
    with pytest.raises(AssertionError, match="written where nothing may be written"):
        guards.check()


def test_edges(operators: Emulated) -> None:
    equivalence.check_sequence_loss_edges(operators)
    equivalence.check_foreign_labels(operators)
    equivalence.check_orders(operators, torch.float32)


def test_nothing_to_do(operators: Emulated) -> None:
    for shape in ((0, 5), (3, 0), (0, 0)):
        tile, labels = torch.zeros(shape), torch.zeros(shape[0], dtype=torch.int64)
        parts = [torch.full(shape[:1], 7.0) for _ in range(3)]
        operators.ops.reduce_rows_(tile, labels, 0, True, *parts, None, None, None, None)
        operators.ops.dlogits_rows_(tile, None, labels, 0, *parts[:2], None, None, None, False)
        operators.ops.apply_bias_scale_cap_(tile, torch.zeros(shape[1]), 0.5, 30.0)
        assert all(part.eq(7.0).all() for part in parts)


def good_rows() -> dict[str, object]:
    names = ("max", "others", "target", "entropy", "logit_sum", "square_sum")
    state = {name: torch.zeros(3) for name in names}
    return {"tile": torch.zeros(3, 8), "labels": torch.zeros(3, dtype=torch.int64), "start": 0, "keep_logits": True,
            **state, "argmax": torch.zeros(3, dtype=torch.int64)}  # fmt: skip


def good_dlogits() -> dict[str, object]:
    rows = {name: torch.zeros(3) for name in ("max", "others", "scale", "residual")}
    return {"tile": torch.zeros(3, 8), "out": torch.zeros(3, 8, dtype=torch.bfloat16), "start": 0, "softcap": 30.0,
            "labels": torch.zeros(3, dtype=torch.int64), **rows, "exponentiated": False}  # fmt: skip


def good_logits() -> dict[str, object]:
    return {"tile": torch.zeros(3, 8), "bias": torch.zeros(8), "scale": 0.5, "softcap": 30.0}


def good_sequence_loss() -> dict[str, object]:
    return {
        "logp": torch.zeros(4),
        "weights": torch.zeros(4),
        "offsets": torch.zeros(3, dtype=torch.int64),
        "beta": 0.1,
        "label_smoothing": 0.0,
        "ref": torch.zeros(2, dtype=torch.float64),
        "nan_if_invalid": torch.zeros((), dtype=torch.float64),
    }


REFUSED = [
    ("reduce_rows_", good_rows, {"keep_logits": False}, "keep_logits must be True on CUDA"),
    ("reduce_rows_", good_rows, {"tile": torch.zeros(3)}, r"tile must have two dimensions, got the shape \[3\]"),
    ("reduce_rows_", good_rows, {"tile": torch.zeros(3, 8).half()}, "tile must be float32 or float64, got Half"),
    ("reduce_rows_", good_rows, {"tile": torch.zeros(8, 3).t()}, "tile must have a unit stride between columns"),
    ("reduce_rows_", good_rows, {"tile": torch.zeros(1, 8).expand(3, 8)}, "rows of tile must not overlap"),
    ("reduce_rows_", good_rows, {"start": -1}, "start must be >= 0, got -1"),
    ("reduce_rows_", good_rows, {"labels": torch.zeros(3, dtype=torch.int32)}, "labels must be Long, got Int"),
    ("reduce_rows_", good_rows, {"max": torch.zeros(4)}, r"max must have the shape \[3\], got \[4\]"),
    ("reduce_rows_", good_rows, {"others": torch.zeros(3).double()}, "others must be Float, got Double"),
    ("reduce_rows_", good_rows, {"target": torch.zeros(6)[::2]}, "target must be contiguous"),
    ("reduce_rows_", good_rows, {"entropy": torch.zeros(3, 1)}, "entropy must have the shape"),
    ("reduce_rows_", good_rows, {"argmax": torch.zeros(3)}, "argmax must be Long, got Float"),
    ("dlogits_rows_", good_dlogits, {"exponentiated": True}, "exponentiated must be False on CUDA"),
    ("dlogits_rows_", good_dlogits, {"softcap": 0.0}, "softcap must be positive, got 0"),
    (
        "dlogits_rows_",
        good_dlogits,
        {"out": torch.zeros(3, 9)},
        r"out must have the tile's shape \[3, 8\], got \[3, 9\]",
    ),
    ("dlogits_rows_", good_dlogits, {"out": torch.zeros(3, 8).double()}, "out must have the tile's dtype Float"),
    ("dlogits_rows_", good_dlogits, {"scale": torch.zeros(2)}, "scale must have the shape"),
    ("dlogits_rows_", good_dlogits, {"residual": torch.zeros(3).bfloat16()}, "residual must be Float, got BFloat16"),
    (
        "apply_bias_scale_cap_",
        good_logits,
        {"tile": torch.zeros(3, 8).half()},
        "tile must be float32 or float64, got Half",
    ),
    ("apply_bias_scale_cap_", good_logits, {"bias": torch.zeros(3)}, r"bias must have the shape \[8\], got \[3\]"),
    ("apply_bias_scale_cap_", good_logits, {"bias": torch.zeros(8).double()}, "bias must be Float, got Double"),
    ("apply_bias_scale_cap_", good_logits, {"softcap": -1.0}, "softcap must be positive, got -1"),
    ("sigmoid_sequence_loss", good_sequence_loss, {"logp": torch.zeros(2, 2)}, "logp must have one dimension"),
    (
        "sigmoid_sequence_loss",
        good_sequence_loss,
        {"weights": torch.zeros(3)},
        r"weights must have the shape \[4\], got \[3\]",
    ),
    (
        "sigmoid_sequence_loss",
        good_sequence_loss,
        {"weights": torch.zeros(4).half()},
        "weights must be float32 or float64, got Half",
    ),
    (
        "sigmoid_sequence_loss",
        good_sequence_loss,
        {"offsets": torch.zeros(4).long()},
        "offsets must hold pairs of sequences, got 3",
    ),
    ("sigmoid_sequence_loss", good_sequence_loss, {"offsets": torch.zeros(3)}, "offsets must be Long, got Float"),
    ("sigmoid_sequence_loss", good_sequence_loss, {"ref": torch.zeros(2)}, "ref must be Double, got Float"),
    (
        "sigmoid_sequence_loss",
        good_sequence_loss,
        {"nan_if_invalid": torch.zeros(1).double()},
        "nan_if_invalid must be a float64 tensor without dim",
    ),
    ("sigmoid_sequence_loss", good_sequence_loss, {"beta": float("inf")}, "beta must be finite, got inf"),
]


@pytest.mark.parametrize(
    ("name", "good", "change", "words"), REFUSED, ids=lambda value: getattr(value, "__name__", None)
)
def test_what_cannot_be_launched_is_refused(operators: Emulated, name, good, change, words) -> None:
    operator = getattr(operators.ops, name)
    operator(**good())
    with pytest.raises(RuntimeError, match=f"dpo_kernels: {words}"):
        operator(**(good() | change))


def test_a_gradient_that_overlaps_its_tile_is_refused(operators: Emulated) -> None:
    good = good_dlogits()
    memory = torch.zeros(3, 8)
    inside = memory.view(torch.bfloat16).view(-1)[:24].view(3, 8)
    with pytest.raises(RuntimeError, match="dpo_kernels: out must be the tile or share no memory with it"):
        operators.ops.dlogits_rows_(**(good | {"tile": memory, "out": inside}))
    operators.ops.dlogits_rows_(**(good | {"tile": memory, "out": memory}))
