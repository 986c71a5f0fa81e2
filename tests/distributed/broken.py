"""Ranks of which one fails, in processes of their own: ``python -m tests.distributed.broken FOLDER CASE...``.

This process imports everything once and forks the ranks of all cases, which run side by side. Each rank leaves in the
folder what ended it and when. Nothing waits longer than ``HANGS_S``: what is left then is killed, and counts as hung.
"""

import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

import dpo_kernels as dk
from dpo_kernels.distributed import VocabParallel
from dpo_kernels.kernels.torch_kernels import TorchKernels
from tests.distributed import ranks

RANKS = 2  # rank 1 is the one that fails
SIZES = (20, 17)
LONG_S = 60  # a group's timeout that must not be what ends a rank
SHORT_S = 4  # one that is
HANGS_S = 150  # 12 s is usual


def step(rank: int, group: dist.ProcessGroup, **changes: Any) -> None:
    """One step with a split head."""
    made = ranks.problem({}, sum(SIZES), torch.float64)
    start = sum(SIZES[:rank])
    leaves = {"hidden": made["hidden"], "weight": made["weight"][start : start + SIZES[rank]]}
    given = leaves | {"labels": made["labels"], "backend": "torch"} | changes
    for name in leaves:
        given[name] = given[name].clone().requires_grad_()
    out = dk.fused_dpo_loss(**given, reference_free=True, vocab_parallel=VocabParallel(group))
    out.loss.backward()


def failing(
    rank: int, group: dist.ProcessGroup, how: Callable[..., Any], method: str = "project", **changes: Any
) -> None:
    """A step in which rank 1 fails when its kernels come to ``method``."""
    with patch.object(TorchKernels, method, how if rank else getattr(TorchKernels, method)):
        step(rank, group, **changes)


def raises(*_: Any, **__: Any) -> None:
    fails()
    raise RuntimeError("of this rank alone")


def is_killed(*_: Any, **__: Any) -> None:
    fails()
    os.kill(os.getpid(), signal.SIGKILL)


def leaves(*_: Any, **__: Any) -> None:
    fails()
    os._exit(0)


def fails() -> None:
    """Write down when this rank fails."""
    Path("failed").write_text(str(time.time()))


def goes_on(rank: int, group: dist.ProcessGroup) -> None:
    """Rank 1 raises, takes the error for harmless, and does something else."""
    try:
        failing(rank, group, raises)
    except RuntimeError:
        if not rank:
            raise
        time.sleep(2 * SHORT_S)


def before_the_call(rank: int, group: dist.ProcessGroup) -> None:
    if rank:
        raises()
    step(rank, group)


def other_shapes(rank: int, group: dist.ProcessGroup, checked: bool) -> None:
    """Rank 1 has fewer tokens; with a static capacity nothing is compared unless that is asked for."""
    made = ranks.problem({}, sum(SIZES), torch.float64)
    part = slice(None, 3 if rank else None)
    if rank:
        fails()
    with patch.dict(os.environ, {"DPO_KERNELS_CHECK": str(int(checked))}):
        hidden, labels = made["hidden"][:, part], made["labels"][:, part]
        step(rank, group, hidden=hidden, labels=labels, max_scored_tokens=labels.numel())


CASES: dict[str, tuple[Callable[[int, dist.ProcessGroup], None], int]] = {
    "raises before the call": (before_the_call, LONG_S),
    "raises in the call": (partial(failing, how=raises), LONG_S),
    "is killed in the call": (partial(failing, how=is_killed), LONG_S),
    "leaves in the call": (partial(failing, how=leaves), LONG_S),
    "is killed in the backward": (
        partial(failing, how=is_killed, method="grad_weight", strategy="recompute"),
        LONG_S,
    ),
    "raises and goes on": (goes_on, SHORT_S),
    "other shapes": (partial(other_shapes, checked=False), SHORT_S),
    "other shapes, compared": (partial(other_shapes, checked=True), LONG_S),
}


def run_rank(case: str, rank: int, folder: Path) -> None:
    """Join the others of the case, run it, and write down what ended it."""
    os.chdir(folder)
    torch.set_num_threads(1)
    work, seconds = CASES[case]
    long, short = (datetime.timedelta(seconds=each) for each in (LONG_S, seconds))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS, timeout=long)
    group = dist.new_group(timeout=short)
    said = "no error"
    try:
        dist.barrier()
        work(rank, group)
    except Exception as error:  # noqa: BLE001
        said = f"{type(error).__name__}: {error}"
    Path(f"ended-{rank}").write_text(json.dumps({"said": said, "at": time.time()}))
    # As after an uncaught error: the process ends, and nobody destroys the group.
    os._exit(0 if said == "no error" else 1)


def main(folder: Path, cases: list[str]) -> None:
    """Fork the ranks of every case, wait for them, and kill those that hang."""
    children = {}
    for case in cases:
        own = folder / case.replace(" ", "_")
        own.mkdir()
        for rank in range(RANKS):
            child = os.fork()
            if not child:
                run_rank(case, rank, own)
            children[child] = f"{case}, rank {rank}"
    ends, until = {}, time.monotonic() + HANGS_S
    while children and time.monotonic() < until:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            ends[children.pop(child)] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for child, name in children.items():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        ends[name] = "hung"
    (folder / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), sys.argv[2:] or list(CASES))
