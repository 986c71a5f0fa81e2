"""Row operations on the logits of two heads, the policy's and a reference's, in plain torch.

They are elementwise on blocks of two tiles of whole rows, and every backend takes them from here. Tiles, maxima and
sums are those of ``kernel_interface``. ``p`` is the policy's probability of a token and ``q`` the reference's.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from dpo_kernels.kernel_interface import Coefficients, RowsOfBoth, RowState
from dpo_kernels.shapes import Head

# Both operations hold at most so many temporaries of a block at once.
BLOCK_TEMPORARIES = 9


def log_sumexp(state: RowState, shifted_target_C: Tensor) -> Tensor:
    """Return ``log sum exp(z - max)`` of each row, ``(C,)``, with the digits of a sum that is nearly 1.

    ``shifted_target_C`` is the label's logit minus the maximum.
    """
    return (state.others + shifted_target_C.expm1()).log1p()


def kl_of_rows(rows: RowsOfBoth, blocks: Iterable[tuple[slice, slice]]) -> Tensor:
    """Return ``KL(reference || policy)`` of each row, ``(C,)``.

    ``blocks`` are slices of rows and columns that make up the tile. Their temporaries fit the workspace.
    """
    shift_C, ref_shift_C = (
        state.max + log_sumexp(state, state.target - state.max) for state in (rows.state, rows.ref_state)
    )
    total_C = torch.zeros_like(shift_C)
    for top, cols in blocks:
        block = (rows.tile[top, cols], shift_C[top], rows.ref_tile[top, cols], ref_shift_C[top])
        total_C[top] += _kl_of_block(*block)
    return total_C


def _kl_of_block(z: Tensor, shift_C: Tensor, ref_z: Tensor, ref_shift_C: Tensor) -> Tensor:
    """Return the block's part of ``KL(reference || policy)`` of each row, ``(C,)``.

    With ``r = log p - log q`` a token adds ``q (exp(r) - 1 - r)``, which is ``q log(q / p) + p - q``. The last two
    terms add up to 0 over the vocabulary. With them no term is negative, and an error of a log-sum-exp moves the sum
    only in second order. A token that the reference excludes adds ``p``. One that only the policy excludes adds
    infinity.

    Args:
        z: ``(C, Vt)`` logits of the policy.
        shift_C: ``(C,)`` log-sum-exp of the policy's whole rows, so that ``z - shift`` are log-probs.
        ref_z: ``(C, Vt)`` logits of the reference.
        ref_shift_C: ``(C,)`` log-sum-exp of the reference's whole rows.

    """
    log_q = ref_z - ref_shift_C[:, None]
    r = (z - shift_C[:, None]).sub_(log_q)
    q = log_q.exp_()
    grown = r.expm1()
    # Far from 0, exp(r) may be infinite where q is 0. There p itself is computed.
    p = (z - shift_C[:, None]).exp_()
    terms = torch.where(r.abs() < 1, q * (grown - r), p - q - q * r)
    return torch.where(q == 0, p, terms).sum(dim=1)


def mix_(
    rows: RowsOfBoth,
    labels_C: Tensor,
    head: Head,
    coefficients: Coefficients,
    blocks: Iterable[tuple[slice, slice]],
) -> tuple[Tensor, Tensor]:
    """Overwrite the policy's tile with the gradient of its logits but for a factor of each row.

    See ``RowKernels.dlogits_of_both_``. The tile is left holding ``p`` and ``q`` added up with their weights. At the
    label it holds minus what the others add up to.

    Returns:
        The factors of the rows, and a bound of each row's values, ``(C,)`` each.

    """
    tile, state, ref_state = rows.tile, rows.state, rows.ref_state
    of_p, of_q = coefficients.of_logp - coefficients.of_kl, coefficients.of_kl
    size = of_p.abs() + of_q.abs()  # the rows' factors carry it, so that the tile holds numbers up to 1
    size = torch.where(size == 0, torch.ones_like(size), size)
    factor_C, ref_factor_C = (
        (of_p / size / state.sumexp).to(tile.dtype),
        (of_q / size / ref_state.sumexp).to(tile.dtype),
    )
    for top, cols in blocks:
        policy, reference = (tile[top, cols], state.max[top]), (rows.ref_tile[top, cols], ref_state.max[top])
        _mix_block_(*policy, factor_C[top], *reference, ref_factor_C[top], head.softcap)
    others, ref_others = factor_C * state.others, ref_factor_C * ref_state.others
    slope = 1.0 if head.softcap is None else 1.0 - (state.target / head.softcap).square()
    tile.scatter_(1, labels_C[:, None], (-slope * (others + ref_others))[:, None])
    return (-size * head.logit_scale).to(tile.dtype), others.abs() + ref_others.abs()


def _mix_block_(
    z: Tensor,
    max_C: Tensor,
    factor_C: Tensor,
    ref_z: Tensor,
    ref_max_C: Tensor,
    ref_factor_C: Tensor,
    softcap: float | None,
) -> None:
    """Overwrite logits ``z`` with ``factor exp(z - max) + ref_factor exp(ref_z - ref_max)``.

    With a softcap the sum is multiplied by the cap's derivative at ``z``. Factors and maxima are ``(C,)``.
    """
    slope = None if softcap is None else (z / softcap).square_().neg_().add_(1.0)
    z.sub_(max_C[:, None]).exp_().mul_(factor_C[:, None])
    z.addcmul_((ref_z - ref_max_C[:, None]).exp_(), ref_factor_C[:, None])
    if slope is not None:
        z.mul_(slope)
