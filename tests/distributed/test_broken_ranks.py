"""A rank that raises, dies or brings other shapes ends the others with an error within seconds."""

import json
import os
import subprocess
import sys

import pytest

from tests.distributed import broken
from tests.distributed.gloo import ROOT
from tests.shared import made_once

WITHIN_S = 20  # on a machine that does much else; a fraction of a second is usual
assert WITHIN_S < broken.LONG_S, "or a timeout could be what ends a rank"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the ranks of every case have left what ended them."""

    def make(out):
        done = subprocess.run(
            [sys.executable, "-m", "tests.distributed.broken", str(out)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=2 * broken.HANGS_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "broken-ranks", make)


def ended(folder, case, rank):
    """What a rank said, how many seconds after the failure, and how its process ended; without words it was killed."""
    own = folder / case.replace(" ", "_")
    end = json.loads((folder / "ends.json").read_text())[f"{case}, rank {rank}"]
    if not (own / f"ended-{rank}").exists():
        return "", 0.0, end
    found = json.loads((own / f"ended-{rank}").read_text())
    return found["said"], found["at"] - float((own / "failed").read_text()), end


@pytest.mark.parametrize(
    ("case", "end"),
    [
        ("raises before the call", 1),
        ("raises in the call", 1),
        ("is killed in the call", -9),
        ("leaves in the call", 0),
        ("is killed in the backward", -9),
    ],
)
def test_a_closed_connection_ends_the_others_at_once(folder, case, end):
    assert ended(folder, case, 1)[2] == end
    said, seconds, exit_code = ended(folder, case, 0)
    assert said.startswith("RuntimeError: ")
    assert 0 <= seconds < WITHIN_S
    assert exit_code == 1


def test_the_timeout_of_the_group_ends_those_that_wait_for_a_rank_that_goes_on(folder):
    said, seconds, exit_code = ended(folder, "raises and goes on", 0)
    assert said.startswith("RuntimeError: ")
    assert seconds < WITHIN_S
    assert exit_code == 1
    other, later, _ = ended(folder, "raises and goes on", 1)
    assert other == "no error"
    assert later > seconds, "or its end has closed the connection"


def test_other_shapes_are_an_error_on_every_rank_where_they_are_compared(folder):
    for rank in range(broken.RANKS):
        said, seconds, exit_code = ended(folder, "other shapes, compared", rank)
        assert said.startswith(f"ValueError: vocab_parallel: ranks [{1 - rank}] were given another problem")
        assert seconds < WITHIN_S
        assert exit_code == 1


def test_other_shapes_that_are_not_compared_end_every_rank_by_gloo(folder):
    """It finds messages of another length. One rank ends itself at that, and the others lose their connection."""
    for rank in range(broken.RANKS):
        said, seconds, exit_code = ended(folder, "other shapes", rank)
        assert said == "" or said.startswith("RuntimeError: ")
        assert seconds < WITHIN_S
        assert exit_code not in (0, "hung")


def test_every_case_is_looked_at(folder):
    assert {name.rpartition(", rank")[0] for name in json.loads((folder / "ends.json").read_text())} == {*broken.CASES}
