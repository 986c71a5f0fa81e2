"""What is shipped: the wheel, the source archive, and a package that works away from its checkout."""

import json
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

import dpo_kernels
from tests.packages import NOT_SOURCE, ROOT, build, files_of, run
from tests.shared import made_once


def metadata_of(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return archive.read(name).decode().split("\n\n")[0].splitlines()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source archive of a copy of the checkout: setuptools builds inside the tree."""

    def make(folder: Path) -> None:
        tree = Path(shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE))
        for kind in ("wheel", "sdist"):
            build(kind, tree, folder)

    return made_once(tmp_path_factory, "packages", make)


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def sdist(built: Path) -> Path:
    (sdist,) = built.glob("*.tar.gz")
    return sdist


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dpo_kernels").rglob("*.py")}
    assert "dpo_kernels/strategies/chunked.py" in modules
    assert files_of(wheel) == modules | {"dpo_kernels/py.typed"}


@pytest.mark.parametrize(("chosen", "needs"), [(None, True), ("cpu", True), ("none", False)])
def test_only_compiling_asks_for_a_torch(chosen: str | None, needs: bool, tmp_path: Path) -> None:
    """As pip asks before it builds; a source archive and the pure package need none."""
    code = (
        "import build_backend as b, json; print(json.dumps([b.get_requires_for_build_wheel(),"
        " b.get_requires_for_build_editable(), b.get_requires_for_build_sdist()]))"
    )
    tree = Path(shutil.copytree(ROOT, tmp_path / "source", ignore=NOT_SOURCE))
    said = run("-c", code, cwd=tree, PYTHONPATH=str(tree), DPO_KERNELS_BUILD=chosen or "")
    wheel, editable, sdist = json.loads(said.splitlines()[-1])
    assert any(name.startswith("torch==") for name in wheel) == needs
    assert any(name.startswith("torch==") for name in editable) == needs
    assert not any(name.startswith("torch") for name in sdist)


def test_every_place_has_the_same_version() -> None:
    (cited,) = re.findall(r"^version: (.*)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    latest = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert (cited, latest) == (dpo_kernels.__version__, dpo_kernels.__version__)


def test_the_torch_of_an_isolated_build_is_the_one_that_is_tested() -> None:
    (pinned,) = re.findall(r'^TORCH = "(.*)"', (ROOT / "build_backend.py").read_text(), re.MULTILINE)
    assert f"TORCH ?= {pinned}\n" in (ROOT / "Makefile").read_text()


def test_the_metadata_says_what_the_package_needs(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    required = {line for line in metadata if line.startswith("Requires-Dist:") and "extra ==" not in line}
    assert f"Version: {dpo_kernels.__version__}" in metadata
    assert wheel.name.startswith(f"dpo_kernels-{dpo_kernels.__version__}-")
    assert "License-Expression: Apache-2.0" in metadata
    assert required == {"Requires-Dist: torch>=2.11", "Requires-Dist: numpy"}


def test_the_source_archive_is_complete(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / sdist.name.removesuffix(".tar.gz")
    wanted = ["LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "SECURITY.md"]
    wanted += ["pyproject.toml", "setup.py", "build_backend.py"]
    wanted += [path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert [name for name in wanted if not (source / name).is_file()] == []
    assert files_of(build("wheel", source, tmp_path)) == files_of(wheel)


def test_the_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import torch, dpo_kernels as d, importlib.metadata as m\n"
        "print(d.__file__, m.version('dpo-kernels'))\n"
        "out = d.fused_dpo_loss(torch.ones(2, 3, 4), torch.ones(5, 4), torch.ones(2, 3, dtype=torch.long),"
        " reference_free=True)\n"
        "print(round(out.loss.item(), 4))\n"
    )
    output = run("-c", code, cwd=elsewhere, PYTHONPATH=str(site)).splitlines()
    assert output == [f"{site}/dpo_kernels/__init__.py {dpo_kernels.__version__}", "0.6931"]
