"""User tensors to packed rows: check, shift, drop what is not scored.

The only place that raises about user tensors; behind it every layer may assume what the docstrings of ``types`` say.
Shapes and dtypes are checked on the way in (``check_batch``), values when the rows are packed (``pack``).
"""

import math
import warnings
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.types import STATS, Head, Rows

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
INDEX_DTYPES = (torch.int32, torch.int64)
NOWHERE = 2**62  # a slot past every capacity
_warned: set[str] = set()


@dataclass(frozen=True)
class Batch:
    """Checked tensors of one model, flattened; ``width`` is T, or 0 when packed by ``cu_seqlens``."""

    hidden: Tensor  # (R, H)
    head: Head
    labels: Tensor  # (R,)
    cu_seqlens: Tensor  # (S + 1,) int64
    token_weights: Tensor | None  # (R,)
    sequences: int
    width: int
    compute_dtype: torch.dtype
    result_dtype: torch.dtype


# --- the door ---------------------------------------------------------------------------------------------------------


def check_batch(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    token_weights: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    *,
    paired: bool,
) -> Batch:
    """Check the policy's tensors and flatten them. Raises as design §6 says."""
    _check_float_tensor("hidden", hidden)
    _check_layout(hidden, cu_seqlens)
    head = check_head(hidden, weight, bias, logit_scale, softcap, names=("hidden", "weight", "bias"))
    _check_labels(labels, hidden)
    if token_weights is not None:
        _check_tensor("token_weights", token_weights)
        if not token_weights.is_floating_point():
            raise TypeError(f"token_weights must be floating point, got {token_weights.dtype}")
        if token_weights.shape != labels.shape:
            raise ValueError(
                f"token_weights has shape {_shape(token_weights)}, expected the shape of labels {_shape(labels)}"
            )
    for name, tensor in (("labels", labels), ("token_weights", token_weights), ("cu_seqlens", cu_seqlens)):
        _check_device(name, tensor, hidden)
    if cu_seqlens is None:
        sequences, width = hidden.shape[0], hidden.shape[1]
        cu_seqlens = torch.arange(sequences + 1, device=hidden.device) * width
    else:
        sequences, width = cu_seqlens.shape[0] - 1, 0
        cu_seqlens = cu_seqlens.to(torch.int64)
    if paired and sequences % 2:
        raise ValueError(
            f"pairs need an even number of sequences, got {sequences} (hidden {_shape(hidden)}): chosen and rejected"
        )
    return Batch(
        hidden=hidden.reshape(-1, hidden.shape[-1]),
        head=head,
        labels=labels.reshape(-1),
        cu_seqlens=cu_seqlens,
        token_weights=None if token_weights is None else token_weights.detach().reshape(-1),
        sequences=sequences,
        width=width,
        compute_dtype=compute_dtype(hidden, weight, ("hidden", "weight")),
        result_dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32,
    )


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    names: tuple[str, str, str],
) -> Head:
    """Check an LM head against the hidden states it is applied to."""
    hidden_name, weight_name, bias_name = names
    _check_float_tensor(weight_name, weight)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"{weight_name} must have shape (V, H) with V >= 1, got {_shape(weight)}")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{weight_name} has H = {weight.shape[1]} (shape {_shape(weight)}) but {hidden_name} has "
            f"H = {hidden.shape[-1]} (shape {_shape(hidden)})"
        )
    _check_device(weight_name, weight, hidden)
    compute_dtype(hidden, weight, names[:2])
    if bias is not None:
        _check_float_tensor(bias_name, bias)
        if bias.shape != (weight.shape[0],):
            raise ValueError(
                f"{bias_name} has shape {_shape(bias)}, expected ({weight.shape[0]},) for {weight_name} {_shape(weight)}"
            )
        _check_device(bias_name, bias, hidden)
        compute_dtype(hidden, bias, (hidden_name, bias_name))
    scale = check_number("logit_scale", logit_scale)
    if softcap is not None and check_number("softcap", softcap) <= 0:
        raise ValueError(f"softcap must be > 0 or None, got {softcap}")
    return Head(weight, bias, scale, None if softcap is None else float(softcap))


def check_reference(
    batch: Batch,
    hidden: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    ref_logps: Tensor | None,
    reference_free: bool,
    *,
    needs_reference: bool,
    loss_name: str,
) -> Batch | None:
    """Decide the form of the reference: a ``Batch`` to score, or None when it is cached or there is none."""
    given = [n for n, t in (("ref_hidden", ref_hidden), ("ref_logps", ref_logps)) if t is not None]
    if len(given) == 2:
        raise ValueError("ref_hidden and ref_logps are both given; pass one of them")
    if reference_free and given:
        raise ValueError(f"reference_free=True and {given[0]} exclude each other")
    if given and not needs_reference:
        raise ValueError(f"{given[0]} is given, but the loss {loss_name!r} has no reference; leave it out")
    for name, tensor in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
        if tensor is not None and ref_hidden is None:
            raise ValueError(f"{name} is given without ref_hidden")
    if ref_logps is not None:
        _check_tensor("ref_logps", ref_logps)
        if not ref_logps.is_floating_point():
            raise TypeError(f"ref_logps must be floating point, got {ref_logps.dtype}")
        if ref_logps.shape != (batch.sequences,):
            raise ValueError(
                f"ref_logps has shape {_shape(ref_logps)}, expected ({batch.sequences},): one per sequence, "
                "in the order of the input"
            )
        _check_device("ref_logps", ref_logps, batch.hidden)
        return None
    if ref_hidden is None:
        if needs_reference and not reference_free:
            raise ValueError(
                f"the loss {loss_name!r} needs a reference and got none: give ref_hidden or ref_logps, "
                "or say reference_free=True"
            )
        return None
    _check_float_tensor("ref_hidden", ref_hidden)
    if ref_hidden.dim() != hidden.dim() or ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"ref_hidden has shape {_shape(ref_hidden)}, expected that of hidden {_shape(hidden)} but for H"
        )
    _check_device("ref_hidden", ref_hidden, batch.hidden)
    return _reference_batch(batch, ref_hidden, ref_weight, ref_bias)


def _reference_batch(
    batch: Batch, ref_hidden: Tensor, ref_weight: Tensor | None, ref_bias: Tensor | None
) -> Batch:
    weight, bias, weight_name = ref_weight, ref_bias, "ref_weight"
    if weight is None:
        weight, weight_name = batch.head.weight, "weight (ref_weight=None shares it)"
        bias = batch.head.bias if ref_bias is None else ref_bias
        if weight.requires_grad and torch.is_grad_enabled():
            _warn_once(
                "ref_weight=None scores the reference with `weight`, which requires a gradient: the reference will "
                "drift with the policy. Pass the reference model's own head as ref_weight, or cached ref_logps."
            )
    head = check_head(
        ref_hidden,
        weight,
        bias,
        batch.head.logit_scale,
        batch.head.softcap,
        names=("ref_hidden", weight_name, "ref_bias"),
    )
    detached = Head(
        head.weight.detach(), None if head.bias is None else head.bias.detach(), head.logit_scale, head.softcap
    )
    if head.vocab != batch.head.vocab:
        raise ValueError(
            f"ref_weight has V = {head.vocab}, but weight has V = {batch.head.vocab}: the labels are shared"
        )
    return Batch(
        hidden=ref_hidden.detach().reshape(-1, ref_hidden.shape[-1]),
        head=detached,
        labels=batch.labels,
        cu_seqlens=batch.cu_seqlens,
        token_weights=batch.token_weights,
        sequences=batch.sequences,
        width=batch.width,
        compute_dtype=compute_dtype(ref_hidden, head.weight, ("ref_hidden", weight_name)),
        result_dtype=batch.result_dtype,
    )


def check_reduction(reduction: str, denominator: Any, sequences: int) -> None:
    """Check ``reduction`` and ``denominator`` together."""
    check_choice("reduction", reduction, REDUCTIONS)
    if denominator is not None:
        if reduction != "mean":
            raise ValueError(f"denominator goes with reduction='mean' only, got reduction={reduction!r}")
        if isinstance(denominator, Tensor):
            if denominator.dim() != 0:
                raise ValueError(f"denominator must be a number or a 0-d tensor, got shape {_shape(denominator)}")
            if denominator.dtype == torch.bool or denominator.is_complex():
                raise TypeError(f"denominator must be a real number, got {denominator.dtype}")
        elif check_number("denominator", denominator) <= 0:
            raise ValueError(f"denominator must be > 0, got {denominator}")
    elif reduction == "mean" and sequences == 0:
        raise ValueError("empty batch: reduction='mean' of no pairs is undefined; use 'sum' or give a denominator")


def check_logps(
    policy: tuple[Tensor, Tensor],
    reference: tuple[Tensor | None, Tensor | None],
    tokens: tuple[Tensor | None, Tensor | None],
    reference_free: bool,
    needs_reference: bool,
    loss_name: str,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Check the (chosen, rejected) tensors of ``dpo_loss``; what is missing is filled in: reference 0, tokens 1."""
    chosen = policy[0]
    names = ("policy_{}_logps", "ref_{}_logps", "{}_tokens")
    for name, pair in zip(names, (policy, reference, tokens), strict=True):
        for side, tensor in zip(("chosen", "rejected"), pair, strict=True):
            if tensor is None and pair is not policy:
                continue
            argument = name.format(side)
            _check_tensor(argument, tensor)
            if pair is not tokens and not tensor.is_floating_point():
                raise TypeError(f"{argument} must be floating point, got {tensor.dtype}")
            if tensor.dim() != 1 or tensor.shape != chosen.shape:
                raise ValueError(
                    f"{argument} has shape {_shape(tensor)}, expected (P,) as policy_chosen_logps {_shape(chosen)}"
                )
            if tensor.device != chosen.device:
                raise ValueError(f"{argument} is on {tensor.device} but policy_chosen_logps is on {chosen.device}")
    given = any(tensor is not None for tensor in reference)
    if given and reference_free:
        raise ValueError("reference_free=True and ref_chosen_logps exclude each other")
    if given and not needs_reference:
        raise ValueError(f"ref_chosen_logps is given, but the loss {loss_name!r} has no reference; pass None")
    if needs_reference and not reference_free and any(tensor is None for tensor in reference):
        raise ValueError(
            f"the loss {loss_name!r} needs a reference: give ref_chosen_logps and ref_rejected_logps, "
            "or say reference_free=True"
        )
    zero, one = torch.zeros_like(chosen), torch.ones_like(chosen)
    reference = tuple(zero if t is None else t.detach() for t in reference)
    tokens = tuple(one if t is None else t.to(chosen.dtype) for t in tokens)
    return policy, reference, tokens


def check_stats(stats: Any) -> tuple[str, ...]:
    """Check the names of requested statistics."""
    if isinstance(stats, str) or not isinstance(stats, tuple | list | set | frozenset):
        raise TypeError(f"stats must be a tuple of names, got {type(stats).__name__}; known: {', '.join(STATS)}")
    for name in stats:
        check_choice("stats", name, STATS)
    return tuple(name for name in STATS if name in stats)


def check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of the ``known`` names."""
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")


def check_count(name: str, value: Any, least: int) -> None:
    """Raise unless ``value`` is None or an integer of at least ``least``."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an integer or None, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_flag(name: str, value: Any) -> None:
    """Raise unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def check_integer(name: str, value: Any) -> None:
    """Raise unless ``value`` is an integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")


def check_number(name: str, value: Any) -> float:
    """``value`` as a finite float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # math.isfinite cannot be traced with a symbolic float
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def compute_dtype(hidden: Tensor, weight: Tensor, names: tuple[str, str]) -> torch.dtype:
    """Dtype of the GEMM operands: the tensors' own, or autocast's."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device_type)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"{names[0]} is {hidden.dtype} but {names[1]} is {weight.dtype}: cast one of them, or use autocast"
        )
    return hidden.dtype


# --- packing ----------------------------------------------------------------------------------------------------------


def pack(
    labels_R: Tensor,
    cu_seqlens: Tensor,
    token_weights_R: Tensor | None,
    vocab: int,
    ignore_index: int,
    shift: bool,
    stacked: bool,
    width: int,
    capacity: int | None,
    static: bool,
) -> Rows:
    """Pack the scored rows, sequence by sequence: chosen and rejected of a pair side by side.

    ``capacity`` None allocates exactly what is scored, which needs the counts on the host: the one sync of a call.
    ``static`` avoids that sync too; more scored rows than ``capacity`` then poison the result. Values are checked
    here: on the CPU a bad label is a ``ValueError``; on other devices, where reading it would be a sync, NaN poison.
    """
    device, sequences = labels_R.device, cu_seqlens.shape[0] - 1
    rows = labels_R.shape[0]
    if device.type == "cpu" or not static:
        _check_cu_seqlens(cu_seqlens, rows)
    targets_R, position = labels_R, torch.arange(rows, device=device)
    sequence_R = torch.bucketize(position, cu_seqlens[1:], right=True)
    in_range = sequence_R < sequences
    sequence_R = sequence_R.clamp(max=max(sequences - 1, 0))
    if shift:
        # hidden[t] predicts labels[t + 1]; a sequence's last row predicts nothing.
        targets_R = torch.cat([labels_R[1:], labels_R.new_full((min(rows, 1),), ignore_index)])
        in_range &= position + 1 < cu_seqlens[1:].index_select(0, sequence_R) if sequences else in_range
    scored_R = (targets_R != ignore_index) & in_range
    bad_R = scored_R & ((targets_R < 0) | (targets_R >= vocab))
    if device.type == "cpu" and bool(bad_R.any()):
        _raise_bad_label(targets_R, bad_R, vocab, ignore_index, shift, width)
    order_S = _internal_order(sequences, stacked, device)
    slot_R, counts_S = _slots(scored_R, sequence_R, cu_seqlens, order_S)
    if static:
        counts_host = torch.full((sequences,), -1, dtype=torch.int64)
    else:
        counts_host = counts_S.to("cpu", copy=True)
        if capacity is None:
            capacity = int(counts_host.sum())
    assert capacity is not None, "a static packing has a capacity"
    overflow = counts_S.sum() > capacity
    slot_R = slot_R.clamp(max=capacity)
    # One slot more than the capacity takes everything that is not scored; it is cut off again.
    index = torch.zeros(capacity + 1, dtype=torch.int64, device=device).scatter_(0, slot_R, position)[:capacity]
    segments = _segments(counts_S, capacity)
    unused = torch.arange(capacity, device=device) >= counts_S.sum()
    labels_N = targets_R.index_select(0, index).to(torch.int64) if rows else index
    labels_N = labels_N.clamp(0, vocab - 1).masked_fill(unused, 0)
    weights = None
    if token_weights_R is not None:
        shifted = torch.cat([token_weights_R[1:], token_weights_R[:1]]) if shift else token_weights_R
        weights = shifted.index_select(0, index) if rows else shifted.new_zeros(capacity)
        weights = weights.to(torch.float64 if weights.dtype == torch.float64 else torch.float32)
        weights = weights.masked_fill(unused, 0.0)
    elif static:
        weights = (~unused).to(torch.float32)  # no coefficient may reach a row that stands for nothing
    poisoned = bad_R.any() | overflow | (cu_seqlens[0] != 0) | (cu_seqlens[-1] != rows) | (cu_seqlens.diff() < 0).any()
    zero = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    return Rows(
        index=index.clone(),
        labels=labels_N,
        weights=weights,
        segments=segments,
        slot=slot_R,
        counts=counts_S,
        counts_host=counts_host,
        poison=torch.where(poisoned, zero + math.nan, zero),
    )


def _internal_order(sequences: int, stacked: bool, device: torch.device) -> Tensor:
    """Input sequence at each internal place: chosen and rejected of a pair alternate inside."""
    order_S = torch.arange(sequences, device=device)
    return order_S.view(2, -1).t().reshape(-1) if stacked else order_S


def _slots(scored_R: Tensor, sequence_R: Tensor, cu_seqlens: Tensor, order_S: Tensor) -> tuple[Tensor, Tensor]:
    """Place of each row among the packed ones (a number past every place where not scored), and counts ``(S,)``."""
    rows, sequences = scored_R.shape[0], order_S.shape[0]
    before = torch.cat([scored_R.new_zeros(1, dtype=torch.int64), scored_R.cumsum(0)])  # scored rows before each row
    bounds = cu_seqlens.clamp(0, rows)
    before_S = before.index_select(0, bounds)
    by_input_S = before_S.diff()
    counts_S = by_input_S.index_select(0, order_S)
    starts_S = torch.zeros_like(counts_S).scatter_(0, order_S, counts_S.cumsum(0) - counts_S)
    if rows == 0 or sequences == 0:
        return torch.full((rows,), NOWHERE, dtype=torch.int64, device=scored_R.device), counts_S
    rank_R = before[:-1] - before_S.index_select(0, sequence_R)
    slot_R = starts_S.index_select(0, sequence_R) + rank_R
    return torch.where(scored_R, slot_R, torch.full_like(slot_R, NOWHERE)), counts_S


def _segments(counts_S: Tensor, capacity: int) -> Tensor:
    """Sequence of each packed row."""
    place = torch.arange(capacity, device=counts_S.device)
    segments = torch.bucketize(place, counts_S.cumsum(0), right=True)
    return segments.clamp(max=max(counts_S.shape[0] - 1, 0))


# --- the single checks ------------------------------------------------------------------------------------------------


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _check_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if type(tensor).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a DTensor of shape {_shape(tensor)}: how it is sharded cannot be told from it; "
            "gather it, or pass its local shard with the distributed helper"
        )


def _check_float_tensor(name: str, tensor: Any) -> None:
    _check_tensor(name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def _check_layout(hidden: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is None:
        if hidden.dim() != 3:
            raise ValueError(
                f"hidden must have shape (2B, T, H), or (N, H) with cu_seqlens; got {_shape(hidden)} without cu_seqlens"
            )
        return
    _check_tensor("cu_seqlens", cu_seqlens)
    if hidden.dim() != 2:
        raise ValueError(f"hidden must have shape (N, H) when cu_seqlens is given, got {_shape(hidden)}")
    if cu_seqlens.dtype not in INDEX_DTYPES:
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape (S + 1,), got {_shape(cu_seqlens)}")


def _check_labels(labels: Any, hidden: Tensor) -> None:
    _check_tensor("labels", labels)
    if labels.dtype not in INDEX_DTYPES:
        raise TypeError(f"labels must be int32 or int64, got {labels.dtype}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels has shape {_shape(labels)}, expected {tuple(hidden.shape[:-1])} to match hidden {_shape(hidden)}"
        )


def _check_device(name: str, tensor: Tensor | None, hidden: Tensor) -> None:
    if tensor is not None and tensor.device != hidden.device:
        raise ValueError(f"{name} is on {tensor.device} but hidden is on {hidden.device}: move one of them")


def _check_cu_seqlens(cu_seqlens: Tensor, rows: int) -> None:
    values = cu_seqlens.tolist()
    if values[0] != 0 or values[-1] != rows or any(b < a for a, b in zip(values, values[1:], strict=False)):
        raise ValueError(
            f"cu_seqlens must rise from 0 to N = {rows} (rows of hidden) without falling, got {values[:8]}"
            f"{'...' if len(values) > 8 else ''}"
        )


def _raise_bad_label(
    targets_R: Tensor, bad_R: Tensor, vocab: int, ignore_index: int, shift: bool, width: int
) -> None:
    row = int(bad_R.nonzero()[0])
    at = row + int(shift)
    where = f"{at // width}, {at % width}" if width else f"{at}"
    raise ValueError(
        f"labels[{where}] = {int(targets_R[row])} is outside [0, {vocab}) (weight has {vocab} rows) and is not "
        f"ignore_index = {ignore_index}"
    )


def _warn_once(message: str) -> None:
    # The tracer of torch.compile cannot issue warnings.
    if message in _warned or torch.compiler.is_compiling():
        return
    _warned.add(message)
    warnings.warn(message, stacklevel=4)
