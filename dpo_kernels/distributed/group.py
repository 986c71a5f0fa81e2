"""A group of ranks: its collectives, and how its ranks find out that they are about to do different things."""

import hashlib
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHECK_VARIABLE = "DPO_KERNELS_CHECK"
# torch 2.13 has given this collective another name, and warns where the older one is called.
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


class Ranks:
    """The ranks of a process group.

    Args:
        group: A ``ProcessGroup``, a ``DeviceMesh`` of one dimension, or ``(mesh, "name")``.

    Raises:
        TypeError: ``group`` is of another kind.
        ValueError: a mesh of several dimensions without a name, or no process group.

    """

    argument = "group"  # the name of the argument of the public functions, in errors

    def __init__(self, group: Any) -> None:
        self.group = _process_group(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        """Share the group: a copy of a model belongs to the same ranks."""
        return self

    @property
    def ranks(self) -> int:
        """The number of ranks that hold a shard."""
        return dist.get_world_size(self.group)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, ``(ranks, ...)``, in the order of the ranks."""
        tensor = tensor.contiguous()
        out = tensor.new_empty(self.ranks * tensor.numel())
        getattr(dist, ALL_GATHER)(out, tensor.view(-1), group=self.group)
        return out.view(self.ranks, *tensor.shape)

    @property
    def first(self) -> bool:
        """Whether this process is the first rank of the group."""
        return dist.get_rank(self.group) == 0

    def from_first(self, value: Any, device: torch.device | None) -> Any:
        """Return the first rank's value, which can be pickled. The others' values are not looked at.

        It goes by way of ``device``. None stands for the one that the group's backend prefers.
        """
        values = [value]
        dist.broadcast_object_list(values, group=self.group, device=device, group_src=0)
        return values[0]

    def begin_all_reduce_(self, tensor: Tensor) -> Callable[[], object]:
        """Begin to add up a contiguous tensor over the ranks, in place; every rank gets the same bits.

        The result waits for the end. On a GPU the stream waits then, and the host does not.
        """
        waits: Callable[[], object] = dist.all_reduce(tensor, group=self.group, async_op=True).wait
        return waits

    def compares(self, static: bool) -> bool:
        """Whether a call compares the ranks' plans: always, but for static ones, whose host must not wait."""
        return not static or checks_always()

    def agree(self, facts: tuple[Any, ...] | None, device: torch.device) -> None:
        """Raise on every rank where the ranks are about to do different things, or where one of them has raised.

        ``facts`` is what this rank will do, None where it has raised and is about to say so.
        """
        digest = torch.tensor([0 if facts is None else _digest(repr(facts))], dtype=torch.int64, device=device)
        digests: list[int] = self.all_gather(digest)[:, 0].tolist()
        if facts is None:
            return
        if 0 in digests:
            failed = [rank for rank, each in enumerate(digests) if each == 0]
            raise RuntimeError(f"{self.argument}: ranks {failed} have raised an error before the first product")
        if len(set(digests)) > 1:
            others = [rank for rank, each in enumerate(digests) if each != int(digest)]
            raise ValueError(
                f"{self.argument}: ranks {others} were given another problem, or plan it otherwise, than this one: "
                f"{facts}"
            )


def all_ranks() -> Ranks | None:
    """Return the group of all ranks, or None where ``torch.distributed`` is not initialised."""
    return Ranks(dist.group.WORLD) if dist.is_available() and dist.is_initialized() else None


def checks_always() -> bool:
    """Whether ``DPO_KERNELS_CHECK=1`` asks for comparisons at every call."""
    return os.environ.get(CHECK_VARIABLE) == "1"


def _digest(text: str) -> int:
    return 1 + int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _process_group(group: Any) -> dist.ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        if isinstance(group, str):
            raise TypeError(f'group must be a ProcessGroup, a DeviceMesh or (mesh, "name"), got {type(group).__name__}')
        raise ValueError("there is no process group: call torch.distributed.init_process_group first")
    if isinstance(group, dist.ProcessGroup):
        return group
    mesh, name = group if isinstance(group, tuple) and len(group) == 2 else (group, None)
    if not hasattr(mesh, "get_group"):
        raise TypeError(f'group must be a ProcessGroup, a DeviceMesh or (mesh, "name"), got {type(group).__name__}')
    if name is None and mesh.ndim != 1:
        raise ValueError(f'the mesh has {mesh.ndim} dimensions: name the one to use, (mesh, "name")')
    if name is not None and name not in (mesh.mesh_dim_names or ()):
        raise ValueError(f"the mesh has no dimension {name!r}; it has {mesh.mesh_dim_names}")
    found: dist.ProcessGroup = mesh.get_group(name) if name is not None else mesh.get_group()
    return found
