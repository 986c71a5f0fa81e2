"""Warnings about input that is legal but probably a mistake. Each is issued once in a process."""

import warnings

import torch
from torch import Tensor

# These are the messages that this process has issued.
issued: set[str] = set()


def warn_once(message: str) -> None:
    """Warn, unless this message was issued before."""
    # The tracer of torch.compile cannot issue warnings.
    if message in issued or torch.compiler.is_compiling():
        return
    issued.add(message)
    warnings.warn(message, stacklevel=4)


def warn_of_16_bits(name: str, logps: Tensor) -> None:
    """Warn if log-probs have a 16-bit dtype, which has too few digits for them."""
    if logps.dtype.itemsize == 2:
        rounding_error = 256 * torch.finfo(logps.dtype).eps / 2
        warn_once(
            f"{name} is {logps.dtype}, which holds a log-prob of -300 to within {rounding_error:g} nats: "
            "keep cached log-probs in float32 (DeepSpeed casts what a batch holds to the model's dtype)"
        )
