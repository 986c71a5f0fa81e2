"""The passes with plain tensors and numbers on both sides: the bodies of the autograd functions and operators.

Each runs a strategy with a backend's kernels. Gradients leave here in accumulation precision, or, in the backward
bodies, multiplied by their upstream and rounded once to the parameter's dtype. Empty tensors stand for what was not
asked for.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_kernels import dispatch, losses, packing, tiles
from dpo_kernels.kernel_interface import RowKernels
from dpo_kernels.loss_interface import SequenceLoss
from dpo_kernels.segments import sequence_to_token
from dpo_kernels.shapes import (
    STATS,
    TOKEN_LOGPS,
    WRAPPERS_THAT_UNWRAP,
    Accumulator,
    Head,
    PackedTokens,
    Tile,
    accumulation_dtype,
)
from dpo_kernels.strategies import chunked, recompute, streaming

CPU_COPY_BYTES = 16 * 2**20
GPU_COPY_BYTES = 256 * 2**20  # a few launches for any batch


class LossInto(NamedTuple):
    """A loss whose gradient by the head is added to a buffer, instead of being returned."""

    loss: SequenceLoss
    into: Accumulator


def pack(
    labels: Tensor,
    cu_seqlens: Tensor,
    token_weights: Tensor | None,
    vocab: int,
    ignore_index: int,
    shift: bool,
    stacked: bool,
    width: int,
    capacity: int,
    static: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``packing.pack`` with a tensor for everything; ``capacity`` -1 takes what is scored."""
    rows = packing.pack(
        labels,
        cu_seqlens,
        token_weights,
        vocab,
        ignore_index,
        shift,
        stacked,
        width,
        None if capacity < 0 else capacity,
        static,
    )
    weights = rows.nan_if_invalid.new_zeros(0) if rows.weights is None else rows.weights
    return (
        rows.index,
        rows.labels,
        weights,
        rows.segments,
        rows.slot,
        rows.counts,
        rows.counts_host,
        rows.nan_if_invalid,
    )


def pair_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    segments: Tensor,
    slot: Tensor,
    counts: Tensor,
    counts_host: Tensor,
    nan_if_invalid: Tensor,
    ref: Tensor,
    denominator: Tensor,
    pair_values: Tensor,
    loss: str,
    beta: float,
    loss_values: Sequence[float],
    logit_scale: float,
    softcap: float | None,
    dtype: torch.dtype,
    strategy: str,
    backend: str,
    scratch_bytes: int,
    stats: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fused pass: total (), losses (P,), log-probs (S,), statistics (k, S), gradients of the total, tokens.

    The last are token log-probs (N,), empty unless asked for. Not as an operator, ``loss`` is a ``SequenceLoss``
    or a ``LossInto``; in the latter's case the gradients are those of its upstream times the total.
    """
    rows = PackedTokens(index, labels, weights, segments, slot, counts, counts_host, nan_if_invalid)
    bound: Any = loss
    if isinstance(bound, str):
        bound = losses.decode(bound, beta, loss_values, pair_values)
    bound, into = bound if isinstance(bound, LossInto) else (bound, None)
    names = _names(stats)
    with _autocast_off(hidden), torch.no_grad():
        head = _operand_head(weight, bias, logit_scale, softcap, dtype)
        kernels, budget = _kernels_and_budget(dtype, backend, scratch_bytes, hidden.device)
        weight_grad_cols = hidden.shape[1] if need_weight and into is None else 0
        tile = tiles.tile_of_pairs(budget, rows.used, head.vocab, weight_grad_cols)
        need = (need_hidden, need_weight, need_bias)
        chunking = dispatch.chunking_of(hidden.device)
        done = chunked.pair_gradients(
            kernels, hidden, head, rows, ref, bound, denominator, tile, need, names, into, chunking
        )
        means = _sequence_means(kernels, done.stats, names, rows)
    nothing = torch.empty(0, dtype=accumulation_dtype(dtype), device=hidden.device)
    grads = [nothing.clone() if g is None else g for g in (done.hidden, done.weight, done.bias)]
    tokens = done.token_logps + nan_if_invalid.to(done.token_logps.dtype) if _wants_tokens(stats) else nothing.clone()
    return done.total, done.losses, done.logps, means, grads[0], grads[1], grads[2], tokens


def scale(
    grad_total: Tensor,
    dx: Tensor,
    dw: Tensor,
    db: Tensor,
    slot: Tensor,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kept gradients times the upstream, in the dtypes of the parameters; empty where not needed."""
    factor = grad_total.to(dx.dtype)
    return (
        _to_input_rows(dx, slot, factor, hidden_dtype) if need_hidden else dx.new_zeros(0),
        _scaled_copy(dw, factor, weight_dtype) if need_weight else dx.new_zeros(0),
        _scaled_copy(db, factor, bias_dtype) if need_bias else dx.new_zeros(0),
    )


def scale_last(
    grad_total: Tensor, dx: Tensor, dw: Tensor, db: Tensor, slot: Tensor, *options: Any, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``scale``, where nothing will read the kept gradients again: the head's is handed over if its memory serves.

    Writing a copy of a head's gradient costs as much as a good part of its GEMM, and its memory.
    """
    hidden_dtype, weight_dtype, bias_dtype, need_hidden, need_weight, need_bias = options
    given = None
    if need_weight:
        given = dispatch.BACKENDS[backend].load().finalize_weight_grad(dw, grad_total.to(dw.dtype), weight_dtype)
    dtypes = (hidden_dtype, weight_dtype, bias_dtype)
    copy_weight = need_weight and given is None
    grads = scale(grad_total, dx, dw, db, slot, *dtypes, need_hidden, copy_weight, need_bias)
    return grads if given is None else (grads[0], given, grads[2])


def logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    segments: Tensor,
    slot: Tensor,
    counts: Tensor,
    counts_host: Tensor,
    nan_if_invalid: Tensor,
    per_token: bool,
    shift: bool,
    logit_scale: float,
    softcap: float | None,
    dtype: torch.dtype,
    strategy: str,
    backend: str,
    scratch_bytes: int,
    stats: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs by sequence (S,) or label (R,), statistics (k, S), what the backward pass needs, token log-probs.

    The last (N,), empty unless asked for.
    """
    rows = PackedTokens(index, labels, weights, segments, slot, counts, counts_host, nan_if_invalid)
    names = _names(stats)
    dlogp_dhidden: Tensor | None = None
    with _autocast_off(hidden), torch.no_grad():
        head = _operand_head(weight, bias, logit_scale, softcap, dtype)
        kernels, tile = _kernels_and_tile(rows, head, dtype, strategy, backend, scratch_bytes, hidden.device)
        if strategy == "streaming":
            done = streaming.forward(kernels, hidden, head, rows, tile, names)
        else:
            keep = saves_dlogp_dhidden(strategy, (need_hidden, need_weight, need_bias))
            done, dlogp_dhidden = recompute.forward(kernels, hidden, head, rows, tile, keep, names)
        out = by_label(done.logp, rows.slot, shift) if per_token else kernels.segment_sum(done.logp, weights, counts)
        means = _sequence_means(kernels, done.stats, names, rows)
        out = out + nan_if_invalid.to(out.dtype)
    nothing = done.logp.new_zeros(0)
    tokens = done.logp + nan_if_invalid.to(done.logp.dtype) if _wants_tokens(stats) else nothing.clone()
    if dlogp_dhidden is not None:  # the direction is all that the backward pass needs
        return out, means, nothing, nothing.clone(), nothing.clone(), dlogp_dhidden, tokens
    return out, means, done.max, done.sumexp, done.others, nothing, tokens


def logps_grad(
    grad_out: Tensor,
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    index: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    segments: Tensor,
    slot: Tensor,
    counts: Tensor,
    counts_host: Tensor,
    nan_if_invalid: Tensor,
    row_max: Tensor,
    sumexp: Tensor,
    others: Tensor,
    dlogp_dhidden: Tensor,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    per_token: bool,
    shift: bool,
    logit_scale: float,
    softcap: float | None,
    dtype: torch.dtype,
    strategy: str,
    backend: str,
    scratch_bytes: int,
    stats: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (hidden, weight, bias) of ``logps`` from its upstream; empty where not needed."""
    rows = PackedTokens(index, labels, weights, segments, slot, counts, counts_host, nan_if_invalid)
    need = (need_hidden, need_weight, need_bias)
    nothing = dlogp_dhidden.new_zeros(0)
    with _autocast_off(grad_out), torch.no_grad():
        grad_N = _row_upstream(grad_out, rows, per_token, shift)
        if saves_dlogp_dhidden(strategy, need):
            scale = torch.cat([-grad_N, grad_N.new_zeros(1)]).to(dlogp_dhidden.dtype)
            return _to_input_rows(dlogp_dhidden, slot, scale, hidden_dtype), nothing, nothing.clone()
        assert hidden is not None, "kept unless the direction is"
        assert weight is not None, "kept with hidden"
        head = _operand_head(weight, bias, logit_scale, softcap, dtype)
        kernels, tile = _kernels_and_tile(rows, head, dtype, strategy, backend, scratch_bytes, hidden.device)
        run = streaming.backward if strategy == "streaming" else recompute.backward
        dx, dw, db = run(kernels, hidden, head, rows, (row_max, sumexp, others), grad_N, tile, need)
        one = row_max.new_ones(())
        return (
            nothing if dx is None else _to_input_rows(dx, slot, one, hidden_dtype),
            nothing.clone() if dw is None else dw.to(weight_dtype),
            nothing.clone() if db is None else db.to(bias_dtype),
        )


# --- what they share ------------------------------------------------------------------------------------------------


def _names(stats: str) -> tuple[str, ...]:
    """Those of the row kernels."""
    return tuple(name for name in stats.split(",") if name in STATS)


def _wants_tokens(stats: str) -> bool:
    return TOKEN_LOGPS in stats.split(",")


def _operand_head(
    weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None, dtype: torch.dtype
) -> Head:
    """The head as the GEMMs read it; under autocast a copy in its dtype."""
    bias = None if bias is None else _settled(bias.detach().to(dtype))
    return Head(_settled(weight.detach().to(dtype)), bias, logit_scale, softcap)


def _settled(tensor: Tensor) -> Tensor:
    """What a collective has filled: a launch of a kernel of ours is no operation of torch's and would not wait."""
    return tensor.wait() if type(tensor).__name__ in WRAPPERS_THAT_UNWRAP else tensor  # type: ignore[attr-defined]


def _kernels_and_tile(
    rows: PackedTokens,
    head: Head,
    dtype: torch.dtype,
    strategy: str,
    backend: str,
    scratch_bytes: int,
    device: torch.device,
) -> tuple[RowKernels, Tile]:
    kernels, budget = _kernels_and_budget(dtype, backend, scratch_bytes, device)
    return kernels, tiles.tile_of(strategy, budget, rows.used, head.vocab)


def _kernels_and_budget(
    dtype: torch.dtype, backend: str, scratch_bytes: int, device: torch.device
) -> tuple[RowKernels, tiles.Budget]:
    budget = dispatch.budget_of(scratch_bytes, backend, dtype, device)
    return dispatch.BACKENDS[backend].make(dtype, budget.workspace_bytes), budget


def saves_dlogp_dhidden(strategy: str, need: Sequence[bool]) -> bool:
    """Frozen head: the derivative of the log-probs by the hidden states is formed beside them."""
    return strategy != "streaming" and need[0] and not (need[1] or need[2])


def _autocast_off(tensor: Tensor) -> AbstractContextManager[object]:
    device_type = tensor.device.type
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _sequence_means(kernels: RowKernels, stats: dict[str, Tensor], names: Sequence[str], rows: PackedTokens) -> Tensor:
    """Means over scored tokens, ``(k, S)`` float32, 0 for a sequence without any."""
    tokens = rows.counts.clamp(min=1)
    means = [kernels.segment_sum(stats[name], None, rows.counts) / tokens for name in names]
    return torch.stack(means).float() if means else rows.nan_if_invalid.new_zeros(0, rows.counts.shape[0]).float()


def by_label(logp_N: Tensor, slot: Tensor, shift: bool) -> Tensor:
    """Log-probs at the places of their labels, 0 where none is scored."""
    out = torch.cat([logp_N, logp_N.new_zeros(1)]).index_select(0, slot)
    return _labels_to_rows(out, shift, forward=True)


def _labels_to_rows(values_R: Tensor, shift: bool, forward: bool) -> Tensor:
    """Move values between a hidden row and the label it predicts (``forward``: row to label)."""
    if not shift or values_R.shape[0] == 0:
        return values_R
    zero = values_R.new_zeros(1)
    return torch.cat([zero, values_R[:-1]]) if forward else torch.cat([values_R[1:], zero])


def _row_upstream(grad_out: Tensor, rows: PackedTokens, per_token: bool, shift: bool) -> Tensor:
    """Upstream of each packed row's log-prob, float64 by sequence; NaN where the input was poisoned."""
    if not per_token:
        return sequence_to_token(grad_out, rows.segments, rows.weights) + rows.nan_if_invalid
    grad_R = _labels_to_rows(grad_out, shift, forward=False)
    grad_N = grad_R.index_select(0, rows.index) if grad_R.shape[0] else grad_R.new_zeros(rows.capacity)
    if rows.weights is not None:
        grad_N = grad_N * rows.weights.to(grad_N.dtype)
    return grad_N + rows.nan_if_invalid.to(grad_N.dtype)


def _to_input_rows(dx: Tensor, slot: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Packed rows back to their places, times one factor or one for each row; rows not scored are exactly 0."""
    rows, width = slot.shape[0], dx.shape[1]
    out = torch.empty(rows, width, dtype=dtype, device=dx.device)
    step = max(1, (GPU_COPY_BYTES if dx.is_cuda else CPU_COPY_BYTES) // max(1, width * dx.dtype.itemsize))
    for start in range(0, rows, step):
        places = slot[start : start + step]
        part = dx.index_select(0, places)
        out[start : start + step] = part.mul_(scale if scale.dim() == 0 else scale.index_select(0, places)[:, None])
    return out


def _scaled_copy(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    if grad.dtype == dtype:
        return grad * factor
    out = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    if grad.is_cuda:
        return torch.mul(grad, factor, out=out)  # one kernel that rounds what it writes; on the CPU a copy between
    step = max(1, CPU_COPY_BYTES // max(1, grad[:1].numel() * grad.dtype.itemsize))
    for start in range(0, grad.shape[0], step):
        out[start : start + step] = grad[start : start + step] * factor
    return out
