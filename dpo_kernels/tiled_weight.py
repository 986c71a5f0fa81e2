"""A frozen head whose weight is not in memory as a matrix, such as a quantised one: a callable returns tiles of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Rows that are picked by their index are looked for in tiles of at most so many bytes. The number is a choice: half of
# a CPU's workspace.
PICKED_BYTES = 4 * 2**20

WeightTile = Callable[[int, int], Tensor]


class TiledWeight(Tensor):
    """Weight of a frozen LM head, of which only tiles are ever in memory.

    It stands in the place of ``weight`` or ``ref_weight``. The functions multiply by one tile at a time, and the hidden
    states get their gradient. No tile is kept. A chunk asks for each tile once for the logits and once for the
    gradient. Where whole rows of logits do not fit the scratch, it asks once more.

    Args:
        weight_tile: Callable that maps ``(start, stop)`` to rows ``start..stop-1`` of the head, a tensor
            ``(stop - start, H)`` of ``dtype`` on ``device``. It must return the same numbers in every call, until the
            backward pass is over.
        shape: ``(V, H)``.
        dtype: dtype of the tiles, a floating-point dtype, which is that of the hidden states but for autocast.
        device: Device of the tiles, which the weight never leaves. None means the CPU. A GPU without an index is the
            current one.

    Raises:
        TypeError: ``weight_tile`` is not callable, or it does not return a tensor. Or an operation asks for the whole
            matrix, as arithmetic does.
        ValueError: A tile has another shape, dtype or device than was said, which the functions raise. Or the weight is
            copied to another device. Or the backend "triton" or "cuda" was asked for, which read a matrix.

    Example:
        >>> import torch
        >>> from dpo_kernels import TiledWeight, fused_dpo_loss
        >>> int8, scale = torch.randint(-127, 128, (50, 8)).to(torch.int8), torch.full((50, 1), 0.01)
        >>> head = TiledWeight(lambda start, stop: int8[start:stop] * scale[start:stop], (50, 8), torch.float32)
        >>> hidden, labels = torch.randn(4, 3, 8, requires_grad=True), torch.randint(50, (4, 3))
        >>> fused_dpo_loss(hidden, head, labels, reference_free=True).loss.backward()
        >>> hidden.grad.shape
        torch.Size([4, 3, 8])
    """

    # Without it torch would wrap what these operations return in this class.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    weight_tile: WeightTile

    @staticmethod
    def __new__(
        cls,
        weight_tile: WeightTile,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> "TiledWeight":
        """Return the weight. The class describes the arguments."""
        if not callable(weight_tile):
            raise TypeError(f"weight_tile must be callable, got {type(weight_tile).__name__}")
        made = Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=_indexed(torch.device("cpu" if device is None else device))
        )
        made.weight_tile = weight_tile
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"TiledWeight({tuple(self.shape)}, {self.dtype}, {self.device})"

    def rows_between(self, start: int, stop: int) -> Tensor:
        """Return rows ``start..stop-1``, a plain tensor ``(stop - start, H)``. Raise unless it is what was promised."""
        rows = self.weight_tile(start, stop)
        expected = (stop - start, self.shape[1])
        if not isinstance(rows, Tensor):
            raise TypeError(f"weight_tile({start}, {stop}) must return a tensor, got {type(rows).__name__}")
        if rows.shape != expected or rows.dtype != self.dtype or rows.device != self.device:
            raise ValueError(
                f"weight_tile({start}, {stop}) must return {expected} of {self.dtype} on {self.device}, got "
                f"{tuple(rows.shape)} of {rows.dtype} on {rows.device}"
            )
        return rows.detach()

    def rows_at(self, index: Tensor) -> Tensor:
        """Return the rows ``(C, H)`` that an index ``(C,)`` names, without a look at its values.

        Every tile is read once, because on a GPU nobody knows in which of them the rows lie without a sync.
        """
        found = torch.zeros(index.shape[0], self.shape[1], dtype=self.dtype, device=self.device)
        step = max(1, PICKED_BYTES // (self.shape[1] * self.dtype.itemsize))
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            here = (index >= start) & (index < stop)
            part = self.rows_between(start, stop).index_select(0, (index - start).clamp(0, stop - start - 1))
            found = torch.where(here[:, None], part, found)
        return found

    def converted(self, dtype: torch.dtype) -> "TiledWeight":
        """Return the weight whose tiles are in ``dtype``, which autocast may have chosen."""
        if dtype == self.dtype:
            return self
        return TiledWeight(
            lambda start, stop: self.rows_between(start, stop).to(dtype), _shape(self), dtype, self.device
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        run = _OPERATIONS.get(func)
        if run is None:
            raise TypeError(f"{func} needs the whole weight, of which a TiledWeight has tiles only")
        return run(*args, **(kwargs or {}))


def frozen(weight: Tensor) -> Tensor:
    """Return a weight without its gradient. A ``TiledWeight`` has none, and ``torch.func`` may have wrapped it."""
    if torch.compiler.is_compiling():  # which takes no tiles, and cannot trace what follows
        return weight.detach()
    inner = weight
    while torch._C._functorch.is_functorch_wrapped_tensor(inner):
        inner = torch._C._functorch.get_unwrapped(inner)
    return inner if isinstance(inner, TiledWeight) else weight.detach()


def _indexed(device: torch.device) -> torch.device:
    """Return a device as tensors on it name it: that of a GPU has an index."""
    return device if device.type == "cpu" else torch.empty(0, device=device).device


def _shape(weight: TiledWeight) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


def _same(weight: TiledWeight, **_: Any) -> TiledWeight:
    return TiledWeight(weight.weight_tile, _shape(weight), weight.dtype, weight.device)


def _copy(
    weight: TiledWeight,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    **_: Any,
) -> TiledWeight:
    if device is not None and _indexed(torch.device(device)) != weight.device:
        raise ValueError(
            f"a TiledWeight on {weight.device} cannot be copied to {device}, as its tiles are made by a callable: make "
            "one whose callable returns tiles there"
        )
    return _same(weight) if dtype is None else _to_dtype(weight, dtype)


def _to_dtype(weight: TiledWeight, dtype: torch.dtype, *_: Any, **__: Any) -> TiledWeight:
    return _same(weight.converted(dtype))


def _to_device(weight: TiledWeight, device: torch.device, dtype: torch.dtype, *_: Any, **__: Any) -> TiledWeight:
    return _copy(weight, device=device, dtype=dtype)


def _new_zeros(weight: TiledWeight, size: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return torch.zeros(size, dtype=dtype or weight.dtype, device=weight.device)


def _index_select(weight: TiledWeight, dim: int, index: Tensor) -> Tensor:
    assert dim == 0, "rows are picked"
    return weight.rows_at(index)


# What torch does with a tensor, by the few operations that the functions use on a head as a whole.
_OPERATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.detach.default: _same,
    torch.ops.aten.alias.default: _same,
    torch.ops.aten.clone.default: _same,
    torch.ops.aten._to_copy.default: _copy,
    # Inference mode does not break these up.
    torch.ops.aten.to.dtype: _to_dtype,
    torch.ops.aten.to.device: _to_device,
    torch.ops.aten.to.dtype_layout: _copy,
    torch.ops.aten.new_zeros.default: _new_zeros,
    torch.ops.aten.index_select.default: _index_select,
}
