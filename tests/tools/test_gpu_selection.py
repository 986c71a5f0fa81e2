"""What `make test-gpu` runs on a machine that has a GPU and little else: parts, workers, and reasons to skip."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_kernels.kernels import extension, installed
from tests.gpu import selection

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
# Neither of the demo nor of a trainer.
FOREIGN = (
    *("vaderSentiment", "trl", "transformers", "peft", "datasets", "accelerate", "safetensors", "matplotlib"),
    "deepspeed",
)


def test_parts_are_a_partition():
    items = list(range(11))
    for number in (1, 2, 3, 11, 20):
        parts = [selection.part_of(items, f"{part}/{number}") for part in range(1, number + 1)]
        assert sorted(item for part in parts for item in part) == items
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "1/0", "-1/3", "a/b", "1/3/5", ""])
def test_what_is_no_part_is_an_error(part):
    with pytest.raises(ValueError, match="expected K/N with 1 <= K <= N"):
        selection.part_of([1, 2, 3], part)


@pytest.mark.parametrize(
    ("free", "cores", "number"),
    [(139, 16, 8), (139, 4, 4), (79, 16, 5), (47, 16, 1), (44, 16, 7), (23, 16, 3), (7, 16, 1), (1, 16, 1)],
)
def test_as_many_workers_as_there_is_room_for(free, cores, number):
    assert selection.workers(free * GIB, cores) == number


def test_a_backend_that_is_not_installed_is_a_reason(monkeypatch):
    monkeypatch.setattr(extension, "why_not", lambda kind: f"no {kind}")
    monkeypatch.setattr(installed, "why_no_triton", lambda: "no triton")
    assert selection.lacking({"backend": "cuda"}, ()) == "no cuda"
    assert selection.lacking({}, ("operators",)) == "no cuda"
    assert selection.lacking({"backend": "triton"}, ()) == "no triton"
    assert selection.lacking({"backend": "torch", "dtype": "cuda"}, ("monkeypatch",)) is None


def test_what_is_installed_for_it_needs_neither_nvcc_nor_a_trainer():
    makefile, project = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    assert makefile.split("$(VENV)/.gpu: ", 1)[1].splitlines()[1] == "\t$(EDITABLE) '.[gpu-test]'"
    extra = re.search(r"^gpu-test = \[\n(.*?)^\]", project, re.MULTILINE | re.DOTALL)[1]
    named = set(re.findall(r'"([\w-]+)', extra))
    assert {"pytest", "pytest-xdist", "hypothesis", "tqdm"} <= named
    assert not named & set(FOREIGN)
    for target in ("test-gpu", "first-light"):
        assert re.search(rf"^{target}: \$\(VENV\)/\.gpu \$\(VENV\)/\.extension ", makefile, re.MULTILINE), target


def test_no_package_of_the_demo_is_needed_and_a_part_is_a_part():
    """Collected as the Makefile does, in a Python that lacks them."""
    makefile = (ROOT / "Makefile").read_text()
    paths = re.search(r"^GPU_TESTS := (.+)$", makefile, re.MULTILINE)[1].split()
    recipe = makefile.split("test-gpu: ", 1)[1].split("\n\n", 1)[0]
    assert {"-m gpu", "-W default", "--part $(PART)", "--dist loadgroup"} <= set(
        re.findall(r"-{1,2}[a-zA-Z]+ \S+", recipe)
    )
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({FOREIGN!r})); import pytest; "
        f"sys.exit(pytest.main(['-qq', '--collect-only', '-p', 'no:cacheprovider', '-m', 'gpu', '-W', 'default', "
        f"'--part', '2/3', *{paths!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {
        line.split(":")[0]: int(line.split(":")[1]) for line in done.stdout.splitlines() if re.search(r": \d+$", line)
    }
    assert set(counts) == {"tests/kernels/test_gpu.py", "tests/gpu/test_steps.py", "tests/gpu/test_sparse.py"}
    assert sum(counts.values()) > 200
