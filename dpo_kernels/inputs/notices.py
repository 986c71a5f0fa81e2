"""Warnings about input that is legal and probably a mistake; each is given once a process."""

import warnings

import torch
from torch import Tensor

_given: set[str] = set()


def warn_once(message: str) -> None:
    """Warn, unless this message was given before."""
    # The tracer of torch.compile cannot issue warnings.
    if message in _given or torch.compiler.is_compiling():
        return
    _given.add(message)
    warnings.warn(message, stacklevel=4)


def warn_of_16_bits(name: str, logps: Tensor) -> None:
    """Warn where log-probs have lost their digits to a 16-bit dtype."""
    if logps.dtype.itemsize == 2:
        lost = 256 * torch.finfo(logps.dtype).eps / 2
        warn_once(
            f"{name} is {logps.dtype}, which holds a log-prob of -300 to within {lost:g} nats: "
            "keep cached log-probs in float32 (DeepSpeed casts what a batch holds to the model's dtype)"
        )
