"""The pages say what is: code runs, outputs are real, tables are complete, links lead somewhere."""

import ast
import contextlib
import inspect
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import dpo_kernels
from benchmarks import demo_table
from dpo_kernels import LOSSES as REGISTER
from dpo_kernels.planning.tables import BACKENDS, STRATEGIES
from tests.tools import layer_picture, site_links
from tests.tools.structure import prose

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
}
README, LOSSES, PERFORMANCE = (PAGES[name] for name in ("README.md", "docs/losses.md", "docs/performance.md"))
# Pages that people write and that have no others to keep them; the rest is generated, or has tests of its own.
WRITTEN = [name for name in PAGES if not name.startswith(("docs/benchmarks/", "docs/integrations/", "CHANGELOG"))]
# Old words that each had two meanings or none outside this project.
RETIRED = r"the door|the seam|the waist|\bwaist\b|\bpoison|\blent\b|\blends\b|GEMM units? with|units of GEMM"
FENCE = re.compile(r"(?P<before>[^\n]*)\n+```(?P<language>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


def fences(page):
    """(line before, language, code) of each fenced block of a page."""
    return [(block["before"], block["language"], block["code"]) for block in FENCE.finditer(PAGES[page])]


def python(page):
    return [code for _, language, code in fences(page) if language == "python"]


def table(text, first_header):
    """Rows of the table whose header starts so, as lists of cells."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_header} "))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return rows


# --- code -------------------------------------------------------------------------------------------------------------


def run_page(page, space):
    """Run a page's Python in one namespace; a text block after one holds what it printed, up to a line of dots."""
    printed = None
    for before, language, code in fences(page):
        if language == "python" and before != "<!-- fragment -->":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(code, page, "exec"), space)
            assert printed in (None, ""), f"{page} does not show what was printed: {printed}"
            printed = out.getvalue()
        elif language == "text":
            shown, dots, _ = code.partition("...\n")
            assert (printed[: len(shown)] if dots else printed) == shown
            printed = None
    return space


def llama_and_batch():
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


@pytest.fixture(scope="module")
def quickstart():
    return run_page("docs/quickstart.md", {})


def test_the_quickstart_runs_and_prints_what_it_shows(quickstart):
    results = [quickstart[name] for name in ("out", "scored", "shared", "absent", "custom")]
    assert len({round(float(result.loss.detach()), 6) for result in results}) == len(results)
    for result in results:
        assert result.loss.isfinite()


def test_before_and_after_in_the_readme_train_the_same_model(quickstart):
    before, after = python("README.md")
    for code in (before, after):
        assert len([line for line in code.splitlines() if line.strip()]) <= 10
    trained = []
    for code in (before, after):
        model, batch = llama_and_batch()
        space = {"model": model, "ids": batch["input_ids"], "mask": batch["attention_mask"], "labels": batch["labels"]}
        space |= {"F": F, "beta": 0.1, "ref_logps": quickstart["reference_logps"](model, batch)}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        values = []
        for _ in range(3):
            exec(compile(code, "README.md", "exec"), space)
            optimizer.step()
            optimizer.zero_grad()
            values.append(space["loss"].detach())
        trained.append((values, [p.detach() for p in model.parameters()]))
    (naive, naive_parameters), (fused, fused_parameters) = trained
    torch.testing.assert_close(fused, naive, rtol=1e-5, atol=1e-6)
    assert naive[-1] < naive[0]
    for a, b in zip(naive_parameters, fused_parameters, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


def test_the_step_of_the_quickstart_is_that_of_the_readme(quickstart):
    model, batch = llama_and_batch()
    ref_logps = quickstart["reference_logps"](model, batch)
    out = quickstart["dpo_step"](model, batch, ref_logps)
    space = {"model": model, "ids": batch["input_ids"], "mask": batch["attention_mask"], "labels": batch["labels"]}
    exec(python("README.md")[1], space | {"beta": 0.1, "ref_logps": ref_logps}, shown := {})
    torch.testing.assert_close(out.loss, shown["loss"], rtol=0, atol=0)


def test_the_recipes_for_losses_run():
    torch.manual_seed(0)
    labels = torch.randint(0, 11, (8, 5))
    labels[:, :1] = -100
    labels[3, 2:] = -100
    space = {
        "hidden": torch.randn(8, 5, 4, requires_grad=True),
        "weight": torch.randn(11, 4, requires_grad=True),
        "labels": labels,
        "ref_logps": -8 - torch.rand(8),
        "ref_hidden": torch.randn(8, 5, 3),
        "ref_weight": torch.randn(11, 3),
        "sample": lambda prompts: [["bad", "fine", "good"] for _ in prompts],
        "reward": lambda texts: [{"bad": -1.0, "fine": 0.2, "good": 1.0}[text] for text in texts],
    }
    run_page("docs/losses.md", space)
    results = [value for value in space.values() if hasattr(value, "loss")]
    assert len(results) >= 16
    for result in results:
        if result.loss.requires_grad:
            result.loss.backward()
        assert result.loss.isfinite()
    assert space["pairs"] == [("a prompt", "good", "bad")]
    assert len({round(float(result.loss.detach()), 6) for result in results}) == len(results)
    call = (space["hidden"], space["weight"], labels)
    for loss, gemms in ((space["above_average"], 4), (space["LengthAware"](0.01), 3)):
        assert dpo_kernels.explain(*call, ref_logps=space["ref_logps"], loss_type=loss).units == gemms


def test_the_example_of_a_sparse_head_runs(monkeypatch):
    monkeypatch.setattr("dpo_kernels.inputs.notices.warn_once", lambda message: None)
    before = run_page("docs/sparse-gradient.md", {})["head"].weight.grad
    assert 0 < before._nnz() < 5000


FOLDERS = ("dpo_kernels", "tests", "benchmarks", "demo", "examples")
RUN = {
    "README.md",
    "docs/quickstart.md",
    "docs/losses.md",
    "docs/sparse-gradient.md",
}  # the pages whose code runs above


@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_runs_or_is_marked(page):
    for before, language, code in fences(page):
        if language == "python" and page != "CONTRIBUTING.md":  # whose pieces are compared with files below
            ast.parse(code)
            integration = page.startswith("docs/integrations/")  # before and after, run by tests/integrations
            assert page in RUN or integration or before == "<!-- fragment -->", code


def test_a_page_that_shows_another_output_is_noticed(monkeypatch):
    page = "# x\n\n```python\nprint(1)\nprint(2)\n```\n\n```text\n1\n...\n```\n"
    monkeypatch.setitem(PAGES, "planted.md", page)
    run_page("planted.md", {})
    monkeypatch.setitem(PAGES, "planted.md", page.replace("text\n1", "text\n3"))
    with pytest.raises(AssertionError):
        run_page("planted.md", {})


def test_contributing_shows_how_a_loss_came_in():
    """What it shows stands in the files, to the letter."""
    odpo = [code for _, _, code in fences("CONTRIBUTING.md") if "odpo" in code]
    places = (
        "dpo_kernels/losses/pairwise.py",
        "tests/hand_worked.py",
        "dpo_kernels/reference/losses.py",
        "docs/losses.md",
    )
    assert len(odpo) == len(places)
    for block, place in zip(odpo, places, strict=True):
        assert block in (ROOT / place).read_text(encoding="utf-8"), place


# --- tables -----------------------------------------------------------------------------------------------------------


def test_the_table_of_losses_is_complete():
    rows = {row[0].strip('`"'): row for row in table(LOSSES, "`loss_type`")}
    assert set(rows) == {*REGISTER, "a callable"}
    for name, spec in REGISTER.items():
        _, formula, reference, by_token, gemms, _ = rows[name]
        facts = (spec.needs_reference, spec.averages, 3 if spec.separable else 4)
        assert (reference == "yes", by_token == "yes", int(gemms)) == facts, name
        for option in spec.options:
            assert option in formula or option in ("label_smoothing",), (name, option)
    assert "over 20 losses for pairs" in README
    assert "over 20 preference losses" in PAGES["CHANGELOG.md"]
    assert len(REGISTER) > 20


def test_the_fields_of_loss_inputs_are_listed():
    assert [row[0] for row in table(LOSSES, "field")] == list(dpo_kernels.LossInputs._fields)


def test_the_table_of_strategies_says_what_explain_says():
    """And test_gemm_count.py compares what explain says with what is counted."""
    rows = {row[0]: row for row in table(PERFORMANCE, "strategy")}
    assert set(rows) == {*STRATEGIES, "frozen_head"}
    hidden, labels = torch.zeros(2, 3, 4, requires_grad=True), torch.zeros(2, 3, dtype=torch.int64)
    for name in ("chunked", "recompute", "streaming"):
        for trainable, cell in ((True, rows[name][1]), (False, rows[name][2])):
            weight = torch.zeros(5, 4, requires_grad=trainable)
            plan = dpo_kernels.explain(hidden, weight, labels, reference_free=True, strategy=name)
            assert plan.units == int(cell), (name, trainable)
    assert rows["frozen_head"][1:3] == ["–", rows["chunked"][2]]


def test_the_table_of_backends_says_what_there_is():
    rows = {row[0]: row[1] for row in table(PERFORMANCE, "backend")}
    assert set(rows) == set(BACKENDS)
    for name, state in rows.items():
        assert ("not measured" in state) == (name in ("triton", "cuda")), "no GPU was measured yet"


def test_every_environment_variable_is_described():
    sources = [ROOT / "setup.py", *(ROOT / "dpo_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.[ch]*")]
    read = {name for path in sources for name in re.findall(r'"(DPO_KERNELS_[A-Z0-9_]+)"', path.read_text("utf-8"))}
    assert {row[0] for row in table(PERFORMANCE, "variable")} == read


def test_every_public_name_has_a_docstring_and_an_entry():
    entries = re.findall(r"^::: dpo_kernels\.(\w+)$", PAGES["docs/api.md"], re.MULTILINE)
    assert sorted(entries) == sorted(set(dpo_kernels.__all__) - {"__version__"})
    for name in entries:
        assert getattr(dpo_kernels, name).__doc__, name
        said = re.search(rf"\[`{name}`\]\(\.\./(\S+)\) \w+[^\n]*[.\n]", PAGES["docs/api.md"])
        assert said, f"{name} has no link with a sentence"
        source = (ROOT / said[1]).read_text(encoding="utf-8")
        assert re.search(rf"^(?:def|class) {name}\b|^{name}\b[^=\n]*= ", source, re.MULTILINE), name


def test_the_arguments_of_fused_dpo_loss_are_listed():
    signature = inspect.signature(dpo_kernels.fused_dpo_loss).parameters
    defaults = {name: "–" if p.default is p.empty else repr(p.default) for name, p in signature.items()}
    defaults.pop("loss_options")
    rows = table(PAGES["docs/api.md"], "argument")
    listed = {row[0]: row[1].replace('"', "'") for row in rows}
    assert {name: listed[name] for name in defaults} == defaults
    documented = dpo_kernels.fused_dpo_loss.__doc__.partition("Args:")[2].partition("Returns:")[0]
    described = re.findall(r"^ {8}\*{0,2}(\w+): ", documented, re.MULTILINE)
    assert [row[0] for row in rows] == [name for name in described if name != "loss_options"]


# --- generated --------------------------------------------------------------------------------------------------------


def test_the_measured_table_is_what_the_results_say():
    results = json.loads(demo_table.RESULTS.read_text())
    assert demo_table.section(results) in PERFORMANCE
    changed = json.loads(json.dumps(results))
    changed["comparison"]["fused"]["step_s"] *= 1.5
    assert demo_table.section(changed) not in PERFORMANCE


def test_the_numbers_in_the_readmes_text_are_in_its_table():
    """Which benchmarks.report makes, and test_benchmarks.py compares with the results."""
    text, made = README.split("<!-- benchmarks:begin -->")
    full, ours = re.search(r"full logits took ([\d,]+) MiB and this library\s+([\d,]+) MiB", text, re.DOTALL).groups()
    machines = made.split("| case |")[1:]
    rows = [row for rest in machines for row in table("| case |" + rest, "case")]
    assert any(f"{ours} MiB" in row[1] and f"{full.replace(',', '')} MiB" in row[2] for row in rows)


def test_picture_and_map_are_current():
    """`python -m tests.tools.layer_picture --write` makes them."""
    assert list(layer_picture.stale()) == []


def test_the_picture_follows_the_table():
    made = layer_picture.picture({"a": {"b", "c"}, "b": {"c"}, "c": set()})
    assert made.splitlines() == ["```mermaid", "flowchart TD", "    a --> b", "    b --> c", "```"]
    with pytest.raises(ValueError, match="cycle through"):
        layer_picture.picture({"a": {"b"}, "b": {"a"}})


def test_the_map_has_the_first_sentence_of_each_file(tmp_path):
    (tmp_path / "dpo_kernels").mkdir()
    (tmp_path / "dpo_kernels" / "one.py").write_text('"""What ``x | y`` is. More.\n\nAnd more."""\n')
    assert layer_picture.file_map(tmp_path).splitlines()[-1].endswith(r"| What `x \| y` is |")
    page = tmp_path / "page.md"
    page.write_text("<!-- layers:begin -->\n<!-- layers:end -->\n<!-- files:begin -->\nold\n<!-- files:end -->\n")
    assert any(line == "left over: old" for line in layer_picture.stale(page, tmp_path))
    with pytest.raises(ValueError, match="no part between"):
        layer_picture.with_parts("# nothing", {"layers": ""})


# --- links and words --------------------------------------------------------------------------------------------------


def anchors(page):
    """The anchors of a page's headings, as the forge and mkdocs make them."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)", text)
    links += [(link, "") for link in re.findall(r'(?:src|srcset)="([^"]+)"', text)]
    for link, anchor in links:
        target = ((ROOT / page).parent / link).resolve() if link else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.relative_to(ROOT).as_posix()), f"{link}#{anchor}"


@pytest.mark.parametrize("page", [name for name in PAGES if not name.startswith("docs/benchmarks/")])
def test_commands_and_paths_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in re.findall(r"(?:^|`)make ([a-z-]+)", PAGES[page], re.MULTILINE):
        assert command in targets
    for path in re.findall(r"`((?:dpo_kernels|tests|docs|benchmarks|csrc)/[\w./-]+\.\w+)`", PAGES[page]):
        assert (ROOT / path).exists(), path
    names = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    for named in re.findall(r"`([\w/]+\.py)`", PAGES[page]):
        assert any(f"/{name}".endswith(f"/{named}") for name in names), named
    for module in re.findall(r"python -m ((?:tests|benchmarks|demo|examples)[\w.]*)", PAGES[page]):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_a_link_out_of_docs_is_text_on_the_site():
    page = SimpleNamespace(file=SimpleNamespace(src_uri="integrations/trl.md"))
    text = "[a](../api.md) [b](../../README.md) [c](x.md#y) [d](https://e.org) ![f](../../g.png) [h](../../i.py#j)"
    kept = "[a](../api.md) b [c](x.md#y) [d](https://e.org) ![f](../../g.png) h"
    assert site_links.on_page_markdown(text, page) == kept


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(name.removeprefix("docs/") for name in PAGES if name.startswith("docs/"))


def test_the_readme_and_the_quickstart_install_alike():
    def commands(page):
        return re.findall(r"^(.*pip install .*?) +#", PAGES[page], re.MULTILINE)

    assert len(commands("README.md")) == 3
    assert set(commands("README.md")) <= set(commands("docs/quickstart.md"))


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150
    assert len(PAGES["docs/design.md"].split()) <= 1500


@pytest.mark.parametrize("page", WRITTEN)
def test_sentences_are_short_and_words_are_defined(page):
    counted = prose(PAGES[page])
    assert counted["words_a_sentence"] <= 18
    assert counted["sentences_over_35_words"] == 0
    assert re.findall(RETIRED, PAGES[page], re.IGNORECASE) == []


def test_every_term_is_defined_once():
    terms = re.findall(r"^- \*\*(.+?)\*\*", PAGES["docs/concepts.md"], re.MULTILINE)
    assert len(terms) >= 30
    assert len({term.lower() for term in terms}) == len(terms)


# --- the runner -------------------------------------------------------------------------------------------------------


def test_every_command_of_the_workflow_exists():
    text = (ROOT / ".github/workflows/tests.yml").read_text()
    commands = re.findall(r"run: (.+)", text)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"make test", "make test-gpu"} <= set(commands)
    for command in commands:
        program, target = command.split()
        assert program == "make"
        assert target in targets


def test_the_gpu_runner_cannot_be_green_by_skipping():
    """Where torch finds no device, `make test-gpu` is an error."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: make test-gpu itself is the test")
    recipe = (ROOT / "Makefile").read_text().split("test-gpu: ", 1)[1].split("\n\n", 1)[0]
    check = re.search(r"-c '([^']+)'", recipe).group(1)
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 1
