"""The gradient of the head's weight as the rows that a sample has reached, without memory for the others."""

from dataclasses import replace

import torch
from torch import Tensor

from dpo_kernels.kernel_interface import LogitsGradient, RowKernels, SparseGradient
from dpo_kernels.problem import Problem
from dpo_kernels.shapes import row_indexed, spans


class WeightRows:
    """Rows of a gradient ``(V, H)`` that something has been added to. The other rows are 0 and have no memory.

    A row gets a place when it is first reached. ``values[:count]`` is then an ordinary matrix, so that the kernels'
    products need not know that rows are missing. The memory doubles where it is too small.
    """

    def __init__(self, kernels: RowKernels, weight_VH: Tensor) -> None:
        self.kernels = kernels
        self.shape, self.device = weight_VH.shape, weight_VH.device
        self.place = torch.full((self.shape[0],), -1, dtype=torch.int64, device=self.device)  # (V,), -1: not reached
        self.rows = self.place[:0]  # (K,) int64, the row at each place
        self.memory = kernels.buffer(self.device, 0, self.shape[1])

    @property
    def values(self) -> Tensor:
        """The rows ``(K, H)`` in the order of their places, in the dtype of accumulation."""
        return self.memory[: self.rows.shape[0]]

    def add_sample(self, d: SparseGradient, start: int, x_CH: Tensor) -> None:
        """Add the product of a sample ``(C, Vt)``, whose first column is ``start``, with hidden states ``(C, H)``."""
        places = self._places(d.columns + start).to(d.columns.dtype)
        self.kernels.sparse_grad_weight(replace(d, columns=places), x_CH, self.values, accumulate=True)

    def add_exact(self, d: LogitsGradient, start: int, x_CH: Tensor) -> None:
        """Add the product of an exact gradient ``(C, Vt)``, which reaches every row of its columns."""
        row_bytes = max(1, self.shape[1]) * self.memory.dtype.itemsize
        for left, right in spans(d.values.shape[1], max(1, self.kernels.workspace_bytes // row_bytes)):
            part = self.kernels.buffer(self.device, right - left, self.shape[1])
            self.kernels.grad_weight(replace(d, values=d.values[:, left:right]), x_CH, part, accumulate=False)
            self._add(torch.arange(start + left, start + right, device=self.device), part)

    def add_scaled(self, other: "WeightRows", factor: Tensor) -> None:
        """Add the rows of another gradient times a 0-d factor. The other's memory is overwritten."""
        self._add(other.rows, other.values.mul_(factor))

    def gradient(self) -> Tensor:
        """Return the gradient as a coalesced sparse tensor ``(V, H)`` with ascending indices."""
        order = self.rows.argsort()
        return row_indexed(self.rows[order], self.values.index_select(0, order), self.shape)

    def _add(self, rows_K: Tensor, values_KH: Tensor) -> None:
        places = self._places(rows_K)
        self.values.index_add_(0, places, values_KH)  # no row occurs twice

    def _places(self, rows: Tensor) -> Tensor:
        """Return the places of rows. Those that are reached for the first time get one, and begin at 0."""
        reached = torch.zeros_like(self.place, dtype=torch.bool).index_fill_(0, rows.long(), True)
        new = (reached & (self.place < 0)).nonzero()[:, 0]
        before, count = self.rows.shape[0], self.rows.shape[0] + new.shape[0]
        self.place[new] = torch.arange(before, count, device=self.device)
        self.rows = torch.cat([self.rows, new])
        if count > self.memory.shape[0]:
            size = min(max(count, 2 * self.memory.shape[0]), self.shape[0])
            memory = self.kernels.buffer(self.device, size, self.shape[1])
            memory[:before] = self.memory[:before]
            self.memory = memory
        self.memory[before:count].zero_()
        return self.place.index_select(0, rows.long())


def weight_grad(kernels: RowKernels, problem: Problem) -> Tensor | WeightRows | None:
    """Return where the gradient of the head's weight is added up: uninitialised memory, rows, or None if unwanted."""
    weight_VH, sampling = problem.head.weight, problem.sampling
    if not problem.needs_grad.weight:
        return None
    if sampling is not None and sampling.sparse_weight_grad:
        return WeightRows(kernels, weight_VH)
    return kernels.buffer(problem.hidden.device, *weight_VH.shape)
