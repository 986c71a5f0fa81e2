"""The CUDA operators as the checks of ``equivalence`` call them: what ``emulation.Emulated`` offers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.kernel_interface import RowState

Operator = Callable[..., Any]


def directly(operator: Operator, *arguments: Any) -> Any:
    """Call an operator with the tensors themselves."""
    return operator(*arguments)


def by_copies(device: str) -> Callable[..., Any]:
    """Call an operator with copies on a device that lie there as the originals do, guards and all.

    Whatever the operator wrote, also where it should not have, is in the originals' memory afterwards.
    """

    def call(operator: Operator, *arguments: Any) -> Any:
        copies: dict[int, tuple[Tensor, Tensor]] = {}

        def copied(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            memory = value.untyped_storage()
            if memory.data_ptr() not in copies:
                whole = torch.empty(0, dtype=torch.uint8).set_(memory)
                copies[memory.data_ptr()] = whole, whole.to(device, copy=True)
            there = copies[memory.data_ptr()][1].untyped_storage()
            start, shape, stride = value.storage_offset(), value.shape, value.stride()
            return torch.empty(0, dtype=value.dtype, device=device).set_(there, start, shape, stride)

        done = operator(*map(copied, arguments))
        for whole, copy in copies.values():
            whole.copy_(copy)
        if isinstance(done, tuple):
            return tuple(part.cpu() for part in done)
        return None if done is None else done.cpu()

    return call


class Operators:
    """Operators of one namespace, each called by way of ``call``."""

    def __init__(self, ops: Any, call: Callable[..., Any] = directly) -> None:
        self.ops, self._through = ops, call

    def apply_bias_scale_cap(self, tile: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> None:
        """As ``Emulated``."""
        self._through(self.ops.apply_bias_scale_cap_, tile, bias, scale, softcap)

    def reduce_rows(self, tile: Tensor, labels: Tensor, start: int, state: RowState) -> None:
        """As ``Emulated``."""
        parts = (state.max, state.others, state.target, state.entropy, state.logit_sum, state.argmax, state.square_sum)
        self._through(self.ops.reduce_rows_, tile, labels, start, True, *parts)

    def dlogits_rows(
        self, tile: Tensor, out: Tensor | None, labels: Tensor, start: int, *rest: Tensor | float | None
    ) -> None:
        """As ``Emulated``."""
        self._through(self.ops.dlogits_rows_, tile, out, labels, start, *rest, False)

    def segment_sum(self, values: Tensor, weights: Tensor | None, offsets: Tensor) -> Tensor:
        """As ``Emulated``."""
        return self._through(self.ops.segment_sum, values, weights, offsets)

    def sigmoid_sequence_loss(self, *arguments: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor]:
        """As ``Emulated``."""
        return self._through(self.ops.sigmoid_sequence_loss, *arguments)
