"""These tests run in a process of their own, which ../test_interpreted.py starts; elsewhere they are not collected."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.triton_tools.interpreter import install

    install()
else:
    collect_ignore_glob = ["*"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--arithmetic",
        default="exact",
        help='what kernels compute with: "approximate", "worst+", "worst-" or "truncating" are a GPU\'s errors',
    )


@pytest.fixture(autouse=True)
def _arithmetic(request):
    """The whole directory with the errors of a GPU, if asked for; test_gpu_arithmetic.py has a few cases of each."""
    from tests.interpreted.arithmetic import computing

    with computing(request.config.getoption("--arithmetic", "exact")):
        yield
