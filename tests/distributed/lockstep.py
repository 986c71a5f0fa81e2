"""Ranks of one process: threads of which one runs at a time, and collectives that are plain operations of torch.

A rank runs until it meets a collective. There it leaves its tensor and wakes the next one. So what is not made for
threads, such as Triton's interpreter, never sees two. Tensors may be on any device, and nothing is read back from it.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_kernels.distributed.group import ALL_GATHER

HANGS_S = 120  # after which a rank is taken to wait for good


class Group(dist.ProcessGroup):
    """A group of the ranks of ``run``. Each thread sees its own rank through ``torch.distributed``."""

    def __init__(self, ranks: int) -> None:
        super().__init__(0, ranks)
        self.ranks = ranks
        self.calls: Counter[str] = Counter()  # collectives of rank 0 by name
        self.given_bytes: Counter[str] = Counter()  # what it gave to them
        self._turn, self._wake = 0, threading.Condition()
        self._left: set[int] = set()  # ranks that have returned or raised
        self._given: dict[tuple[int, int], Tensor] = {}  # by round and rank
        self._me = threading.local()

    @property
    def mine(self) -> int:
        """The rank of this thread."""
        rank: int = self._me.rank
        return rank

    def exchange(self, name: str, tensor: Tensor) -> list[Tensor]:
        """Leave a tensor, let the others come as far, and return the tensors of all ranks."""
        me, number = self._me.rank, self._me.round
        self._me.round += 1
        self._given[number, me] = tensor.detach().clone()
        if me == 0:
            self.calls[name] += 1
            self.given_bytes[name] += tensor.nbytes
        self._pass_on(me)
        self._await(me)
        everyone = [self._given.get((number, rank)) for rank in range(self.ranks)]
        found = [each for each in everyone if each is not None]
        if len(found) < self.ranks:
            raise RuntimeError(f"rank {me} waits in {name} for ranks that have left")
        assert {(each.shape, each.dtype) for each in found} == {(tensor.shape, tensor.dtype)}, f"{name} of other shapes"
        return found

    def enter(self, rank: int) -> None:
        """Make this thread a rank, and wait for its turn."""
        self._me.rank, self._me.round = rank, 0
        self._await(rank)

    def leave(self, rank: int) -> None:
        """Let the others go on without this rank."""
        self._left.add(rank)
        self._pass_on(rank)

    def _pass_on(self, me: int) -> None:
        with self._wake:
            around = [(me + step) % self.ranks for step in range(1, self.ranks + 1)]
            self._turn = next((rank for rank in around if rank not in self._left), me)
            self._wake.notify_all()

    def _await(self, me: int) -> None:
        with self._wake:
            assert self._wake.wait_for(lambda: self._turn == me, timeout=HANGS_S), f"rank {me} waits for good"


def _all_gather(out: Tensor, tensor: Tensor, group: Group) -> None:
    out.copy_(torch.cat(group.exchange("all_gather", tensor.reshape(-1))).view_as(out))


def _all_reduce(tensor: Tensor, group: Group, async_op: bool = False) -> SimpleNamespace:
    tensor.copy_(torch.stack(group.exchange("all_reduce", tensor)).sum(dim=0))
    return SimpleNamespace(wait=lambda: None)


@contextmanager
def _as_torch_distributed() -> Iterator[None]:
    """Answer what the library asks of ``torch.distributed``."""
    answers: dict[str, Callable[..., Any]] = {
        "is_initialized": lambda: True,
        "get_world_size": lambda group: group.ranks,
        "get_rank": lambda group: group.mine,
        ALL_GATHER: _all_gather,
        "all_reduce": _all_reduce,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(dist, name, answer))
        yield


def run(ranks: int, function: Callable[[Group, int], Any]) -> list[Any]:
    """What ``function(group, rank)`` returns on each rank; the first error of a rank is raised here."""
    group, found, errors = Group(ranks), [None] * ranks, [None] * ranks

    def work(rank: int) -> None:
        try:
            group.enter(rank)
            found[rank] = function(group, rank)
        except BaseException as error:  # noqa: BLE001
            errors[rank] = error  # raised by the caller's thread
        finally:
            group.leave(rank)

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(ranks)]
    with _as_torch_distributed():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    raised = [error for error in errors if error is not None]
    if raised:  # one that says that others have left is not the first
        raise next((each for each in raised if "ranks that have left" not in str(each)), raised[0])
    return found
