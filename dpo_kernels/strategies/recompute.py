"""One tile at a time, the log-sum-exp kept: for upstreams that are known only in the backward pass.

Per-row log-probs in the forward pass (one unit). With a trainable head the backward pass recomputes each tile: four
units in all. With a frozen head the forward pass also forms the derivative of each row's log-prob by its hidden
state, whose direction no upstream can change (``docs/design.md``): two units in all, the backward pass scales rows.
"""

from collections.abc import Sequence

from torch import Tensor

from dpo_kernels.kernel_interface import RowKernels, RowResult
from dpo_kernels.shapes import Head, PackedTokens, Tile


def forward(
    kernels: RowKernels,
    hidden_RH: Tensor,
    head: Head,
    rows: PackedTokens,
    tile: Tile,
    save_dlogp_dhidden: bool,
    stats: Sequence[str],
) -> tuple[RowResult, Tensor | None]:
    """Log-probs of the rows; with ``save_dlogp_dhidden`` also ``(N + 1, H)`` derivatives of ``-logp``, last row 0."""
    if save_dlogp_dhidden:
        return kernels.linear_direction(hidden_RH, head, rows, tile, stats)
    return kernels.linear_logprob(hidden_RH, head, rows, tile, stats), None


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
    """Gradients from the upstream ``grad_N`` of each row's log-prob; hidden rows are ``(N + 1, H)``, last row 0.

    Not called where the direction was kept: there the gradient is the direction times ``-grad_N``.
    """
    return kernels.linear_logprob_backward(hidden_RH, head, rows, saved, grad_N, tile, need)
