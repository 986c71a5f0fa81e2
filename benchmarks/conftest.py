"""Options of the regression benchmarks; see test_regressions.py."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--write-baseline`` keeps this machine's ratios instead of judging by them."""
    parser.addoption("--write-baseline", action="store_true", help="store this machine's ratios as the baseline")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A reason where a GPU is missing."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none")
