"""The results of all tokens. Only here does the state of a row become its log-prob."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpo_kernels.kernel_interface import RowKernels, RowResult, RowState
from dpo_kernels.shapes import PackedTokens


class RowResults:
    """Log-probs and statistics of packed tokens, and with ``sums`` the sums that a backward pass needs.

    Unused capacity keeps the log-prob 0. The tensors have the dtype and the device of ``like``.
    """

    def __init__(
        self,
        kernels: RowKernels,
        packed: PackedTokens,
        vocab: int,
        stats: Sequence[str],
        like: Tensor,
        *,
        sums: bool = True,
    ) -> None:
        zeros = like.new_zeros(packed.capacity)
        self.kernels, self.packed, self.vocab, self.sums = kernels, packed, vocab, sums
        self.result = RowResult(
            logp=zeros,
            max=torch.zeros_like(zeros) if sums else zeros[:0],
            sumexp=torch.ones_like(zeros) if sums else zeros[:0],
            others=torch.zeros_like(zeros) if sums else zeros[:0],
            stats={name: torch.zeros_like(zeros) for name in stats},
        )

    def put(self, start: int, stop: int, state: RowState) -> None:
        """Record the results of rows ``start..stop-1``. Every column has been folded into their state."""
        part = self.kernels.row_logps(state, self.packed.labels[start:stop], self.vocab)
        self.result.logp[start:stop] = part.logp
        if self.sums:
            self.result.max[start:stop] = part.max
            self.result.sumexp[start:stop] = part.sumexp
            self.result.others[start:stop] = part.others
        for name, value in part.stats.items():
            self.result.stats[name][start:stop] = value
