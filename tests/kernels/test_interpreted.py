"""The Triton kernels' tests, in a process of their own: triton interprets only if told so before it is imported."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
INTERPRETED = ROOT / "tests" / "interpreted"
# Of the process that runs this test, or of whoever started it; they would change what the other one does.
FOREIGN = ("DPO_", "PYTEST_", "TRITON_")


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    return kept | {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def written_tests(path: Path) -> int:
    """Test functions in a file; parameters make more of them."""
    body = ast.parse(path.read_text()).body
    return sum(isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in body)


def pytest_in_its_own_process(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


# Two processes, about as long as one another: each has to import torch and triton first.
ALONE = "test_kernels.py"
FILES = sorted(path.name for path in INTERPRETED.glob("test_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("files", [[ALONE], [file for file in FILES if file != ALONE]], ids=["kernels", "the rest"])
def test_in_the_sanitized_interpreter(tmp_path: Path, files: list[str]) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    report = tmp_path / "report.xml"
    done = pytest_in_its_own_process(*(f"tests/interpreted/{file}" for file in files), f"--junitxml={report}")
    if done.returncode != 0:
        pytest.fail(f"pytest {' '.join(files)} ended with {done.returncode}:\n{done.stdout}", pytrace=False)
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    counts = {what: int(suite.attrib[what]) for what in ("tests", "failures", "errors", "skipped")}
    assert counts["failures"] == counts["errors"] == counts["skipped"] == 0, f"{counts}\n{done.stdout}"
    assert counts["tests"] >= sum(written_tests(INTERPRETED / file) for file in files) > 0, f"{counts}\n{done.stdout}"


def test_they_are_collected_nowhere_else() -> None:
    done = pytest_in_its_own_process("tests/interpreted", "--collect-only", TRITON_INTERPRET="0")
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout
