"""First light: its steps run on a CPU with small sizes, resume, name what is wrong, and prove nothing without a GPU."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cases as benchmark_cases
from benchmarks import providers, tables
from dpo_kernels import __main__ as bug_report
from dpo_kernels.planning.tables import BACKENDS
from tests.first_light import __main__ as first_light
from tests.first_light import page, steps, trace, widths
from tests.first_light.steps import Place, Result
from tests.tools.test_gpu_selection import FOREIGN

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def place(tmp_path):
    return Place("cpu", tmp_path, in_process=True)


@pytest.fixture
def planted(monkeypatch):
    """Three steps that note their names; the second one fails as long as the test says so."""
    ran, broken = [], {"two"}

    def step(name):
        def run(place, seconds):
            ran.append(name)
            return Result(name not in broken, f"{name} | said", {"cases": {name: ["a rule"]}} if name in broken else {})

        return run, 10.0

    monkeypatch.setattr(first_light, "all_steps", lambda device: {name: step(name) for name in ("one", "two", "a/b")})
    return ran, broken


def run(folder, *arguments):
    return first_light.main(["--device", "cpu", "--folder", str(folder), *arguments])


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dry_run_tries_every_step(tmp_path, capsys, monkeypatch):
    for name, value in {"PAIRS": 1, "LENGTH": 3, "WIDTH": 8, "VOCAB": 32}.items():
        monkeypatch.setattr(bug_report, name, value)
    some = ("8B head, frozen", "softcap, bias and statistics, 256000 tokens")
    monkeypatch.setattr(widths, "SMALL", {name: widths.SMALL[name] for name in some})
    assert run(tmp_path, "--in-process") == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    names = list(steps.all_steps("cpu"))
    for number, name in enumerate(names, 1):
        assert f"[{number}/{len(names)}] {name}: proved: " in said
    text = (tmp_path / "report.md").read_text()
    assert "A dry run on a CPU with small sizes, which proves nothing about a GPU" in text
    assert text.count("| ok |") == len(names)
    assert "backends on cpu" in text
    assert "ours/torch/chunked" in text
    state = json.loads((tmp_path / "report.json").read_text())
    assert state["steps"]["trace"]["facts"]["products"] == 3
    assert len(state["steps"]["widths/torch"]["facts"]["cases"]) == len(some)
    assert (tmp_path / "trace.json").stat().st_size > 1000


def test_nothing_is_proved_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert first_light.main([]) == 1
    assert "torch finds no CUDA device, so that nothing is proved here" in capsys.readouterr().err


def test_it_resumes_with_what_is_not_proved(tmp_path, planted, capsys):
    ran, broken = planted
    assert run(tmp_path) == 1
    assert ran == ["one", "two", "a/b"]
    text = (tmp_path / "report.md").read_text()
    assert "2 of 3 steps" in text
    assert "| two | **failed** |" in text
    assert "two \\| said" in text
    assert "- two, two: a rule" in text
    broken.clear()
    assert run(tmp_path) == 0
    assert ran[3:] == ["two"]
    assert "[1/3] one: proved earlier: one | said" in capsys.readouterr().out
    assert run(tmp_path, "--again", "--only", "a") == 0
    assert ran[4:] == ["a/b"]
    assert run(tmp_path, "--only", "nothing") == 2


def test_another_version_starts_anew(tmp_path, planted, monkeypatch):
    ran, broken = planted
    broken.clear()
    run(tmp_path)
    monkeypatch.setattr(first_light.verdicts, "path_of", lambda device: Path("another.json"))
    run(tmp_path)
    assert ran == ["one", "two", "a/b"] * 2


def test_any_file_of_the_code_makes_another_version(tmp_path):
    for name in ("dpo_kernels/a.py", "tests/deep/b.py", "csrc/c.cu", "build/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    seen = [first_light.digest_of(tmp_path)]
    for name in ("dpo_kernels/a.py", "tests/deep/b.py", "csrc/c.cu"):
        (tmp_path / name).write_text("2")
        seen.append(first_light.digest_of(tmp_path))
    (tmp_path / "build/d.py").write_text("2")
    assert len(set(seen)) == 4
    assert first_light.digest_of(tmp_path) == seen[-1]


def test_what_there_is_no_time_for_is_left_and_said(tmp_path, planted, capsys):
    ran, _ = planted
    assert run(tmp_path, "--minutes", "0") == 1
    assert ran == []
    assert "[1/3] one: left, since 0 minutes are over; the same command goes on" in capsys.readouterr().out


def test_a_page_says_what_has_not_run():
    text = page.page("cuda", {"name": "a GPU", "steps": {}}, list(steps.all_steps("cuda")))
    assert text.count("| not run |") == len(steps.all_steps("cuda"))
    assert text.count("not measured") == len(steps.CASES["cuda"]) == 4


# --- what it names ----------------------------------------------------------------------------------------------------


def test_there_are_twenty_tests_and_each_exists():
    """Also in a Python without the packages of a demo or a trainer, where everything else must import, too."""
    assert len(set(steps.TESTS_ON_A_GPU)) == 20
    names = [*steps.TESTS_ON_A_GPU, *steps.TESTS_ON_A_CPU]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({FOREIGN!r})); import pytest; "
        "from tests.first_light import __main__, trace, widths; from benchmarks import run, worker; "
        f"sys.exit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', *{names!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(names) <= set(done.stdout.splitlines())


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_its_benchmarks_and_backends_exist(device):
    known = providers.registry()
    for case in steps.CASES[device]:
        assert benchmark_cases.CASES[case].device == device
    for pattern in steps.PROVIDERS[device]:
        assert any(tables.matches(name, pattern) for name in known), pattern
    assert set(steps.BACKENDS[device]) <= set(BACKENDS)


# --- steps that fail --------------------------------------------------------------------------------------------------


def answers(monkeypatch, status, *lines):
    monkeypatch.setattr(Place, "run", lambda *_, **__: (status, "\n".join(lines)))


def test_a_report_that_finds_a_fault_fails(monkeypatch, place):
    answers(monkeypatch, 1, "torch: yes", "  triton, bfloat16: its self-check failed: reduce [...]")
    assert steps.machine(place, 1.0).proved == "triton, bfloat16: its self-check failed: reduce [...]"
    answers(monkeypatch, 139, "something", "")
    result = steps.machine(place, 1.0)
    assert (result.ok, result.proved) == (False, "the report ended with 139: something")


def test_a_width_that_differs_fails(monkeypatch, place):
    good = json.dumps({"case": "a", "broken": []})
    answers(monkeypatch, 0, good, json.dumps({"case": "b", "broken": ["dweight: 1"]}), json.dumps({"launched": []}))
    result = steps.widths(place, 1.0, "triton")
    assert (result.ok, result.proved) == (False, "1 of 2 cases differ from the oracle; b: dweight: 1")
    answers(monkeypatch, 134, good, "CUDA error: an illegal memory access")
    result = steps.widths(place, 1.0, "triton")
    assert (result.ok, result.proved) == (
        False,
        "after 1 cases it ended with 134: CUDA error: an illegal memory access",
    )


def test_a_kernel_that_was_not_launched_is_named(monkeypatch, tmp_path):
    launched = [name for name in widths.TRITON_KERNELS if name != "linear_dlogits"]
    answers(monkeypatch, 0, json.dumps({"case": "a", "broken": []}), json.dumps({"launched": launched}))
    result = steps.widths(Place("cuda", tmp_path), 1.0, "triton")
    assert (result.ok, result.proved) == (False, "all agree, but the profiler saw no launch of linear_dlogits")
    assert steps.widths(Place("cuda", tmp_path), 1.0, "torch").ok


def test_a_case_that_raises_is_a_broken_rule(monkeypatch):
    monkeypatch.setattr(
        widths, "inputs_of", lambda case, device: (_ for _ in ()).throw(torch.OutOfMemoryError("no room"))
    )
    (found, _) = widths.judged("cpu", "torch", {"one": widths.SMALL["8B head, frozen"]})
    assert found == {"case": "one", "broken": ["OutOfMemoryError: no room"]}


def test_tests_that_fail_or_skip_are_named(monkeypatch, place):
    def pytest_that_writes(*words, seconds):
        report = next(word for word in words if word.startswith("--junitxml=")).removeprefix("--junitxml=")
        Path(report).write_text(
            '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure message="x = 1"/></testcase>'
            '<testcase name="c"><skipped message="no triton"/></testcase></testsuite></testsuites>'
        )
        return 1, "said"

    monkeypatch.setattr(steps, "command", pytest_that_writes)
    result = steps.tests(place, 1.0)
    assert (result.ok, result.proved) == (False, "1 of 3 tests pass; b: failure: x = 1; c: skipped: no triton")
    monkeypatch.setattr(steps, "command", lambda *_, **__: (4, "no such test"))
    assert steps.tests(place, 1.0).proved == "pytest ended with 4: no such test"


def test_a_process_that_hangs_ends():
    status, said = steps.command(sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)", seconds=0.5)
    assert (status, steps._ending(status, said)[:20]) == (124, "did not end in time:")


def row(ms, **more):
    return {"rounds": [[0, [ms / 1e3]]], **more}


def test_a_benchmark_that_is_wrong_fails():
    def judged(rows, status=0):
        return steps._judged("case", {"cases": {"case": {"rows": rows}}}, status, "said")

    good = {"floor": row(1.0), "ours/a": row(2.0), "ours/b": row(4.0), "TRL": row(3.0)}
    assert judged(good).proved == "ours/a takes 2 ms; as multiples of it: 0.50 floor, 1.50 TRL"
    assert judged(good | {"ours/b": {"rounds": [], "reason": "wrong: loss"}}).proved == "ours/b: wrong: loss"
    assert judged({"floor": row(1.0)}).proved == "nothing of ours was timed"
    assert judged(good, 1).proved == "the benchmark ended with 1: said"
    assert judged(good | {"ours/b": {"rounds": [], "reason": "no extension"}}).ok


def test_a_trace_without_a_product_fails(monkeypatch, place):
    answers(monkeypatch, 0, json.dumps({"launches": 3, "products": 0}))
    assert not steps.trace(place, 1.0).ok


# --- what a trace says ------------------------------------------------------------------------------------------------


def test_idle_time_and_launches_of_a_trace():
    """Kernels at 0-2, 1-3 and 5-6, a copy at 7-8, the first product at 10-20, another kernel at 21-22."""
    times = [("a", 0, 2), ("b", 1, 3), ("a", 5, 6), ("Memcpy DtoH", 7, 8), ("nvjet_tst_128x256", 10, 20), ("c", 21, 22)]
    found = trace.analysis([trace.Event(*each) for each in reversed(times)])
    assert (found["launches"], found["copies"], found["products"]) == (5, 1, 1)
    assert (found["before_first_product_us"], found["idle_before_first_product_us"]) == (10, 5)
    assert (found["span_us"], found["idle_us"]) == (22, 6)
    assert found["launches_before_first_product"] == 4
    assert found["largest"][:2] == [["nvjet_tst_128x256", 1, 10.0], ["a", 2, 3.0]]
    assert trace.analysis([]) == {"launches": 0}
    assert trace.analysis([trace.Event("a", 0, 1)])["before_first_product_us"] is None


def test_the_make_target_runs_it():
    recipe = (ROOT / "Makefile").read_text().split("first-light: ", 1)[1].split("\n\n", 1)[0]
    assert re.search(r"-m tests\.first_light \$\(ARGS\)$", recipe)
