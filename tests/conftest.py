"""What every test gets: one torch thread, a seed, no network, a reason where a GPU is missing, and a report that says
on which machine it was written.
"""

import gc
import os
from collections.abc import Generator
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests import machine
from tests.gpu import selection

# Read when huggingface_hub is imported: a trainer would report its use, which a test is not, and wait for answers.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Nothing is timed, and nothing kept in the folder of whoever runs the tests, unless a test says so.
os.environ.setdefault("DPO_KERNELS_AUTOTUNE", "0")
os.environ.setdefault("DPO_KERNELS_SELF_CHECK", "0")

# Compilers of graphs compile in the process that asks; their worker processes would each import torch first.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# Tests run side by side, and several threads each would only wait for one another.
torch.set_num_threads(1)

# The same examples every time; no deadline, because how long one takes says more about the machine.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(machine.SEED)


def pytest_report_header() -> list[str]:
    """Which CPU features are there, and which of the paths that depend on them run for real."""
    return machine.description()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
    """A failure that is read on another machine says where it happened."""
    report = yield
    if report.failed:
        report.sections.append(("machine", "\n".join(machine.description())))
    return report


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--part 2/3`` runs every third test, from the second on."""
    parser.addoption("--part", default="1/1", metavar="K/N", help="run the K-th of N parts of what is collected")


@pytest.hookimpl(trylast=True)  # after the marks have taken their choice
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """One part of the tests; of these the slow ones first, so that no worker is left with one at the end."""
    try:
        mine = selection.part_of(items, config.getoption("part"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    if len(mine) < len(items):
        chosen = set(map(id, mine))
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
        items[:] = mine
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """What is imported by now stays to the end: trainers collect garbage at every turn and need not look at it."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not item.get_closest_marker("gpu"):
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none")
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    reason = selection.lacking(parameters, getattr(item, "fixturenames", ()))
    if reason is not None:
        pytest.skip(reason)
