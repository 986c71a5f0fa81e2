"""What an integration needs is said where it is used, and nothing else of the package needs it."""

import importlib
import re
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
import tomllib

pytest.importorskip("packaging", reason="packaging is not installed")

from packaging.requirements import Requirement

from dpo_kernels.integrations import requirements
from dpo_kernels.integrations.requirements import require

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def installed(monkeypatch):
    """Tell that releases are installed, or none, whatever is."""

    def set_versions(**versions):
        def version(name, real=metadata.version):
            if name not in versions:
                return real(name)
            if versions[name] is None:
                raise metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(metadata, "version", version)
        require.cache_clear()

    yield set_versions
    require.cache_clear()


# Installed from its main branch a package says that it comes before the next release, and may have what that will have.
BEFORE = ["0.29.0.dev0", "0.29.0.dev20261101+git1234", "0.29.0rc1", "0.29a1"]


@pytest.mark.parametrize("version", ["0.29.0", "0.29", "0.30.1.dev0", "1.16.0", "0.29.1+cpu", "0.100", *BEFORE])
def test_a_release_that_is_new_enough_is_taken(installed, version):
    installed(trl=version)
    require("trl", "0.29", "A test")


@pytest.mark.parametrize("version", ["0.28.9", "0.3.0", "0.28.9rc1", "0.28.9.dev7+cpu", "0.28.9.post1"])
def test_a_release_that_is_too_old_is_named(installed, version):
    installed(trl=version)
    with pytest.raises(ImportError, match=rf"^A test needs trl >= 0\.29, and trl {re.escape(version)} is installed$"):
        require("trl", "0.29", "A test")


def test_a_package_that_is_not_there_is_named(installed, monkeypatch):
    installed(trl=None)
    monkeypatch.setattr(requirements, "_importable", lambda package: False)
    with pytest.raises(ImportError, match=r"^A test needs trl >= 0\.29, which is not installed$"):
        require("trl", "0.29", "A test")


@pytest.mark.parametrize("loaded", [False, True])
def test_a_clone_that_is_not_installed_is_taken(loaded, tmp_path, monkeypatch):
    (tmp_path / "a_stack").mkdir()
    (tmp_path / "a_stack" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    if loaded:
        monkeypatch.setitem(sys.modules, "a_stack", types.ModuleType("a_stack"))
    require("a_stack", "0.29", "A test")
    require.cache_clear()


def test_a_folder_with_the_name_of_a_package_is_none(tmp_path, monkeypatch):
    (tmp_path / "a_stack").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"^A test needs a_stack >= 0\.29, which is not installed$"):
        require("a_stack", "0.29", "A test")


@pytest.mark.parametrize(("version", "words"), [("0.24.0", "and trl 0.24.0 is installed"), (None, "not installed")])
def test_the_package_for_trl_says_what_it_needs(installed, monkeypatch, version, words):
    for name in [name for name in sys.modules if name.startswith("dpo_kernels.integrations.trl")]:
        monkeypatch.delitem(sys.modules, name)
    installed(trl=version)
    if version is None:
        monkeypatch.setattr(requirements, "_importable", lambda package: False)
    with pytest.raises(ImportError, match=rf"dpo_kernels\.integrations\.trl needs trl >= 0\.29, .*{words}"):
        importlib.import_module("dpo_kernels.integrations.trl")


def test_the_head_says_what_it_needs(installed):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from dpo_kernels.integrations.transformers import fused_lm_head
    from tests.integration_helpers import tiny

    model = tiny("llama")
    fused_lm_head(model)
    installed(transformers="4.54.1")
    with pytest.raises(ImportError, match=r"fused_lm_head needs transformers >= 4\.55, and transformers 4\.54\.1 is"):
        fused_lm_head(model)


def floor(extra, package):
    found = [Requirement(line) for line in PROJECT["optional-dependencies"][extra]]
    (wanted,) = (requirement for requirement in found if requirement.name == package)
    return wanted.specifier


def test_the_extras_ask_for_what_the_code_needs_and_exclude_nobody_else():
    assert {Requirement(line).name for line in PROJECT["dependencies"]} == {"torch", "numpy"}
    for extra in ("transformers", "trl"):
        assert floor(extra, "transformers").contains("4.57.1")  # of users who stay with the fourth
        assert floor(extra, "transformers").contains("5.24.0")
    assert floor("transformers", "transformers").contains(requirements.TRANSFORMERS)
    assert not floor("transformers", "transformers").contains("4.54.9")
    assert floor("trl", "trl").contains(requirements.TRL)
    assert not floor("trl", "trl").contains("0.28.0")
