"""Which gpu-marked tests run in one go: a part of them, by how many workers, and what is missing for which."""

import os
import re
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from dpo_kernels.kernels import extension, installed

Item = TypeVar("Item")
LARGE = "large"  # the xdist group of the tests that take LARGE_BYTES; one worker runs them, one after another
LARGE_BYTES = 44 * 2**30
WORKER_BYTES = 6 * 2**30  # of any other test: a head of 128256 x 128 in three dtypes, its gradients, 2 GiB of scratch
MOST_WORKERS = 8  # more processes would compile the same kernels at the same time


def part_of(items: Sequence[Item], part: str) -> list[Item]:
    """The items of a part such as ``"2/3"``: every third, from the second on. Raises ``ValueError`` for no part."""
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part)
    if match is None or int(match[1]) > int(match[2]):
        raise ValueError(f"--part={part!r}, expected K/N with 1 <= K <= N")
    return list(items[int(match[1]) - 1 :: int(match[2])])


def workers(free_bytes: int, cores: int) -> int:
    """How many processes the free memory of a GPU has room for, beside one test of LARGE_BYTES where that fits."""
    rest = free_bytes - LARGE_BYTES if free_bytes > LARGE_BYTES else free_bytes
    return max(1, min(MOST_WORKERS, cores, rest // WORKER_BYTES))


def lacking(parameters: dict[str, Any], fixtures: Sequence[str]) -> str | None:
    """Why a gpu-marked test cannot run for what is not installed, or None. One test of its own fails for that."""
    backend = parameters.get("backend")
    if backend == "cuda" or "operators" in fixtures:
        return extension.why_not("cuda")
    if backend == "triton":
        return installed.why_no_triton()
    return None


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device; test-gpu proves nothing here")
    print(workers(torch.cuda.mem_get_info()[0], os.cpu_count() or 1))
