"""``bind`` turns the name of a loss, its options and its modifiers into a ``BoundLoss``, and checks them.

A loss may also be a list of names, which are summed, or a user's function.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.checks import check_choice, check_number, check_real, refuse_forward_mode
from dpo_kernels.losses.bound_loss import BoundLoss, Part
from dpo_kernels.losses.divergence import DIVERGENCES
from dpo_kernels.losses.registry import LOSSES, LossFunction, LossSpec
from dpo_kernels.shapes import sum_dtype

Loss = str | LossFunction | Sequence[str]
# Every loss of pairs takes these options beside its own.
MODIFIERS = ("nll_weight", "pair_weights")
# Losses that use log-ratios only also take these.
DIVERGENCE = ("f_divergence", "f_alpha")
# A list of losses also takes this.
MIX = ("loss_weights",)


def bind(loss_type: Loss, beta: float, label_smoothing: float, options: dict[str, Any]) -> BoundLoss:
    """Check a loss and its options by name, and return them as one function.

    Every loss of pairs is checked here. ``fit_to_batch`` checks options that are tensors against the batch.

    Args:
        loss_type: a name in ``LOSSES``, a callable, or a list of names that are summed with ``loss_weights``.
        beta: inverse temperature.
        label_smoothing: an option of many losses. For the others 0 counts as not given.
        options: the loss's own options and the modifiers, by name.

    Returns:
        The loss. Tensors among the options keep their shape, dtype and device until ``fit_to_batch``.

    Raises:
        ValueError: the name is unknown, the loss does not have an option, or a value is out of range.
        TypeError: a value has the wrong type.

    """
    specs = _find_all(loss_type)
    beta = check_number("beta", beta)
    positive = [spec.name for spec in specs if spec.beta_positive]
    if beta < 0 or (positive and beta == 0):
        raise ValueError(f"beta must be {'> 0 for ' + positive[0] if positive else '>= 0'}, got {beta}")
    given = dict(options)
    label_smoothing = check_number("label_smoothing", label_smoothing)
    if label_smoothing != 0.0 or any("label_smoothing" in spec.options for spec in specs):
        given["label_smoothing"] = label_smoothing
    own = tuple(dict.fromkeys(name for spec in specs for name in spec.options))
    modifiers: tuple[str, ...] = MODIFIERS
    if any(spec.uses_log_ratios_only for spec in specs):
        modifiers += DIVERGENCE
    if not isinstance(loss_type, str) and not callable(loss_type):
        modifiers += MIX
    _check_names(given, specs, own, modifiers)
    f_divergence = given.pop("f_divergence", "reverse_kl")
    check_choice("f_divergence", f_divergence, tuple(DIVERGENCES))
    f_alpha = check_number("f_alpha", given.pop("f_alpha", 0.5))
    nll_weight = check_number("nll_weight", given.pop("nll_weight", max(spec.nll_weight for spec in specs)))
    weights = _check_weights(given.pop("loss_weights", None), specs)
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor) or name == "pair_weights"}
    parts = []
    for spec, weight in zip(specs, weights, strict=True):
        numbers = {name: given[name] for name in spec.options if name in given and name not in tensors}
        for name, value in numbers.items():
            _check_value(spec, name, value)
        defaults = {name: value for name, value in spec.defaults.items() if name not in tensors}
        for name, value in defaults.items():
            if value is inspect.Parameter.empty and name not in numbers:
                raise ValueError(f"the loss {spec.name!r} needs the option {name}")
        parts.append(Part(spec, weight, tuple((defaults | numbers).items())))
    for name, value in tensors.items():
        tensors[name] = _check_tensor(name, value, specs)
    return BoundLoss(tuple(parts), beta, f_divergence, f_alpha, nll_weight, tensors)


def needs_kl(loss_type: Loss) -> bool:
    """Return whether a loss reads the KL divergence of the reference from the policy, before its options are known."""
    return any(spec.needs_kl for spec in _find_all(loss_type))


def fit_to_batch(loss: BoundLoss, pairs: int, device: torch.device) -> BoundLoss:
    """Return the loss with its tensors as ``(P,)`` float64 on the device of the log-probs (float32 on MPS).

    Raises:
        ValueError: a tensor has another shape than ``()`` or ``(P,)``, or it is on another device. A 0-d tensor on the
            CPU goes with every device.

    """
    fitted = {}
    for name, value in loss.tensors.items():
        if value.dim() == 1 and value.shape[0] != pairs:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected ({pairs},): one number for each pair")
        if value.device != device and (value.dim() or value.device.type != "cpu"):
            raise ValueError(f"{name} is on {value.device} but the log-probs are on {device}: move one of them")
        fitted[name] = value.detach().to(device, sum_dtype(device)).expand(pairs)
    return replace(loss, tensors=fitted) if fitted else loss


def _find_all(loss_type: Loss) -> tuple[LossSpec, ...]:
    if isinstance(loss_type, str):
        return (_find(loss_type),)
    if callable(loss_type):
        # The author of the function binds its options, if it has any, with functools.partial or a closure.
        name = getattr(loss_type, "__name__", type(loss_type).__name__)
        separable, needs_kl = (_says(loss_type, each) for each in ("separable", "needs_kl"))
        return (LossSpec(name, loss_type, separable=separable, needs_kl=needs_kl),)
    if not isinstance(loss_type, tuple | list):
        raise TypeError(f"loss_type must be a name or a callable, or a list of names, got {type(loss_type).__name__}")
    if not loss_type:
        raise ValueError("loss_type is empty: a mix has at least one loss")
    for name in loss_type:
        if not isinstance(name, str):
            raise TypeError(f"a mix in loss_type is of names, got {type(name).__name__}")
    if len(set(loss_type)) < len(loss_type):
        raise ValueError(f"loss_type names a loss twice: {', '.join(loss_type)}; give it the sum of its weights")
    return tuple(_find(name) for name in loss_type)


def _says(function: LossFunction, attribute: str) -> bool:
    """Return whether an attribute of a callable is true. A ``functools.partial`` has those of what it calls."""
    while not hasattr(function, attribute) and isinstance(function, partial):
        function = function.func
    return bool(getattr(function, attribute, False))


def _find(name: str) -> LossSpec:
    if name not in LOSSES:
        raise ValueError(f"unknown loss_type {name!r}; known: {', '.join(sorted(LOSSES))}, or a callable")
    return LOSSES[name]


def _check_names(
    given: dict[str, Any], specs: Sequence[LossSpec], own: tuple[str, ...], modifiers: tuple[str, ...]
) -> None:
    for name in given:
        if name in own or name in modifiers:
            continue
        loss = "+".join(spec.name for spec in specs)
        known = f"{', '.join(own) or 'none'}; beside them: {', '.join(modifiers)}"
        raise ValueError(f"{name} is not an option of the loss {loss!r}; it has: {known}")


def _check_weights(weights: Any, specs: Sequence[LossSpec]) -> list[float]:
    if weights is None:
        return [1.0] * len(specs)
    if not isinstance(weights, tuple | list):
        raise TypeError(f"loss_weights must be a list of numbers, got {type(weights).__name__}")
    if len(weights) != len(specs):
        raise ValueError(f"loss_weights has {len(weights)} numbers for {len(specs)} losses")
    return [check_number("loss_weights", weight) for weight in weights]


def _check_value(spec: LossSpec, name: str, value: Any) -> None:
    number = check_number(name, value)
    if name in spec.limits:
        low, high = spec.limits[name]
        if not low <= number <= high:
            raise ValueError(f"{name} must lie in [{low}, {high}] for {spec.name!r}, got {value}")


def _check_tensor(name: str, value: Any, specs: Sequence[LossSpec]) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor (P,), got {type(value).__name__}")
    if name != "pair_weights" and not any(name in spec.by_pair for spec in specs):
        raise TypeError(f"{name} must be a real number, got a tensor")
    check_real(name, value)
    if value.dim() > 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected (P,) or ()")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which the loss does not give; detach it")
    refuse_forward_mode(name, value)
    return value
