"""Checks of shapes, dtypes and devices of the tensors that users pass. Every error names the argument.

``packing`` checks values. After these two every layer may assume what the docstrings of ``shapes`` say.
"""

from typing import Any

import torch
from torch import Tensor

from dpo_kernels import checks
from dpo_kernels.checks import FLOAT_DTYPES, INDEX_DTYPES, check_device, refuse_batched
from dpo_kernels.inputs.options import HeadOptions, PolicyTensors
from dpo_kernels.records import dataclass
from dpo_kernels.shapes import Head
from dpo_kernels.tiled_weight import TiledWeight

# What to do where an engine shards the head. A gradient through ``full_tensor()`` would be wrong without a word.
GATHERED_BY = (
    "call this in the head's own forward, as fused_lm_head(model).attach() does, or within "
    "dpo_kernels.distributed.unsharded(head)."
)


@dataclass(frozen=True)
class Batch:
    """The checked tensors of one model. Labels and what goes with them are flattened to R rows."""

    hidden: Tensor  # (R, H), or (M, H) with rows
    head: Head
    labels: Tensor  # (R,) int32 or int64
    cu_seqlens: Tensor | None  # (S + 1,) int32 or int64, None for padded input
    token_weights: Tensor | None  # (R,)
    rows: Tensor | None  # (R,) int32 or int64, row of hidden that predicts each label
    sequences: int  # S
    width: int  # T, or 0 for packed input
    compute_dtype: torch.dtype  # dtype of the GEMM operands
    result_dtype: torch.dtype  # dtype of what the caller gets


def check_batch(policy: PolicyTensors, options: HeadOptions, *, paired: bool) -> Batch:
    """Check the policy's tensors and flatten them. ``paired`` asks for an even number of sequences.

    Raises:
        ValueError: a shape or a device is wrong.
        TypeError: a dtype is wrong.

    """
    hidden, weight, labels, bias = policy.hidden, policy.weight, policy.labels, policy.bias
    cu_seqlens, token_weights, rows = policy.cu_seqlens, policy.token_weights, policy.rows
    differentiable = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, tensor in (differentiable | {"labels": labels, "cu_seqlens": cu_seqlens}).items():
        refuse_batched(name, tensor)
    refuse_batched("token_weights", token_weights)
    refuse_batched("rows", rows)
    for name, tensor in differentiable.items():
        checks.refuse_forward_mode(name, tensor)
    check_float_tensor("hidden", hidden)
    _check_rows(policy) if rows is not None else _check_layout(hidden, cu_seqlens)
    head = check_head(
        hidden, weight, bias, options, names=("hidden", "weight", "bias"), shard=policy.vocab_parallel is not None
    )
    if rows is None:
        _check_labels(labels, hidden.shape[:-1], "hidden", hidden)
    else:
        _check_labels(labels, rows.shape, "rows", rows)
    if token_weights is not None:
        check_floating("token_weights", token_weights)
        if token_weights.shape != labels.shape:
            raise ValueError(
                f"token_weights has shape {shape(token_weights)}, expected the shape of labels {shape(labels)}"
            )
    for name, tensor in (
        ("labels", labels),
        ("token_weights", token_weights),
        ("cu_seqlens", cu_seqlens),
        ("rows", rows),
    ):
        if tensor is not None:
            check_device(name, tensor, "hidden", hidden)
    if cu_seqlens is None:
        sequences, width = labels.shape[0], labels.shape[1]
    else:
        sequences, width = cu_seqlens.shape[0] - 1, 0
    if paired and sequences % 2:
        raise ValueError(
            f"pairs need an even number of sequences, got {sequences} (hidden {shape(hidden)}): chosen and rejected"
        )
    return Batch(
        hidden=hidden.reshape(-1, hidden.shape[-1]),
        head=head,
        labels=labels.reshape(-1),
        cu_seqlens=cu_seqlens,
        token_weights=None if token_weights is None else token_weights.detach().reshape(-1),
        rows=None if rows is None else rows.reshape(-1),
        sequences=sequences,
        width=width,
        compute_dtype=compute_dtype(hidden, weight, ("hidden", "weight")),
        result_dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32,
    )


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: HeadOptions,
    names: tuple[str, str, str],
    *,
    shard: bool = False,
) -> Head:
    """Check an LM head against the hidden states that it is applied to.

    ``hidden`` is ``(..., H)``, ``weight`` is ``(V, H)`` and ``bias`` is ``(V,)``. ``names`` are their names in errors.
    A ``shard`` of the vocabulary may be empty.
    """
    hidden_name, weight_name, bias_name = names
    check_weight(weight_name, weight, shard=shard)
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{weight_name} has H = {weight.shape[1]} (shape {shape(weight)}) but {hidden_name} has "
            f"H = {hidden.shape[-1]} (shape {shape(hidden)})"
        )
    check_device(weight_name, weight, hidden_name, hidden)
    compute_dtype(hidden, weight, names[:2])
    if bias is not None:
        check_float_tensor(bias_name, bias)
        if bias.shape != (weight.shape[0],):
            raise ValueError(
                f"{bias_name} has shape {shape(bias)}, expected ({weight.shape[0]},) for {weight_name} {shape(weight)}"
            )
        check_device(bias_name, bias, hidden_name, hidden)
        compute_dtype(hidden, bias, (hidden_name, bias_name))
    softcap = None if options.softcap is None else float(options.softcap)
    return Head(weight, bias, float(options.logit_scale), softcap)


def compute_dtype(hidden: Tensor, weight: Tensor, names: tuple[str, str]) -> torch.dtype:
    """Return the dtype of the GEMM operands: that of the tensors, or autocast's."""
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


def shape(tensor: Tensor) -> str:
    """Return the shape as errors print it."""
    return str(tuple(tensor.shape))


def check_tensor(name: str, tensor: Any) -> None:
    """Raise unless ``tensor`` is a plain tensor. The error for a ``DTensor`` says what to do instead."""
    if type(tensor).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a DTensor of shape {shape(tensor)}: how it is sharded cannot be told from it. Hidden states "
            f"and labels: gather it, or take its local part. A head that FSDP shards: {GATHERED_BY} A head that is "
            "split for tensor parallelism: VocabParallel.of(weight)"
        )
    checks.check_tensor(name, tensor)


def check_floating(name: str, tensor: Any) -> None:
    """Raise unless ``tensor`` is a plain tensor of floating-point numbers."""
    check_tensor(name, tensor)
    checks.check_floating(name, tensor)


def check_weight(name: str, weight: Any, *, shard: bool = False) -> None:
    """Raise unless ``weight`` is a floating-point matrix ``(V, H)``. Only a ``shard`` of it may be empty."""
    check_float_tensor(name, weight)
    if isinstance(weight, TiledWeight) and weight.requires_grad:
        raise ValueError(f"{name} comes in tiles and is frozen: it gets no gradient, so it must not require one")
    if weight.dim() != 2 or weight.shape[1] == 0 or (weight.shape[0] == 0 and not shard):
        hint = f": DeepSpeed ZeRO-3 has partitioned it: {GATHERED_BY}"
        raise ValueError(
            f"{name} must have shape (V, H) with V >= 1 and H >= 1, got {shape(weight)}"
            f"{hint if hasattr(weight, 'ds_id') else ''}"
        )


def check_float_tensor(name: str, tensor: Any) -> None:
    """Raise unless ``tensor`` has a dtype that the fused losses compute in."""
    check_tensor(name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def _check_layout(hidden: Tensor, cu_seqlens: Tensor | None) -> None:
    """Raise unless ``hidden`` is padded ``(2B, T, H)``, or packed ``(N, H)`` with a valid ``cu_seqlens``."""
    if cu_seqlens is None:
        if hidden.dim() != 3:
            raise ValueError(
                "hidden must have shape (2B, T, H), or (N, H) with cu_seqlens or rows; "
                f"got {shape(hidden)} without cu_seqlens and rows"
            )
        return
    check_tensor("cu_seqlens", cu_seqlens)
    if hidden.dim() != 2:
        raise ValueError(f"hidden must have shape (N, H) when cu_seqlens is given, got {shape(hidden)}")
    _check_cumulative_lengths(cu_seqlens)


def _check_cumulative_lengths(cu_seqlens: Any) -> None:
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in INDEX_DTYPES:
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape (S + 1,), got {shape(cu_seqlens)}")


def _check_rows(policy: PolicyTensors) -> None:
    """Raise unless ``hidden`` is ``(M, H)`` and ``rows`` are integers with the dimensions of labels."""
    hidden, rows, cu_seqlens = policy.hidden, policy.rows, policy.cu_seqlens
    check_tensor("rows", rows)
    assert rows is not None, "there are rows to check"
    if rows.dtype not in INDEX_DTYPES:
        raise TypeError(f"rows must be int32 or int64, got {rows.dtype}")
    if hidden.dim() != 2:
        raise ValueError(f"hidden must have shape (M, H) when rows is given, got {shape(hidden)}")
    if rows.dim() != (2 if cu_seqlens is None else 1):
        wanted = "(2B, T) without cu_seqlens" if cu_seqlens is None else "(N,) with cu_seqlens"
        raise ValueError(f"rows has shape {shape(rows)}, expected {wanted}, as labels")
    if cu_seqlens is not None:
        _check_cumulative_lengths(cu_seqlens)


def _check_labels(labels: Any, expected: tuple[int, ...], beside: str, like: Tensor) -> None:
    check_tensor("labels", labels)
    if labels.dtype not in INDEX_DTYPES:
        raise TypeError(f"labels must be int32 or int64, got {labels.dtype}")
    if labels.shape != expected:
        raise ValueError(
            f"labels has shape {shape(labels)}, expected {tuple(expected)} to match {beside} {shape(like)}"
        )
