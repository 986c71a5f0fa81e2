"""Time and peak memory of a call, on a CPU and on CUDA.

**CUDA**: the L2 cache is flushed by writing a buffer larger than it, then events around the call; peak memory is
``max_memory_allocated`` over what was allocated before. **CPU**: ``perf_counter``; peak memory is the process's peak
resident set (``VmHWM``, reset through ``/proc/self/clear_refs``) over its resident set before, after the allocators
were told to give back what is free (``malloc_trim``, ``dpo_kernels.empty_cache``), so that nobody lives on pages that
another left. Both count the gradients that a call leaves behind; who asks takes them out.

The CUDA device is given the ``torch.cuda`` that it calls, so that tests can give it a fake one.
"""

import ctypes
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch

import dpo_kernels

L2_FLUSH_BYTES = 256 * 2**20  # the largest L2 of the GPUs here is 126 MB (B200)


class OutOfMemory(Exception):
    """The call did not fit."""


class Broken(Exception):
    """The device is of no use to this process any more: a kernel wrote where it must not."""


class Device(Protocol):
    """What the measurement needs of a device."""

    kind: str
    torch_device: torch.device
    gate_tokens: int  # scored tokens of the copy that is compared with float64

    def seconds(self, call: Callable[[], object]) -> float:
        """Time of one call."""
        ...

    def peak_bytes(self, call: Callable[[], object]) -> tuple[int | None, object]:
        """Peak memory of one call over what was in use before it (None: cannot be told here), and its result."""
        ...

    def release(self) -> None:
        """Give cached memory back."""
        ...


class Cpu:
    """This machine's processor."""

    kind = "cpu"
    torch_device = torch.device("cpu")
    gate_tokens = 64

    def __init__(self) -> None:
        self._libc = None
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.malloc_trim.argtypes = [ctypes.c_size_t]
            self._libc = libc

    def seconds(self, call: Callable[[], object]) -> float:
        """Wall time of one call."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def peak_bytes(self, call: Callable[[], object]) -> tuple[int | None, object]:
        """Peak resident memory over that before; None where Linux's counters are missing."""
        self.release()
        try:
            Path("/proc/self/clear_refs").write_text("5")
            before = _status("VmRSS")
        except (OSError, KeyError):
            return None, call()
        result = call()
        return max(0, _status("VmHWM") - before), result

    def release(self) -> None:
        """Return the allocator's free pages to the system, and those that this package keeps."""
        dpo_kernels.empty_cache()
        if self._libc is not None:
            self._libc.malloc_trim(0)


class Cuda:
    """A CUDA device, through ``api`` (``torch.cuda`` or a stand-in for it)."""

    kind = "cuda"
    gate_tokens = 512

    def __init__(self, api: Any = torch.cuda, torch_device: torch.device | None = None) -> None:
        self.api = api
        self.torch_device = torch_device or torch.device("cuda", api.current_device())
        self._flush = torch.empty(L2_FLUSH_BYTES // 4, dtype=torch.int32, device=self.torch_device)

    def seconds(self, call: Callable[[], object]) -> float:
        """Time between two events around one call, after the L2 cache was flushed."""
        start, end = self.api.Event(enable_timing=True), self.api.Event(enable_timing=True)
        self._flush.zero_()
        start.record()
        call()
        end.record()
        self.api.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def peak_bytes(self, call: Callable[[], object]) -> tuple[int | None, object]:
        """Peak of the caching allocator's allocated bytes over those before."""
        self.release()
        self.api.reset_peak_memory_stats()
        before = self.api.memory_allocated()
        result = call()
        self.api.synchronize()
        return int(self.api.max_memory_allocated() - before), result

    def release(self) -> None:
        """Empty the caching allocator's cache."""
        self.api.synchronize()
        self.api.empty_cache()


def open_device(name: str) -> Device:
    """By name: "cpu", "cuda", or "auto" for CUDA where there is one. Raises ``ValueError`` where it is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return Cpu()
    if name != "cuda":
        raise ValueError(f"no device {name!r}; there are: auto, cpu, cuda")
    if not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device here; --device cpu measures the processor")
    return Cuda()


def guarded(call: Callable[[], object]) -> object:
    """The call, with torch's many ways of saying two things told apart from other errors."""
    try:
        return call()
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemory(_first_line(error)) from None
    except RuntimeError as error:
        text = str(error)
        if "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text:
            raise OutOfMemory(_first_line(error)) from None
        if "CUDA error" in text or "CUDA driver error" in text or "device-side assert" in text:
            raise Broken(_first_line(error)) from None
        raise


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]


def _status(field: str) -> int:
    """A field of /proc/self/status, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)
