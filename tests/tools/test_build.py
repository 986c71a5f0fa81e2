"""The build of the extension: its one switch, what it says where something is missing, and a wheel that has it."""

import importlib.util
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from tests.packages import BUILD, NOT_SOURCE, ROOT, files_of

LOADED = "import torch, dpo_kernels._C as c; print(c.__file__, torch.ops.dpo_kernels.extension_built_for())"
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
    return [name for name in files_of(wheel) if not name.endswith(".py")]


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


def test_without_torch_auto_is_pure_and_says_how_to_get_more(tree):
    status, said, wheel = build(tree, **without_torch(tree))
    assert status == 0, said
    assert extensions_in(wheel) == []
    assert "without the C++/CUDA extension: torch is not importable in the build environment" in said
    assert "pip install --no-build-isolation ." in said


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_without_torch_more_than_auto_is_an_error(tree, mode):
    status, said, wheel = build(tree, DPO_KERNELS_BUILD=mode, **without_torch(tree))
    assert (status != 0, wheel) == (True, None)
    assert f"DPO_KERNELS_BUILD={mode}, but torch is not importable" in said


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_cuda_on_a_torch_without_is_an_error(tree):
    status, said, wheel = build(tree, DPO_KERNELS_BUILD="cuda")
    assert (status != 0, wheel) == (True, None)
    assert f"DPO_KERNELS_BUILD=cuda, but torch {torch.__version__} has no CUDA" in said


@pytest.mark.parametrize("mode", ["auto", "cpu"])
def test_a_compiler_that_fails_is_one_line(quick, mode):
    (quick / "csrc" / "ops.cpp").write_text("#error out of order\n")
    status, said, wheel = build(quick, DPO_KERNELS_BUILD=mode)
    if mode == "cpu":
        assert (status != 0, wheel) == (True, None)
        assert "DPO_KERNELS_BUILD=cpu, but it does not compile" in said
        return
    assert status == 0, said
    assert extensions_in(wheel) == []
    assert len([line for line in said.splitlines() if "building without the C++/CUDA extension" in line]) == 1


@needs_compiler
def test_a_cuda_part_that_fails_leaves_the_cpp_part(quick):
    """As with a host compiler that nvcc does not take: its version is told, and nothing compiles."""
    script = quick / "setup.py"
    claim = """if True:
        import os, torch, torch.utils.cpp_extension as built_with
        built_with.CUDA_HOME, torch.version.cuda = os.environ["CUDA_HOME"], "13.0"
    """
    script.write_text(f"{claim}\n{script.read_text(encoding='utf-8')}", encoding="utf-8")
    nvcc = quick.parent / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "release 13.0, V13.0.1" || exit 1\n')
    nvcc.chmod(0o755)
    status, said, wheel = build(quick, CUDA_HOME=str(quick.parent / "cuda"))
    assert status == 0, said
    assert "building the C++ part of the extension alone: the CUDA part does not compile" in said
    assert len(extensions_in(wheel)) == 1


@pytest.mark.slow
@needs_compiler
def test_a_wheel_with_the_extension_works_from_another_folder(quick, tmp_path):
    """With the file that makes it a module and a library of torch's; the rest, as built in the tree, runs in others."""
    shutil.copy(ROOT / "csrc" / "ops.cpp", quick / "csrc")
    status, said, wheel = build(quick, DPO_KERNELS_BUILD="cpu")
    assert status == 0, said
    assert len(extensions_in(wheel)) == 1
    assert "none-any" not in wheel.name
    shutil.unpack_archive(wheel, tmp_path / "site", format="zip")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", LOADED], cwd=elsewhere, env=env, capture_output=True, text=True)
    file, *built_for = done.stdout.split()
    assert Path(file).parent == tmp_path / "site" / "dpo_kernels"
    assert built_for[-1] == "cpu", done.stderr


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


def test_versions_are_numbers(script):
    assert script.version_of("2.13.0+cpu") == (2, 13, 0)
    assert script.version_of("12.10") > script.KNOWS_SM_100 > script.version_of("12.6")
    assert script.version_of("2.9.1")[:2] < script.OLDEST_TORCH <= script.version_of("2.11.0a0+git12")[:2]


@pytest.mark.parametrize(
    ("of_torch", "home", "nvcc", "reason"),
    [
        (None, "/cuda", "13.0", "has no CUDA"),
        ("13.0", None, "13.0", "no CUDA toolkit was found"),
        ("13.0", "/cuda", None, "does not run"),
        ("12.8", "/cuda", "13.0", "nvcc is of CUDA 13.0, torch of CUDA 12.8"),
        ("13.1", "/cuda", "13.0", None),
    ],
)
def test_why_there_is_no_cuda(script, monkeypatch, of_torch, home, nvcc, reason):
    def version(cuda_home):
        if nvcc is None:
            raise FileNotFoundError(f"{cuda_home}/bin/nvcc")
        return script.version_of(nvcc)

    monkeypatch.setattr(script, "nvcc_version", version)
    fake = types.SimpleNamespace(version=types.SimpleNamespace(cuda=of_torch), __version__="2.13.0")
    said = script.why_no_cuda(fake, home)
    assert (said is None) if reason is None else (reason in said)


def test_cpu_alone_can_be_asked_for(script, monkeypatch):
    monkeypatch.setenv("DPO_KERNELS_BUILD", "cpu")
    assert script.why_no_cuda(torch, "/cuda") == "DPO_KERNELS_BUILD=cpu"


def test_every_source_is_compiled(script):
    """A file that the build forgets is a missing symbol only when somebody loads the result."""
    text = (ROOT / "setup.py").read_text()
    for path in [*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.cu")]:
        assert path.relative_to(ROOT / "csrc").as_posix() in text, path.name
