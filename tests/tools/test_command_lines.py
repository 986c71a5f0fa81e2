"""Command lines refuse what would train, time or evaluate nothing, before anything else happens."""

import argparse
import ast
from pathlib import Path

import pytest

from benchmarks import run, trainer_table
from demo.options import at_least

pytest.importorskip("vaderSentiment", reason="vaderSentiment is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("trl", reason="trl is not installed")

from demo import online
from examples import fsdp2_dpo, material, plain_loop, trl_dpo
from tests.trl_helpers import OTHERS_WARNINGS

pytestmark = OTHERS_WARNINGS

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    plain_loop.main: {
        **dict.fromkeys(("--pairs", "--epochs", "--batch", "--accumulate", "--max-length"), ("0", "-1", "1.5", "many")),
        **dict.fromkeys(("--beta", "--learning-rate"), ("-0.1", "nan", "inf")),
    },
    fsdp2_dpo.main: {
        **dict.fromkeys(("--pairs", "--epochs", "--batch", "--max-length"), ("0", "-1")),
        **dict.fromkeys(("--beta", "--learning-rate"), ("-0.1", "nan", "inf")),
    },
    trl_dpo.main: {
        **dict.fromkeys(("--steps", "--batch", "--held-out"), ("0", "-1")),
        **dict.fromkeys(("--eval-every", "--seed"), ("-1", "1.5")),
        **dict.fromkeys(("--learning-rate", "--tau"), ("-1", "nan")),
    },
    online.main: {
        **dict.fromkeys(("--steps", "--pairs", "--tokens"), ("0", "-1")),
        **dict.fromkeys(("--sft-steps", "--seed", "--lr", "--beta"), ("-1",)),
    },
    run.main: {"--threads": ("0", "-1"), "--rounds": ("0",), "--seconds": ("-1", "nan")},
    trainer_table.main: {"--rounds": ("-1",), **dict.fromkeys(("--steps", "--batch", "--held-out"), ("0",))},
}


@pytest.mark.parametrize("main", COMMANDS, ids=lambda main: main.__module__)
def test_numbers_that_make_no_sense_are_refused(main, capsys):
    for option, values in COMMANDS[main].items():
        for value in values:
            with pytest.raises(SystemExit) as ended:
                main([f"{option}={value}"])
            assert ended.value.code == 2
            assert f"argument {option}" in capsys.readouterr().err


def numbers_without_a_bound(source):
    """Lines of a source where argparse takes any number."""
    return [
        f"{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        for word in node.keywords
        if word.arg == "type" and isinstance(word.value, ast.Name) and word.value.id in ("int", "float")
    ]


def test_every_number_on_a_command_line_has_a_bound():
    found = []
    for folder in ("examples", "demo", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found += [f"{path.relative_to(ROOT)}:{line}" for line in numbers_without_a_bound(path.read_text("utf-8"))]
    assert found == []
    assert len(numbers_without_a_bound("parser.add_argument('--n', type=int)")) == 1


def test_what_a_bound_lets_through():
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=at_least(1))
    parser.add_argument("--rate", type=at_least(0.0, float))
    given = parser.parse_args(["--count", "1", "--rate", "0"])
    assert (given.count, given.rate) == (1, 0.0)
    assert (type(given.count), type(given.rate)) == (int, float)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--pairs", "3", "--batch", "4"], "--pairs: of 3 pairs not every process .* --batch 4, so that nothing would"),
        (["--max-length", "2"], "--max-length 2 leaves no completion: every prompt has 2 or more"),
    ],
)
def test_the_plain_loop_says_that_it_would_train_nothing(tmp_path, options, words):
    with pytest.raises(SystemExit, match=words) as ended:
        plain_loop.main([*options, "--out", str(tmp_path)])
    assert ended.value.code not in (0, None)  # a text: written to standard error, and the status is 1
    assert list(tmp_path.iterdir()) == []


def test_the_plain_loop_wants_a_micro_batch_for_each_process():
    options, rows = plain_loop.parse(["--batch", "4"]), [{"prompt_ids": [1]}] * 11
    plain_loop.refuse_to_train_nothing(options, rows, processes=2)
    with pytest.raises(SystemExit, match=r"of 11 pairs not every process .3 of them. gets a micro-batch of --batch 4"):
        plain_loop.refuse_to_train_nothing(options, rows, processes=3)


def test_an_example_wants_as_many_pairs_as_were_asked_for(tmp_path, monkeypatch):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 10
    monkeypatch.setattr(material, "_real", lambda cache: (None, None, rows))
    assert len(material.load(True, 7, 3, tmp_path)[2]) == 7
    with pytest.raises(SystemExit, match="there are 10 pairs, not the 11"):
        material.load(True, 8, 3, tmp_path)
