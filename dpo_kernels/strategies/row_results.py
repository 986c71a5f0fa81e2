"""The results of all tokens. Only here does the state of a row become its log-prob."""

import torch
from torch import Tensor

from dpo_kernels.kernel_interface import RowKernels, RowResult, RowState
from dpo_kernels.problem import Problem
from dpo_kernels.strategies.vocab_shards import complete


class RowResults:
    """Log-probs and statistics of packed tokens, and with ``sums`` the sums that a backward pass needs.

    Unused capacity keeps the log-prob 0. The tensors have the dtype and the device of ``like``.
    """

    def __init__(self, kernels: RowKernels, problem: Problem, like: Tensor, *, sums: bool = True) -> None:
        packed = problem.packed
        full = not sums and packed.host_counts is not None and packed.used == packed.capacity
        zeros = like.new_empty(packed.capacity) if full else like.new_zeros(packed.capacity)
        none = zeros if sums else zeros[:0]
        self.kernels, self.problem, self.sums = kernels, problem, sums
        self.result = RowResult(
            logp=zeros,
            max=torch.zeros_like(zeros) if sums else none,
            sumexp=torch.ones_like(zeros) if sums else none,
            others=torch.zeros_like(zeros) if sums else none,
            stats={name: torch.zeros_like(zeros) for name in problem.stats},
        )

    def put(self, start: int, stop: int, state: RowState, *, completed: bool = False) -> None:
        """Record the results of rows ``start..stop-1``. Every column of this rank has been folded into their state.

        With a shard of the vocabulary the state becomes that of all ranks, unless it was ``completed`` before.
        """
        if not completed:
            complete(state, self.problem.shard)
        labels_C = self.problem.packed.labels[start:stop]
        part = self.kernels.row_logps(state, labels_C, self.problem.vocab_size)
        self.result.logp[start:stop] = part.logp
        if self.sums:
            self.result.max[start:stop] = part.max
            self.result.sumexp[start:stop] = part.sumexp
            self.result.others[start:stop] = part.others
        for name, value in part.stats.items():
            self.result.stats[name][start:stop] = value
