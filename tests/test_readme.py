"""The documents say what is: the README's code runs, its tables are complete, its map is true."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import dpo_kernels
from benchmarks import demo_table
from dpo_kernels import losses
from dpo_kernels.planning import tables
from tests.test_units import UNITS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def table(first_header):
    """Rows of the table whose header starts so, as lists of cells."""
    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_header} "))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return rows


@pytest.fixture(scope="module")
def snippets():
    space: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(code, "README.md", "exec"), space)
    return space


def _model_and_batch():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    ids = torch.randint(0, 101, (6, 12))
    mask = torch.arange(12) < torch.tensor([12, 9, 7, 12, 11, 5])[:, None]
    labels = ids.masked_fill(~mask | (torch.arange(12) < 4), -100)
    return LlamaForCausalLM(config), {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def test_the_drop_in_trains_the_same_model(snippets):
    trained = []
    for step in ("naive_step", "fused_step"):
        model, batch = _model_and_batch()
        ref_logps = snippets["reference_logps"](model, batch)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        results = [snippets[step](model, batch, ref_logps, optimizer) for _ in range(3)]
        trained.append((results, [p.detach() for p in model.parameters()]))
    (naive, naive_parameters), (fused, fused_parameters) = trained
    for a, b in zip(naive, fused, strict=True):
        torch.testing.assert_close(b[0], a[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(b[1], a[1], rtol=1e-4, atol=1e-5)
    assert naive[-1][0] < naive[0][0]
    for a, b in zip(naive_parameters, fused_parameters, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def test_the_drop_in_is_as_short_as_it_says():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in blocks[1].splitlines() if line.strip()]) <= 20


def test_the_table_of_losses_is_complete():
    rows = {row[0].strip('`"'): row for row in table("`loss_type`")}
    assert set(rows) == {*losses.LOSSES, "a callable"}
    for name, spec in losses.LOSSES.items():
        _, formula, reference, by_token, units, _ = rows[name]
        facts = (spec.needs_reference, spec.averages, 3 if spec.separable else 4)
        assert (reference == "yes", by_token == "yes", int(units)) == facts, name
        for option in spec.options:
            assert option in formula or option in ("label_smoothing",), (name, option)


def test_contributing_shows_how_a_loss_came_in():
    """What it shows stands in the files, to the letter."""
    shown = re.findall(r"```(?:python)?\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    odpo = [block for block in shown if "odpo" in block]
    places = ("dpo_kernels/losses/pairwise.py", "tests/test_losses.py", "dpo_kernels/reference.py", "README.md")
    assert len(odpo) == len(places)
    for block, place in zip(odpo, places, strict=True):
        assert block in (ROOT / place).read_text(encoding="utf-8"), place


def test_the_recipes_for_losses_run():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/losses.md").read_text(encoding="utf-8"), re.DOTALL)
    torch.manual_seed(0)
    labels = torch.randint(0, 11, (8, 5))
    labels[:, :1] = -100
    labels[3, 2:] = -100
    space = {
        "hidden": torch.randn(8, 5, 4, requires_grad=True),
        "weight": torch.randn(11, 4, requires_grad=True),
        "labels": labels,
        "ref_logps": -8 - torch.rand(8),
        "sample": lambda prompts: [["bad", "fine", "good"] for _ in prompts],
        "reward": lambda texts: [{"bad": -1.0, "fine": 0.2, "good": 1.0}[text] for text in texts],
    }
    for block in blocks:
        exec(block, space)
    results = [value for value in space.values() if hasattr(value, "loss")]
    assert len(results) >= 13
    for result in results:
        if result.loss.requires_grad:
            result.loss.backward()
        assert result.loss.isfinite()
    assert space["pairs"] == [("a prompt", "good", "bad")]
    assert len({round(float(result.loss.detach()), 6) for result in results}) == len(results)


def test_the_table_of_strategies_says_what_is_counted():
    counted = {(s, trainable): units for s, trainable, hidden, units in UNITS if hidden}
    rows = {row[0]: row for row in table("strategy")}
    assert set(rows) == set(tables.STRATEGIES)
    for name, row in rows.items():
        assert (int(row[1]), int(row[2])) == (counted[name, True], counted[name, False])


def test_the_table_of_backends_says_what_there_is():
    rows = {row[0]: row[1] for row in table("backend")}
    assert set(rows) == set(tables.BACKEND_NAMES)
    for name, state in rows.items():
        assert ("not measured" in state) == (name in ("triton", "cuda")), "no GPU was measured yet"


def test_the_map_is_true():
    block = re.search(r"## Map\n\n```\n(.*?)```", README, re.DOTALL).group(1)
    named = set(re.findall(r"[\w/]+\.py", block.split("csrc/")[0]))
    package = {path.name for path in (ROOT / "dpo_kernels").rglob("*.py")} - {"__init__.py"}
    assert named == package
    for folder in re.findall(r"^([\w/]+/)(?= |$)", block, re.MULTILINE):
        assert (ROOT / folder).is_dir()


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/design.md", "CHANGELOG.md"])
def test_links_and_commands_exist(document):
    text = (ROOT / document).read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
        assert command in targets
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert ((ROOT / document).parent / link).exists(), link
    for path in re.findall(r"`((?:dpo_kernels|tests|docs|benchmarks)/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).exists(), path


def test_every_command_of_the_workflow_exists():
    text = (ROOT / ".github/workflows/tests.yml").read_text()
    commands = re.findall(r"run: (.+)", text)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"make test", "make test-gpu"} <= set(commands)
    for command in commands:
        program, target = command.split()
        assert program == "make"
        assert target in targets


def test_the_gpu_runner_cannot_be_green_by_skipping(tmp_path):
    """Where torch finds no device, `make test-gpu` is an error."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: make test-gpu itself is the test")
    recipe = (ROOT / "Makefile").read_text().split("test-gpu: ", 1)[1].split("\n\n", 1)[0]
    check = re.search(r"-c '([^']+)'", recipe).group(1)
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 1


def test_the_measured_table_is_what_the_results_say():
    results = json.loads(demo_table.RESULTS.read_text())
    assert demo_table.section(results) in README
    changed = json.loads(json.dumps(results))
    changed["comparison"]["fused"]["step_s"] *= 1.5
    assert demo_table.section(changed) not in README


def test_every_public_name_has_a_docstring_and_a_mention():
    for name in set(dpo_kernels.__all__) - {"__version__"}:
        assert getattr(dpo_kernels, name).__doc__, name
        if name != "DPOLossOutput":
            assert name in README, name
