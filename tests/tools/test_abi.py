"""What the compiled extension asks of torch, of Python and of the system: stable interfaces, and old ones."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dpo_kernels
from tests.packages import ROOT

CSRC = ROOT / "csrc"
MODULES = sorted(Path(dpo_kernels.__file__).parent.glob("_C*.so"))  # the installed ones, where the package is installed
# Of manylinux_2_28, which torch's own wheels ask for.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
STABLE = ("torch/csrc/stable/", "torch/headeronly/")
readable = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("nm") is None or not MODULES, reason="there is no extension, or no nm"
)


def symbols(module: Path) -> list[str]:
    """What a module takes from other libraries, mangled, with its version."""
    command = ["nm", "--dynamic", "--undefined-only", str(module)]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    return [line.split()[-1] for line in said.splitlines()]


@readable
@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_no_cpp_symbol_of_torch_is_linked(module):
    names = symbols(module)
    assert any(name.startswith("aoti_torch_") for name in names)
    assert [name for name in names if re.match(r"_Z\w*?(2at|3c10|5torch|5caffe2)", name)] == []


@readable
@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_pythons_limited_api_is_all_that_is_used(module):
    assert module.name.endswith(".abi3.so")
    assert [name for name in symbols(module) if name.startswith("_Py") or name.startswith("Py")] == ["PyModule_Create2"]


@readable
def test_a_system_as_old_as_torchs_wheels_take_suffices():
    """But not for the CUDA part, into which CUDA's own library is linked."""
    (module,) = (module for module in MODULES if module.name == "_C.abi3.so")
    versions = [found for name in symbols(module) if (found := re.search(r"@(\w+?)_([\d.]+)$", name))]
    assert versions
    late = [v[0] for v in versions if v[1] in NEWEST and tuple(map(int, v[2].split("."))) > NEWEST[v[1]]]
    assert late == []


def test_only_headers_of_the_stable_interface_are_included():
    found = []
    for path in sorted(CSRC.rglob("*.[ch]*")):
        for header in re.findall(r'#\s*include\s*[<"]((?:torch|ATen|c10|caffe2)/[^>"]+)', path.read_text("utf-8")):
            found.append(header)
            assert header.startswith(STABLE), f"{path.relative_to(ROOT)}: {header}"
    assert "torch/csrc/stable/library.h" in found
