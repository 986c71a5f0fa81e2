"""Checks of single values. Each error names the argument: ``TypeError`` for its type, ``ValueError`` for its value."""

import math
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dpo_kernels.shapes import WRAPPERS_THAT_UNWRAP

# These are the dtypes that hidden states, heads and log-probs may have.
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Labels and cumulative lengths have one of these.
INDEX_DTYPES = (torch.int32, torch.int64)
# These are the dtypes that a count, a weight or an option may have beside the floating ones.
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# These are the classes that torch's tracers put in the place of tensors. They hold shapes and no numbers.
WITHOUT_VALUES = ("FakeTensor", "FunctionalTensor")
# The following texts end an error message. They say what to do instead.
INSTEAD = "use dpo_kernels.reference, which is plain torch"
UNDER_VMAP = (
    "batched by vmap, under which jacrev, jacfwd, is_grads_batched=True and vectorize=True run too: the fused losses "
    f"and log-probs have no rule for it. Run them one after the other, or {INSTEAD}"
)
IN_FORWARD_MODE = (
    "part of a forward-mode differentiation (torch.func.jvp, jacfwd, hessian, torch.autograd.forward_ad), which the "
    f"fused losses and log-probs do not have: differentiate backward, or {INSTEAD}"
)


def check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of the ``known`` names."""
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")


def check_count(name: str, value: Any, least: int) -> None:
    """Raise unless ``value`` is None or an integer >= ``least``."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral | torch.SymInt):
        raise TypeError(f"{name} must be an integer or None, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_flag(name: str, value: Any) -> None:
    """Raise unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def check_tensor(name: str, value: Any) -> None:
    """Raise unless ``value`` is a plain dense tensor.

    A nested, sparse or wrapper tensor is refused, because its numbers do not lie in strided memory of its own.
    """
    kind = type(value)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {kind.__name__}")
    if value.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested one: pad it, or pack it: its values(), with its offsets() as "
            "cu_seqlens"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if hasattr(kind, "__tensor_flatten__") and kind.__name__ not in WRAPPERS_THAT_UNWRAP:
        raise TypeError(
            f"{name} is a {kind.__name__}, which wraps other tensors: give the plain tensor that it stands for (of a "
            "quantised weight, dequantize())"
        )


def check_floating(name: str, value: Any) -> None:
    """Raise unless ``value`` is a dense tensor of a floating-point dtype."""
    check_tensor(name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be floating point, of 16, 32 or 64 bits, got {value.dtype}")


def check_real(name: str, value: Any, noun: str = "of real numbers") -> None:
    """Raise unless ``value`` is a dense tensor of integers or floating-point numbers.

    The error says that the argument must be ``noun``.
    """
    check_tensor(name, value)
    if value.dtype not in (*FLOAT_DTYPES, *INTEGER_DTYPES):
        raise TypeError(f"{name} must be {noun}, got {value.dtype}")


def check_device(name: str, tensor: Tensor, beside: str, like: Tensor) -> None:
    """Raise unless ``tensor`` is on the device of ``like``.

    The error calls the two tensors ``name`` and ``beside``.
    """
    if tensor.device == like.device:
        return
    advice = "move one of them"
    if tensor.is_meta or like.is_meta:
        advice = (
            f"{name if tensor.is_meta else beside} has no values. An offloaded weight is loaded only while its own "
            "module runs: call this within the model's forward, or load the model without offloading"
        )
    raise ValueError(f"{name} is on {tensor.device} but {beside} is on {like.device}: {advice}")


def check_cumulative(values: Sequence[int], rows: int, of: str) -> None:
    """Raise unless ``values``, those of ``cu_seqlens``, rise from 0 to ``rows`` without falling.

    ``of`` is the name of the tensor whose rows they divide.
    """
    if values[0] != 0 or values[-1] != rows or any(b < a for a, b in pairwise(values)):
        raise ValueError(
            f"cu_seqlens must rise from 0 to N = {rows} (rows of {of}) without falling, got {values[:8]}"
            f"{'...' if len(values) > 8 else ''}"
        )


def traced(tensor: Tensor) -> bool:
    """Return whether a tracer or fake tensors are at work, so that only operators of the dispatcher may run."""
    return tensor.is_meta or type(tensor).__name__ in WITHOUT_VALUES or torch.compiler.is_compiling()


def has_values(tensor: Tensor) -> bool:
    """Return whether the numbers of a tensor can be read: it is not on the meta device, and no tracer is at work."""
    return not traced(tensor)


def refuse_batched(name: str, value: Any) -> None:
    """Raise if ``value`` is a tensor that ``vmap`` has batched.

    torch marks such a tensor in two ways, one for ``torch.func`` and an older one for autograd. Both are looked for.
    """
    if not isinstance(value, Tensor) or torch.compiler.is_compiling():
        return
    inner = value
    batched = torch._C._functorch.is_legacy_batchedtensor(inner)
    while not batched and torch._C._functorch.is_functorch_wrapped_tensor(inner):
        batched = torch._C._functorch.is_batchedtensor(inner)
        inner = torch._C._functorch.get_unwrapped(inner)
    if batched:
        raise RuntimeError(f"{name} is {UNDER_VMAP}")


def refuse_forward_mode(name: str, value: Any) -> None:
    """Raise if ``value`` is a tensor that carries a tangent of forward-mode differentiation."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return
    if forward_ad.unpack_dual(value).tangent is not None:
        raise RuntimeError(f"{name} is {IN_FORWARD_MODE}")


def check_integer(name: str, value: Any) -> None:
    """Raise unless ``value`` is an integer that fits 64 bits."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not -(2**63) <= int(value) < 2**63:
        raise ValueError(f"{name} must fit 64 bits, got {value}")


def check_number(name: str, value: Any) -> float:
    """Return ``value`` as a float; raise unless it is a finite real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    number = float(value)
    if not -math.inf < number < math.inf:  # torch cannot trace math.isfinite of a symbolic float
        raise ValueError(f"{name} must be finite, got {number}")
    return number
