"""The table of ``make mutants`` fits the source, and its runner tells a test that fails from one that never ran."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import mutants
from tests.mutants import __main__ as command
from tests.mutants import runner
from tests.mutants.records import Mutant, problems

ROOT = Path(__file__).parents[2]
AREAS = (
    *("inputs/packing", "inputs/make_problem", "planning/", "engine/operators", "engine/autograd", "engine/passes"),
    *("strategies/chunked", "strategies/oversized", "strategies/logits_in_weight_grad", "strategies/frozen_head"),
    *("strategies/recompute", "losses/", "kernels/torch_kernels", "kernels/extension", "kernels/triton/"),
    "integrations/",
)


def test_every_edit_still_applies_exactly_once():
    """A refactoring that rewords an edited line mends its entry here."""
    assert problems(mutants.MUTANTS, ROOT) == []


def test_every_test_that_is_named_is_there():
    """Also by its parameters, whose names a refactoring changes without a word."""
    ids = sorted({test for mutant in mutants.MUTANTS if not mutant.interpreted for test in mutant.ids})
    collect = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-qq",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        *ids,
    ]
    done = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_table_covers_every_layer():
    assert len(mutants.MUTANTS) >= 60
    for area in (*(f"dpo_kernels/{name}" for name in AREAS), "csrc/cpu/", "benchmarks/"):
        assert any(mutant.file.startswith(area) for mutant in mutants.MUTANTS), area


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"old": "a * b", "new": "a"}, "'a * b' occurs 0 times, expected once"),
        ({"old": "a", "new": "b"}, "occurs 3 times, expected once"),
        ({"new": "a + b"}, "the edit changes nothing"),
        ({"new": "a +"}, "the edited file is no Python"),
        ({"file": "gone.py"}, "there is no such file"),
        ({"tests": "tests/test_gone.py::test_add"}, "there is no tests/test_gone.py::test_add"),
        ({"tests": "tests/test_thing.py::test_gone[1]"}, "there is no tests/test_thing.py::test_gone[1]"),
        ({"tests": ("tests/test_thing.py", "tests/interpreted/test_x.py")}, "cannot share a process"),
    ],
)
def test_an_entry_that_does_not_fit_is_named(project, change, words):
    fields = {"file": "thing.py", "old": "a + b", "new": "a - b", "tests": "tests/test_thing.py::test_add", "why": "w"}
    right, wrong = Mutant(**fields), Mutant(**(fields | {"why": "v"} | change))
    assert problems([right], project) == []
    assert any(words in line and line.startswith(wrong.name) for line in problems([right, wrong], project))
    assert "another entry has the same file and words" in problems([right, right], project)[0]


# --- the runner, on a project of two functions ----------------------------------------------------------------------

THING = """
def add(a, b):
    return a + b


def end():
    return 0
"""
TESTS = """
import thing


def test_add():
    assert thing.add(2, 2) == 4


def test_add_more():
    assert thing.add(2, 3) == 5


def test_end():
    assert thing.end() == 0
"""


@pytest.fixture
def project(tmp_path):
    root = tmp_path / "project"
    (root / "tests").mkdir(parents=True)
    (root / "thing.py").write_text(THING.lstrip())
    (root / "tests" / "test_thing.py").write_text(TESTS.lstrip())
    (root / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    return root


def edit(old, new, test, why, equivalent=""):
    return Mutant("thing.py", old, new, f"tests/test_thing.py::{test}", why, equivalent)


def run(project, tmp_path, *edits):
    folder = tmp_path / "copies"
    folder.mkdir()
    return runner.run(edits, project, folder, jobs=2, seconds=120.0)


@pytest.fixture(autouse=True)
def _plain_pytest(monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # half of what such a process takes
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)


def test_killed_survived_and_what_is_neither(project, tmp_path):
    edits = [
        edit("a + b", "a - b", "test_add", "killed"),
        edit("a + b", "a * b", "test_add", "survives: 2 * 2 is 4"),
        edit("a + b", "b + a", "test_add_more", "survives with a reason", equivalent="addition commutes"),
        edit("a + b", "a - b", "test_add_more", "not as equivalent as the table says", equivalent="or so it says"),
        edit("def add(", "raise SystemError\ndef add(", "test_add", "not even collected"),
        edit("return 0", "import os; os.abort()", "test_end", "crashes"),
    ]
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    found = run(project, tmp_path, *edits)
    assert [outcome.mutant for outcome in found] == edits
    verdicts = [outcome.verdict for outcome in found]
    assert verdicts[:4] == ["killed", "survived", "survived", "killed"]
    assert verdicts[4].startswith("its tests did not run (pytest's exit status ")
    assert verdicts[5] == "its tests were ended by signal 6"
    assert [outcome.fine for outcome in found] == [True, False, True, False, False, False]
    assert "SystemError" in found[4].said
    shown = runner.table(found)
    assert "thing.py    2 / 6" in shown
    assert "survives with a reason: addition commutes" in shown
    assert "killed, though the table says that it changes nothing: or so it says" in shown
    assert before == {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    for copy in (tmp_path / "copies").iterdir():
        assert (copy / "thing.py").read_text() == THING.lstrip()


def test_what_never_ends_is_ended_with_all_that_it_started(project, tmp_path):
    """The child of the child holds the pipe that is read to its end."""
    copies = runner.Copies(project, tmp_path, seconds=1.0)
    never = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    assert copies.run(project, [sys.executable, "-c", never], copies.seconds) == (None, "")
    outcome = runner.verdict_of(edit("a + b", "a - b", "test_add", "never ends"), None, "", copies.seconds)
    assert (outcome.verdict, outcome.fine) == ("its tests took longer than 1 s", False)
    copies.stop()
    with pytest.raises(InterruptedError):
        copies.run(project, [sys.executable, "--version"], copies.seconds)


def test_tests_that_are_red_without_an_edit_judge_nothing(project, tmp_path):
    (project / "tests" / "test_thing.py").write_text(TESTS.lstrip().replace("== 4", "== 5"))
    with pytest.raises(RuntimeError, match=r"not green as the source is\n(.|\n)*pytest ended with 1"):
        run(project, tmp_path, edit("a + b", "a - b", "test_add", "killed"))


@pytest.mark.parametrize(
    ("edits", "status"),
    [
        ([edit("a + b", "a - b", "test_add", "killed")], 0),
        ([edit("a + b", "a * b", "test_add", "survives")], 1),
        ([edit("a * b", "a - b", "test_add", "does not apply")], 1),
    ],
    ids=["killed", "survived", "stale"],
)
def test_the_exit_status(project, monkeypatch, capsys, edits, status):
    monkeypatch.setattr(mutants, "MUTANTS", tuple(edits))
    monkeypatch.setattr(command, "ROOT", project)
    assert command.main(["--jobs", "1"]) == status
    printed = "".join(capsys.readouterr())
    assert ("1 / 1" in printed) == (status == 0)
    assert ("does not fit the source" in printed) == ("does not apply" in edits[0].why)


def test_what_is_chosen_and_listed(capsys):
    assert command.main(["--list", "--only", "benchmarks/truth.py"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"{len(printed) - 1} edits, each of which applies exactly once"
    assert all(line.startswith("benchmarks/truth.py: ") for line in printed[:-1])
    assert command.main(["--only", "no such edit"]) == 2


def test_the_command_that_make_runs():
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutants", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{len(mutants.MUTANTS)} edits" in done.stdout
