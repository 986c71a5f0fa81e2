"""The counts of the structure: a planted package gives those worked out by hand, and this checkout can be counted."""

import json
from pathlib import Path

import pytest

from tests.tools.structure import count, main, percentile, prose, table

ROOT = Path(__file__).resolve().parents[2]

OPTIONS = "a=1, b=2, c=3, d=4, e=5, f=6"
CHECKOUT = {
    "dpo_kernels/__init__.py": "from dpo_kernels.api import fused_dpo_loss\n\n__all__ = ['fused_dpo_loss']\n",
    "dpo_kernels/api.py": (
        "from . import low\n"
        "from dpo_kernels.kernels.rows import Rows\n"
        f"def fused_dpo_loss(x, *, {OPTIONS}, **rest):\n"
        '    """Says so."""\n'
        "    named = dict(a=a, b=b, c=c, d=d, e=e)\n"  # five of the six options are no list
        "    return low.each([a, b, c, d, e, f], *named)\n"
    ),
    "dpo_kernels/low.py": (
        "from .kernels import rows\n"
        "def each(values, softcap):  # softcap, softcaps\n"
        "    def inner(one, two, three, four, five, six, seven, eight): ...\n"
        "    for value in values:\n"
        "        rows.Rows().finish(value)\n"
        "def softcaps():\n"
        '    """See `each`."""\n'
    ),
    "dpo_kernels/kernels/__init__.py": "",
    "dpo_kernels/kernels/rows.py": (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n"
        "    from ..low import each\n"
        "class Rows:\n"
        "    name = 'cpp'\n"
        "    def finish(self, value):\n"
        "        return value\n"
        "    @staticmethod\n"
        "    def _of(self): return self\n"
        "@triton.jit\n"
        "def kernel(" + ", ".join(f"p{i}" for i in range(13)) + "):\n" + "    pass\n" * 46
    ),
    "dpo_kernels/integrations/trl.py": "def trainer(): ...\ndef helper(): ...\n",
    "tests/test_one.py": "def problem(): ...\n",
    "tests/test_two.py": (
        "from tests.test_one import problem\n"
        "def test(monkeypatch):\n"
        "    monkeypatch.setattr('dpo_kernels.low._private', 1)\n"
        "    monkeypatch.setattr(low, 'each', 1)\n"
        "    with mock.patch.object(low, '_other'), mock.patch('low.__version__'): ...\n"
        "    setattr(low, '_none', BACKENDS := ('one', 'two'))\n"
    ),
    "README.md": "# Title\n\nOne two: three `a b c`. Four;\nfive [six](seven)?\n\n```\neight\n```\n\n| nine |\n",
    "docs/page.md": "```python\nfrom dpo_kernels.integrations.trl import trainer\n```\n\n- ten\n- eleven e.g. twelve\n",
}  # fmt: skip
TASKS = {
    "call_path": {
        "loop": "dpo_kernels/low.py:each",
        "steps": [
            "dpo_kernels/api.py:fused_dpo_loss",
            "dpo_kernels/low.py:each",
            "dpo_kernels/kernels/rows.py:Rows.finish",
        ],
    },
    "tasks": {
        "shard": {
            "files": ["dpo_kernels/low.py", "README.md"],
            "edited": ["README.md"],
            "new_files": 1,
            "found_by": {"under": ["dpo_kernels"], "except": ["dpo_kernels/kernels/"], "names": ["finish"]},
        }
    },
}


@pytest.fixture
def planted(tmp_path):
    for name, text in CHECKOUT.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def counted(root, tasks=TASKS):
    path = root / "tests" / "tools" / "structure_tasks.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(tasks), encoding="utf-8")
    return count(root)


def test_imports(planted):
    found = counted(planted)["imports"]
    # public -> api -> (low <-> kernels), integrations apart; a cycle is one layer, and its two arrows point up.
    assert (found["nodes"], found["arrows"], found["layers"], found["upward"]) == (5, 5, 3, 2)
    assert found["cycles"] == [["kernels", "low"]]
    # api names the package's __init__ to import a module from it; low names that of kernels in the same way.
    assert found["file_arrows"] == 5
    assert found["outside_the_table"] is None


def test_arrows_outside_the_table_are_named(planted):
    (planted / "tests" / "architecture.py").write_text("MAY_IMPORT = {'public': {'api'}, 'api': {'low', 'kernels'}}\n")
    assert counted(planted)["imports"]["outside_the_table"] == ["kernels -> low", "low -> kernels"]


def test_functions(planted):
    found = counted(planted)
    # fused_dpo_loss 8, each 2, inner 8, softcaps 0, finish 1, _of 0, kernel 13, trainer 0, helper 0
    every = {"functions": 9, "p50": 1, "p90": 13, "max": 13, "above_7": 3, "above_12": 1}
    inside = {"functions": 6, "p50": 0, "p90": 8, "max": 8, "above_7": 1, "above_12": 0}
    assert (found["parameters"]["all"], found["parameters"]["inside"]) == (every, inside)
    assert found["parameters"]["public_calls"] == [
        "dpo_kernels/api.py:fused_dpo_loss",
        "dpo_kernels/integrations/trl.py:trainer",
    ]
    assert found["functions"]["whole"] == {"p50": 2, "p90": 47, "max": 47, "over_45": 1}
    assert found["functions"]["body"] == {"p50": 1, "p90": 46, "max": 46, "over_45": 1}
    assert found["modules"]["of_400_lines"] == {}
    assert found["words"]["softcap"] == {"lines": 1, "files": 1}
    assert found["docstrings"] == {
        "public_functions": 8,
        "public_without": 6,
        "private_functions": 1,
        "private_without": 1,
        "see_another": 1,
    }
    assert (found["option_lists"]["options"], found["option_lists"]["by_file"]) == (6, {"dpo_kernels/api.py": 2})


def test_tests(planted):
    found = counted(planted)["tests"]
    assert found["files"] == 2
    assert found["import_from_test_modules"] == {"tests/test_two.py": ["tests/test_one.py"]}
    assert (found["patched_attributes"], found["private_names"]) == (4, ["_other", "_private"])


def test_prose(planted):
    found = counted(planted)
    assert found["prose"]["README.md"] == {
        "lines": 10,
        "words_with_code_and_tables": 17,
        "words": 7,
        "sentences": 2,
        "words_a_sentence": 3.5,
        "sentences_over_35_words": 0,
        "colons_and_semicolons_a_sentence": 1.0,
    }
    assert (found["prose"]["docs/page.md"]["words"], found["prose"]["docs/page.md"]["sentences"]) == (4, 2)
    assert prose("")["words_a_sentence"] == 0
    assert found["commit_subjects"] is None
    assert found["commit"] == ""


def test_percentiles_are_nearest_ranks():
    assert [percentile(range(1, 11), share) for share in (0.5, 0.9, 1.0)] == [5, 9, 10]
    assert percentile([], 0.5) == 0


def test_tasks(planted):
    found = counted(planted)
    assert found["problems"] == []
    path = found["tasks"]["read_the_algorithm"]
    assert (path["files"], path["functions"], path["files_to_arithmetic"]) == (2, 2, 3)
    shard = found["tasks"]["shard"]
    assert (shard["files"], shard["in_package"], shard["edited"], shard["found"]) == (3, 2, 2, 1)


@pytest.mark.parametrize(
    ("where", "value", "problem"),
    [
        ("steps", ["dpo_kernels/api.py:gone", "dpo_kernels/low.py:each"], "dpo_kernels/api.py:gone does not exist"),
        (
            "steps",
            ["dpo_kernels/low.py:softcaps", "dpo_kernels/low.py:each"],  # which its docstring names
            "dpo_kernels/low.py:softcaps does not name each",
        ),
        ("loop", "dpo_kernels/kernels/rows.py:Rows.finish", "Rows.finish is not a step with a loop"),
        ("files", ["README.md"], "dpo_kernels/low.py is not declared, but has ['finish']"),
        ("files", ["README.md", "dpo_kernels/low.py", "gone.py"], "gone.py does not exist"),
        ("edited", ["setup.py"], "setup.py is edited, but not declared"),
        ("each", "One", "dpo_kernels/low.py has nothing like 'One'"),
        ("found_by", {"under": ["dpo_kernels"], "strings": ["cuda"]}, "no file has 'cuda'"),
        ("found_by", {"lists_under": ["tests"], "listed": ["one", "two"]}, "has ['a list of one and two']"),
    ],
)
def test_a_declaration_that_does_not_hold_is_a_problem(planted, where, value, problem):
    tasks = json.loads(json.dumps(TASKS))
    (tasks["call_path"] if where in tasks["call_path"] else tasks["tasks"]["shard"])[where] = value
    (said,) = counted(planted, tasks)["problems"]
    assert problem in said


def test_this_checkout(capsys, tmp_path):
    # Where code has moved, tests/tools/structure_tasks.json moves with it.
    assert main(["--json"]) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    found = json.loads(said)
    assert found["problems"] == []
    assert found["imports"]["cycles"] == found["imports"]["outside_the_table"] == []
    assert found["option_lists"]["options"] == 32
    assert found["functions"]["number"] > 100
    before = tmp_path / "before.json"
    before.write_text(said, encoding="utf-8")
    assert main(["--against", str(before)]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert first.split() == ["before", "now"]
    assert all(row.split()[-1] == row.split()[-2] != "-" for row in rows if not row.startswith("commit_subjects"))


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_kept_counts_can_be_compared_with(when):
    kept = json.loads((ROOT / "tests" / "tools" / f"structure_{when}.json").read_text(encoding="utf-8"))
    assert len(kept["commit"]) == 40
    rows = [line for line in table(kept).splitlines() if line.split()[-1] == "-"]
    assert rows == []
