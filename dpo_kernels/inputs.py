"""The door: shapes, dtypes and devices of what users pass, checked once, with the argument named.

Behind it (and ``packing``, which looks at values) every layer may assume what the docstrings of ``types`` say.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import checks
from dpo_kernels.checks import FLOAT_DTYPES, check_choice, check_device, check_number, refuse_batched
from dpo_kernels.shapes import STATS, TOKEN_LOGPS, Head, accumulation_dtype

REDUCTIONS = ("mean", "sum", "none")
INDEX_DTYPES = (torch.int32, torch.int64)
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
    """Check the policy's tensors and flatten them. ``ValueError`` for shapes, ``TypeError`` for dtypes."""
    differentiable = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, tensor in (differentiable | {"labels": labels, "cu_seqlens": cu_seqlens}).items():
        refuse_batched(name, tensor)
    refuse_batched("token_weights", token_weights)
    for name, tensor in differentiable.items():
        checks.refuse_forward_mode(name, tensor)
    _check_float_tensor("hidden", hidden)
    _check_layout(hidden, cu_seqlens)
    head = check_head(hidden, weight, bias, logit_scale, softcap, names=("hidden", "weight", "bias"))
    _check_labels(labels, hidden)
    if token_weights is not None:
        _check_floating("token_weights", token_weights)
        if token_weights.shape != labels.shape:
            raise ValueError(
                f"token_weights has shape {_shape(token_weights)}, expected the shape of labels {_shape(labels)}"
            )
    for name, tensor in (("labels", labels), ("token_weights", token_weights), ("cu_seqlens", cu_seqlens)):
        if tensor is not None:
            check_device(name, tensor, "hidden", hidden)
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
    if weight.dim() != 2 or 0 in weight.shape:
        sharded = ": DeepSpeed ZeRO-3 has partitioned it, which is not supported: use ZeRO-2, or the model's own logits"
        raise ValueError(
            f"{weight_name} must have shape (V, H) with V >= 1 and H >= 1, got {_shape(weight)}"
            f"{sharded if hasattr(weight, 'ds_id') else ''}"
        )
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{weight_name} has H = {weight.shape[1]} (shape {_shape(weight)}) but {hidden_name} has "
            f"H = {hidden.shape[-1]} (shape {_shape(hidden)})"
        )
    check_device(weight_name, weight, hidden_name, hidden)
    compute_dtype(hidden, weight, names[:2])
    if bias is not None:
        _check_float_tensor(bias_name, bias)
        if bias.shape != (weight.shape[0],):
            raise ValueError(
                f"{bias_name} has shape {_shape(bias)}, expected ({weight.shape[0]},) for {weight_name} "
                f"{_shape(weight)}"
            )
        check_device(bias_name, bias, hidden_name, hidden)
        compute_dtype(hidden, bias, (hidden_name, bias_name))
    return Head(weight, bias, *check_scaling(logit_scale, softcap))


def check_scaling(logit_scale: float, softcap: float | None) -> tuple[float, float | None]:
    """Check what is done to logits."""
    scale = check_number("logit_scale", logit_scale)
    if softcap is None:
        return scale, None
    cap = check_number("softcap", softcap)
    if cap <= 0:
        raise ValueError(f"softcap must be > 0 or None, got {softcap}")
    return scale, cap


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
        _check_floating("ref_logps", ref_logps)
        if ref_logps.shape != (batch.sequences,):
            raise ValueError(
                f"ref_logps has shape {_shape(ref_logps)}, expected ({batch.sequences},): one per sequence, "
                "in the order of the input"
            )
        check_device("ref_logps", ref_logps, "hidden", batch.hidden)
        _warn_of_16_bits("ref_logps", ref_logps)
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
    check_device("ref_hidden", ref_hidden, "hidden", batch.hidden)
    return _reference_batch(batch, ref_hidden, ref_weight, ref_bias)


def _reference_batch(batch: Batch, ref_hidden: Tensor, ref_weight: Tensor | None, ref_bias: Tensor | None) -> Batch:
    weight, bias, weight_name = ref_weight, ref_bias, "ref_weight"
    if weight is None:
        weight, weight_name = batch.head.weight, "weight (ref_weight=None shares it)"
        bias = batch.head.bias if ref_bias is None else ref_bias
        if weight.requires_grad and torch.is_grad_enabled():
            _warn_once(
                "ref_weight=None scores the reference with `weight`, which requires a gradient: the reference will "
                "drift with the policy. Pass the reference model's own head as ref_weight, or cached ref_logps."
            )
    elif bias is None and batch.head.bias is not None and weight.shape == batch.head.weight.shape:
        _warn_once(
            "bias is given, but a ref_weight of weight's shape comes without ref_bias: the reference is scored without "
            "a bias. Pass ref_bias, zeros where its head has none."
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
        head.weight.detach(),
        None if head.bias is None else head.bias.detach(),
        head.logit_scale,
        head.softcap,
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


def check_reduction(reduction: str, denominator: Any, batch: Batch) -> None:
    """Check ``reduction`` and ``denominator`` together."""
    check_choice("reduction", reduction, REDUCTIONS)
    if denominator is not None:
        if reduction != "mean":
            raise ValueError(f"denominator goes with reduction='mean' only, got reduction={reduction!r}")
        check_divisor("denominator", denominator, batch.hidden)
    elif reduction == "mean" and batch.sequences == 0:
        raise ValueError("empty batch: reduction='mean' of no pairs is undefined; use 'sum' or give a denominator")


def check_main_grad(main_grad: Any, scale: Any, batch: Batch) -> None:
    """Check the buffer that the head's gradient is to be added to; None passes."""
    if check_number("main_grad_scale", scale) == 0:
        raise ValueError("main_grad_scale must not be 0: the other gradients are divided by it")
    if main_grad is None:
        if scale != 1.0:
            raise ValueError("main_grad_scale goes with main_grad only")
        return
    _check_tensor("main_grad", main_grad)
    weight, dtype = batch.head.weight, accumulation_dtype(batch.compute_dtype)
    if main_grad.dtype != dtype:
        raise TypeError(f"main_grad must be {dtype}, in which gradients are added up, got {main_grad.dtype}")
    if main_grad.shape != weight.shape:
        raise ValueError(f"main_grad must have the shape of weight, {_shape(weight)}, got {_shape(main_grad)}")
    check_device("main_grad", main_grad, "weight", weight)
    if not main_grad.is_contiguous():
        raise ValueError(f"main_grad must be contiguous, got strides {main_grad.stride()}")
    if main_grad.requires_grad:
        raise ValueError("main_grad must not require a gradient: it is one")
    if not weight.requires_grad:
        raise ValueError("main_grad was given but weight does not require a gradient")


def check_divisor(name: str, value: Any, like: Tensor, beside: str = "hidden") -> None:
    """Check a positive number or 0-d tensor, on the CPU or on the device of ``like``; None passes."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        if check_number(name, value) <= 0:
            raise ValueError(f"{name} must be > 0, got {value}")
        return
    checks.check_real(name, value, "a real number")
    if value.dim() != 0:
        raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {_shape(value)}")
    if value.device.type != "cpu":
        check_device(name, value, beside, like)
    elif checks.has_values(value) and not value > 0:
        raise ValueError(f"{name} must be > 0, got {float(value.detach())}")


def check_logps(
    policy: tuple[Tensor, Tensor],
    reference: tuple[Tensor | None, Tensor | None],
    tokens: tuple[Tensor | None, Tensor | None],
    reference_free: bool,
    needs_reference: bool,
    loss_name: str,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Check the (chosen, rejected) tensors of ``dpo_loss``; what is missing is filled in: reference 0, tokens 1."""
    chosen = policy[0]
    for side, own, ref, count in zip(("chosen", "rejected"), policy, reference, tokens, strict=True):
        _check_by_pair(f"policy_{side}_logps", own, chosen)
        if ref is not None:
            _check_by_pair(f"ref_{side}_logps", ref, chosen)
            _warn_of_16_bits(f"ref_{side}_logps", ref)
        if count is not None:
            _check_by_pair(f"{side}_tokens", count, chosen, floating=False)
    sides = zip(("ref_chosen_logps", "ref_rejected_logps"), reference, strict=True)
    given = [name for name, tensor in sides if tensor is not None]
    if given and reference_free:
        raise ValueError(f"reference_free=True and {given[0]} exclude each other; pass None for the reference")
    if given and not needs_reference:
        raise ValueError(f"{given[0]} is given, but the loss {loss_name!r} has no reference; pass None")
    if needs_reference and not reference_free and any(tensor is None for tensor in reference):
        raise ValueError(
            f"the loss {loss_name!r} needs a reference: give ref_chosen_logps and ref_rejected_logps, "
            "or say reference_free=True"
        )
    dtype = torch.float64 if torch.float64 in (policy[0].dtype, policy[1].dtype) else torch.float32
    zero, one = torch.zeros_like(chosen, dtype=dtype), torch.ones_like(chosen, dtype=dtype)
    return (
        tuple(t.to(dtype) for t in policy),
        tuple(zero if t is None else t.detach().to(dtype) for t in reference),
        tuple(one if t is None else t.to(dtype) for t in tokens),
    )


def _check_by_pair(name: str, tensor: Any, like: Tensor, *, floating: bool = True) -> None:
    _check_floating(name, tensor) if floating else checks.check_real(name, tensor)
    if tensor.dim() != 1 or tensor.shape != like.shape:
        raise ValueError(f"{name} has shape {_shape(tensor)}, expected (P,) as policy_chosen_logps {_shape(like)}")
    check_device(name, tensor, "policy_chosen_logps", like)


def check_stats(stats: Any) -> tuple[str, ...]:
    """Check the names of requested statistics."""
    known = (*STATS, TOKEN_LOGPS)
    if isinstance(stats, str) or not isinstance(stats, tuple | list | set | frozenset):
        raise TypeError(f"stats must be a tuple of names, got {type(stats).__name__}; known: {', '.join(known)}")
    for name in stats:
        check_choice("stats", name, known)
    return tuple(name for name in known if name in stats)


def compute_dtype(hidden: Tensor, weight: Tensor, names: tuple[str, str]) -> torch.dtype:
    """Dtype of the GEMM operands: the tensors' own, or autocast's."""
    device_type = hidden.device.type
    if (
        not hidden.is_meta
        and torch.is_autocast_enabled(device_type)
        and torch.float64 not in (hidden.dtype, weight.dtype)
    ):
        return torch.get_autocast_dtype(device_type)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"{names[0]} is {hidden.dtype} but {names[1]} is {weight.dtype}: cast one of them, or use autocast"
        )
    return hidden.dtype


# --- the single checks ------------------------------------------------------------------------------------------------


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _check_tensor(name: str, tensor: Any) -> None:
    if type(tensor).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a DTensor of shape {_shape(tensor)}: how it is sharded cannot be told from it. Call this where "
            "FSDP holds it whole, inside its module's forward (register_fsdp_forward_method), or gather it so that its "
            "gradient is the mean over ranks: full_tensor(grad_placements=[Partial('avg')])"
        )
    checks.check_tensor(name, tensor)


def _check_floating(name: str, tensor: Any) -> None:
    _check_tensor(name, tensor)
    checks.check_floating(name, tensor)


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


def _warn_of_16_bits(name: str, logps: Tensor) -> None:
    if logps.dtype.itemsize == 2:
        lost = 256 * torch.finfo(logps.dtype).eps / 2
        _warn_once(
            f"{name} is {logps.dtype}, which holds a log-prob of -300 to within {lost:g} nats: "
            "keep cached log-probs in float32 (DeepSpeed casts what a batch holds to the model's dtype)"
        )


def _warn_once(message: str) -> None:
    # The tracer of torch.compile cannot issue warnings.
    if message in _warned or torch.compiler.is_compiling():
        return
    _warned.add(message)
    warnings.warn(message, stacklevel=4)
