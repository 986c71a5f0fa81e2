"""Checks of plain values. Each names the argument: ``TypeError`` for a type, ``ValueError`` for a value."""

import math
from numbers import Integral, Real
from typing import Any

import torch


def check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of the ``known`` names."""
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")


def check_count(name: str, value: Any, least: int) -> None:
    """Raise unless ``value`` is None or an integer of at least ``least``."""
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
    """Raise unless ``value`` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_integer(name: str, value: Any) -> None:
    """Raise unless ``value`` is an integer."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not -(2**63) <= int(value) < 2**63:
        raise ValueError(f"{name} must fit 64 bits, got {value}")


def check_number(name: str, value: Any) -> float:
    """``value`` as a finite float; a ``TypeError`` or ``ValueError`` names the argument."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    number = float(value)
    if not -math.inf < number < math.inf:  # math.isfinite cannot be traced with a symbolic float
        raise ValueError(f"{name} must be finite, got {number}")
    return number
