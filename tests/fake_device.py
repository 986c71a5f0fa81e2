"""A device that is none: tensors that say they are on it, and a count of the times that the host would wait for it.

Its tensors hold CPU tensors inside, and every operation runs on those. torch's own name ``lazy`` stands for the device:
nothing must be registered for it, and the library treats it as a device that is not the CPU. Where a CUDA device makes
the host wait, the name of the operation is counted: values that are read, shapes that depend on values, and copies from
one device to the other.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy")
# Operations whose result the host reads, or whose shape it must know.
WAITS = (
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"),
    *("unique_consecutive", "repeat_interleave"),
)


class Syncs(TorchDispatchMode):
    """Counts the syncs of the operations in this context, in ``counts``, and lets them make tensors on the device.

    Raises:
        RuntimeError: An operation mixes tensors of the device with one of the CPU that is not 0-d, as on a GPU.

    """

    _open = 0  # contexts of all threads

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> "Syncs":
        Syncs._open += 1
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) is then a copy, which is seen here
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        Syncs._open -= 1
        torch._C._set_only_lift_cpu_tensors(Syncs._open > 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        there = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
        here = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, OnDevice)]
        target, name = kwargs.get("device"), func._schema.name.partition("::")[2]
        moves = name in ("_to_copy", "copy_")
        if there and not moves and any(tensor.dim() for tensor in here):
            raise RuntimeError(f"{func} mixes tensors of the fake device and of the CPU")
        to_host = bool(there) and target is not None and target.type == "cpu"
        if (name in WAITS and there) or (moves and (to_host or (here and (there or _is_fake(target))))):
            self.counts[name] += 1
        if name == "index" and any(leaf.dtype == torch.bool for leaf in there[1:]):
            self.counts[name] += 1
        known = {id(leaf.inner): leaf for leaf in there}
        args, kwargs = tree_map(_inner, (tuple(args), dict(kwargs)))
        out = func(*args, **kwargs)
        if to_host or not (there or _is_fake(target)):
            return out
        return tree_map(lambda value: _wrapped(value, known), out)


class OnDevice(Tensor):
    """A tensor on the fake device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner.detach()
        return made

    def __repr__(self) -> str:
        return f"OnDevice({self.inner})"

    def tolist(self) -> Any:
        """Read all values, which torch does without an operation."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on the fake device outside of Syncs")


def _inner(value: Any) -> Any:
    if isinstance(value, OnDevice):
        return value.inner
    return torch.device("cpu") if _is_fake(value) else value


def _is_fake(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == DEVICE.type


def _wrapped(value: Any, known: Mapping[int, OnDevice]) -> Any:
    """The device's tensor for what an operation gave; one that it wrote to is the one that it was given."""
    if not isinstance(value, Tensor):
        return value
    return known[id(value)] if id(value) in known else OnDevice(value)
