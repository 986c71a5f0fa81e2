"""The build of the extension: its one switch, what it says where something is missing, and a wheel that has it."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import pytest
import torch

from tests.packages import BUILD, NOT_SOURCE, ROOT, files_of

LOADED = "import torch, dpo_kernels._C as c; print(c.__file__, torch.ops.dpo_kernels.extension_oldest_torch())"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture
def tree(tmp_path):
    return Path(shutil.copytree(ROOT, tmp_path / "source", ignore=NOT_SOURCE))


@pytest.fixture
def quick(tree):
    """The tree with sources of one line each: what the build makes of a compiler's answer does not ask what it read."""
    for kind in ("*.cpp", "*.cu"):
        for path in (tree / "csrc").rglob(kind):
            path.write_text(f"int {path.stem};\n", encoding="utf-8")
    return tree


def build(tree, **environment):
    """(exit status, all that was printed, the wheel if there is one)."""
    out = tree.parent / "wheel"
    env = {name: value for name, value in os.environ.items() if not name.startswith("DPO_")} | environment
    command = [sys.executable, "-c", BUILD, "wheel", str(out)]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=600, check=False)
    wheels = list(out.glob("*.whl"))
    return done.returncode, done.stdout + done.stderr, wheels[0] if wheels else None


def extensions_in(wheel):
    return [name for name in files_of(wheel) if name.endswith(".so")]


def without_torch(tree):
    """An environment in which importing torch fails, as in an isolated build."""
    (tree.parent / "fake").mkdir()
    (tree.parent / "fake" / "torch.py").write_text("raise ImportError('No module named torch')\n")
    return {"PYTHONPATH": str(tree.parent / "fake")}


def test_an_unknown_mode_is_named(tree):
    status, said, wheel = build(tree, DPO_KERNELS_BUILD="fast")
    assert (status != 0, wheel) == (True, None)
    assert "DPO_KERNELS_BUILD='fast'; known: auto, cpu, cuda, none" in said


def test_none_is_a_pure_package(tree):
    status, said, wheel = build(tree, DPO_KERNELS_BUILD="none")
    assert status == 0, said
    assert extensions_in(wheel) == []
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.parametrize("mode", ["auto", "cpu", "cuda"])
def test_without_torch_the_error_says_what_is_missing(tree, mode):
    status, said, wheel = build(tree, DPO_KERNELS_BUILD=mode, **without_torch(tree))
    assert (status != 0, wheel) == (True, None)
    assert "the C++ extension cannot be built: torch, whose headers it needs, cannot be imported" in said
    assert "leave out --no-build-isolation" in said
    assert "DPO_KERNELS_BUILD=none installs the package without its C++ extension." in said


def test_an_old_torch_is_named(tree):
    fake = without_torch(tree)
    utils = tree.parent / "fake" / "torch" / "utils"
    utils.mkdir(parents=True)
    (tree.parent / "fake" / "torch.py").unlink()
    (utils.parent / "__init__.py").write_text("__version__ = '2.10.1'\n")
    (utils / "__init__.py").touch()
    (utils / "cpp_extension.py").write_text("CUDA_HOME = BuildExtension = None\n")
    status, said, wheel = build(tree, **fake)
    assert (status != 0, wheel) == (True, None)
    assert "the C++ extension cannot be built: torch 2.10.1 is older than 2.11" in said


def test_the_source_archive_needs_no_torch(tree):
    out = tree.parent / "sdist"
    env = os.environ | without_torch(tree) | {"DPO_KERNELS_BUILD": "auto"}
    command = [sys.executable, "-c", BUILD, "sdist", str(out)]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(out.glob("*.tar.gz"))) == 1


def test_cuda_without_nvcc_is_an_error(tree):
    nowhere = tree.parent / "nowhere"
    status, said, wheel = build(tree, DPO_KERNELS_BUILD="cuda", CUDA_HOME=str(nowhere))
    assert (status != 0, wheel) == (True, None)
    assert f"DPO_KERNELS_BUILD=cuda, but {nowhere}/bin/nvcc does not run" in said


@pytest.mark.parametrize("mode", ["auto", "cpu"])
def test_a_compiler_that_fails_is_one_sentence(quick, mode):
    (quick / "csrc" / "ops.cpp").write_text("#error out of order\n")
    status, said, wheel = build(quick, DPO_KERNELS_BUILD=mode)
    assert (status != 0, wheel) == (True, None)
    assert len([line for line in said.splitlines() if "dpo_kernels: the extension does not compile" in line]) == 1
    assert "DPO_KERNELS_BUILD=none installs the package without its C++ extension." in said


@needs_compiler
def test_a_cuda_part_that_fails_leaves_the_cpp_part(quick):
    """As with a host compiler that nvcc does not take: its version is told, and nothing compiles."""
    script = quick / "setup.py"
    claim = "import torch; torch.version.cuda = '13.0'"
    script.write_text(f"{claim}\n{script.read_text(encoding='utf-8')}", encoding="utf-8")
    nvcc = quick.parent / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "release 13.0, V13.0.1" || exit 1\n')
    nvcc.chmod(0o755)
    status, said, wheel = build(quick, CUDA_HOME=str(quick.parent / "cuda"))
    assert status == 0, said
    assert "building the C++ part of the extension alone: the CUDA part does not compile" in said
    assert len(extensions_in(wheel)) == 1


@needs_compiler
@pytest.mark.parametrize("mode", ["cpu", "none"])
def test_a_wheel_holds_nothing_of_an_earlier_build(quick, mode):
    """As in the checkout that is installed a second time, after a module was renamed and another Python came."""
    own = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    earlier = quick / "build" / ("lib" if mode == "none" else own) / "dpo_kernels"
    earlier.mkdir(parents=True)
    for name in ("_C.cpython-39-x86_64-linux-gnu.so", "_C_cuda.abi3.so", "renamed.py"):
        (earlier / name).write_text("old")
    status, said, wheel = build(quick, DPO_KERNELS_BUILD=mode)
    assert status == 0, said
    assert (earlier / "__init__.py").exists()  # the build went there
    assert extensions_in(wheel) == ([] if mode == "none" else ["dpo_kernels/_C.abi3.so"])
    assert "dpo_kernels/renamed.py" not in files_of(wheel)


@pytest.mark.slow
@needs_compiler
def test_a_wheel_with_the_extension_works_from_another_folder(quick, tmp_path):
    """With the file that makes it a module and a library of torch's; the rest, as built in the tree, runs in others."""
    shutil.copy(ROOT / "csrc" / "ops.cpp", quick / "csrc")
    status, said, wheel = build(quick, DPO_KERNELS_BUILD="cpu")
    assert status == 0, said
    assert len(extensions_in(wheel)) == 1
    assert "-cp310-abi3-" in wheel.name
    shutil.unpack_archive(wheel, tmp_path / "site", format="zip")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", LOADED], cwd=elsewhere, env=env, capture_output=True, text=True)
    file, *built_for = done.stdout.split()
    assert Path(file).parent == tmp_path / "site" / "dpo_kernels"
    assert built_for == ["2.11"], done.stderr


# --- decisions, one by one --------------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch):
    """setup.py as a module, its call of setup left out."""
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    monkeypatch.setenv("DPO_KERNELS_BUILD", "none")
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("DPO_KERNELS_BUILD", "auto")
    return module


@pytest.mark.parametrize("version", ["65.5.0", "70.0.0", "76.1.0"])
@pytest.mark.parametrize("mode", ["cpu", "none"])
def test_an_old_setuptools_is_named(script, monkeypatch, version, mode):
    monkeypatch.setenv("DPO_KERNELS_BUILD", mode)
    monkeypatch.setattr("setuptools.__version__", version)
    for later in ("bdist_wheel", "build"):
        monkeypatch.setitem(sys.modules, f"setuptools.command.{later}", None)
    with pytest.raises(SystemExit, match=rf"^dpo_kernels: setuptools {version} is older than 77: pip install"):
        script.__spec__.loader.exec_module(script)


def test_versions_are_numbers(script):
    assert script.version_of("2.13.0+cpu") == (2, 13, 0)
    assert script.version_of("12.10") > script.KNOWS_SM_100 > script.version_of("12.6")
    assert script.version_of("2.9.1")[:2] < script.OLDEST_TORCH <= script.version_of("2.11.0a0+git12")[:2]


@pytest.mark.parametrize(
    ("of_torch", "path", "nvcc", "reason"),
    [
        (None, "nvcc", "13.0", "has no CUDA"),
        ("13.0", None, "13.0", "no nvcc was found"),
        ("13.0", "nvcc", None, "does not run"),
        ("12.8", "nvcc", "13.0", "nvcc is of CUDA 13.0, torch of CUDA 12.8"),
        ("13.1", "nvcc", "13.0", None),
    ],
)
def test_why_there_is_no_cuda(script, monkeypatch, of_torch, path, nvcc, reason):
    def version(path):
        if nvcc is None:
            raise FileNotFoundError(path)
        return script.version_of(nvcc)

    monkeypatch.setattr(script, "nvcc_version", version)
    fake = types.SimpleNamespace(version=types.SimpleNamespace(cuda=of_torch), __version__="2.13.0")
    said = script.why_no_cuda(fake, path)
    assert (said is None) if reason is None else (reason in said)


@pytest.mark.parametrize(
    ("wanted", "nvcc", "options"),
    [
        ("8.0;9.0+PTX", (12, 4), ["compute_80,code=sm_80", "compute_90,code=sm_90", "compute_90,code=compute_90"]),
        ("9.0a 10.0", (13, 0), ["compute_90a,code=sm_90a", "compute_100,code=sm_100"]),
        ("", (12, 4), ["compute_80,code=sm_80", "compute_90,code=sm_90", "compute_90,code=compute_90"]),
    ],
)
def test_architectures_are_read_as_torch_writes_them(script, monkeypatch, wanted, nvcc, options):
    monkeypatch.setattr(script, "nvcc_version", lambda path: nvcc)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    assert script.architectures("nvcc") == [f"-gencode=arch={option}" for option in options]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;Hopper")
    with pytest.raises(SystemExit, match="'Hopper' is not such as"):
        script.architectures("nvcc")


def test_cuda_can_be_built_beside_a_torch_that_has_none(script, monkeypatch):
    monkeypatch.setenv("DPO_KERNELS_BUILD", "cuda")
    monkeypatch.setattr(script, "nvcc_version", lambda path: (13, 0))
    fake = types.SimpleNamespace(version=types.SimpleNamespace(cuda=None), __version__="2.13.0")
    assert script.why_no_cuda(fake, "nvcc") is None


def test_cpu_alone_can_be_asked_for(script, monkeypatch):
    monkeypatch.setenv("DPO_KERNELS_BUILD", "cpu")
    assert script.why_no_cuda(torch, "nvcc") == "DPO_KERNELS_BUILD=cpu"


def test_every_source_is_compiled(script):
    """A file that the build forgets is a missing symbol only when somebody loads the result."""
    text = (ROOT / "setup.py").read_text()
    for path in [*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.cu")]:
        assert path.relative_to(ROOT / "csrc").as_posix() in text, path.name
