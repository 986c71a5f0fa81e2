"""A tile of fixed size, whatever the batch: 1 MiB of logits on a CPU, 256 MiB on a GPU (``tiles.py``), and no scratch.

A native forward pass keeps logits in registers. The backward pass recomputes the tiles from the kept log-sum-exp,
whatever the head; one recomputed tile serves both gradients: four units with a trainable head, three with a frozen one.
"""

from collections.abc import Sequence

from torch import Tensor

from dpo_kernels.kernel_interface import RowKernels, RowResult
from dpo_kernels.shapes import Head, PackedTokens, Tile


def forward(
    kernels: RowKernels, hidden_RH: Tensor, head: Head, rows: PackedTokens, tile: Tile, stats: Sequence[str]
) -> RowResult:
    """Log-probs of the rows, one unit."""
    return kernels.stream_logprob(hidden_RH, head, rows, tile, stats)


def backward(
    kernels: RowKernels,
    hidden_RH: Tensor,
    head: Head,
    rows: PackedTokens,
    saved: tuple[Tensor, Tensor, Tensor],
    grad_N: Tensor,
    tile: Tile,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients from the upstream ``grad_N`` of each row's log-prob; hidden rows are ``(N + 1, H)``, last row 0."""
    return kernels.linear_logprob_backward(hidden_RH, head, rows, saved, grad_N, tile, need)
