"""Checks of denominators and of ``main_grad`` against the batch."""

from typing import Any

from torch import Tensor

from dpo_kernels import checks
from dpo_kernels.checks import check_device, check_number
from dpo_kernels.inputs.options import MainGradOptions, Reduction
from dpo_kernels.inputs.tensors import Batch, check_tensor, shape
from dpo_kernels.problem import MainGrad
from dpo_kernels.shapes import accumulation_dtype


def check_reduction(options: Reduction, batch: Batch) -> None:
    """Check the denominators, and that a mean has at least one example."""
    check_divisor("denominator", options.denominator, batch.hidden)
    if options.denominator is None and options.reduction == "mean" and batch.sequences == 0:
        raise ValueError("empty batch: reduction='mean' of no pairs is undefined; use 'sum' or give a denominator")
    check_divisor("token_denominator", options.token_denominator, batch.hidden)


def check_main_grad(options: MainGradOptions, batch: Batch) -> MainGrad | None:
    """Check the buffer that the head's gradient is added to. Return None where there is none."""
    main_grad = options.main_grad
    if main_grad is None:
        return None
    check_tensor("main_grad", main_grad)
    weight, dtype = batch.head.weight, accumulation_dtype(batch.compute_dtype)
    if main_grad.dtype != dtype:
        raise TypeError(f"main_grad must be {dtype}, in which gradients are added up, got {main_grad.dtype}")
    if main_grad.shape != weight.shape:
        raise ValueError(f"main_grad must have the shape of weight, {shape(weight)}, got {shape(main_grad)}")
    check_device("main_grad", main_grad, "weight", weight)
    if not main_grad.is_contiguous():
        raise ValueError(f"main_grad must be contiguous, got strides {main_grad.stride()}")
    if main_grad.requires_grad:
        raise ValueError("main_grad must not require a gradient: it is one")
    if not weight.requires_grad:
        raise ValueError("main_grad was given but weight does not require a gradient")
    return MainGrad(main_grad, float(options.main_grad_scale))


def check_divisor(name: str, value: Any, like: Tensor, beside: str = "hidden") -> None:
    """Check a positive number or 0-d tensor. None passes.

    A tensor may lie on the CPU or on the device of ``like``, which errors call ``beside``. Only on the CPU is its
    value looked at.
    """
    if value is None:
        return
    if not isinstance(value, Tensor):
        if check_number(name, value) <= 0:
            raise ValueError(f"{name} must be > 0, got {value}")
        return
    checks.check_real(name, value, "a real number")
    if value.dim() != 0:
        raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {shape(value)}")
    if value.device.type != "cpu":
        check_device(name, value, beside, like)
    elif checks.has_values(value) and not value > 0:
        raise ValueError(f"{name} must be > 0, got {float(value.detach())}")
