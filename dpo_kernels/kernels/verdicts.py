"""The self-check's verdicts: when a backend is checked on a GPU, and where the result is kept.

A backend is checked at a process's first call with a dtype on a GPU, unless an earlier process found it healthy under
the same GPU, driver, torch, Triton and kernels. Nothing is checked while a CUDA graph is captured or a tracer is at
work. ``DPO_KERNELS_SELF_CHECK=0`` switches the check off.
"""

import hashlib
import os
import platform
import warnings
from pathlib import Path

import torch

from dpo_kernels.kernel_interface import RowKernels
from dpo_kernels.kernels import installed, kept_files
from dpo_kernels.kernels.cuda import CudaKernels
from dpo_kernels.kernels.installed import constant_in_graphs
from dpo_kernels.kernels.self_check import mismatches

SWITCH = "DPO_KERNELS_SELF_CHECK"
HEALTHY = "agrees with torch"  # the entry of a kept file

Key = tuple[str, str, str]  # name of the backend, device, dtype
_reasons: dict[Key, str | None] = {}  # of this process; None stands for a healthy backend
_warned: set[Key] = set()


@constant_in_graphs
def why_not(backend: str, device: torch.device, dtype: torch.dtype, by_name: bool, tracing: bool) -> str | None:
    """Return why the kernels of a backend must not be used on a GPU, or None where nothing speaks against them.

    Args:
        backend: ``"triton"`` or ``"cuda"``.
        device: where the hidden states lie. Other devices than CUDA's are not checked.
        dtype: dtype of the GEMM operands.
        by_name: whether the caller asked for the backend. Otherwise a mismatch is a warning, once in a process.
        tracing: whether a tracer is at work. What is known then counts, and nothing is run.

    Raises:
        ValueError: ``DPO_KERNELS_SELF_CHECK`` is neither 0 nor 1.

    """
    if device.type != "cuda" or not switched_on():
        return None
    key = _key(backend, device, dtype)
    if key not in _reasons:
        if tracing or not _may_run(device):
            return None
        _reasons[key] = reason_against(backend, kernels_of(backend), device, dtype)
    reason = _reasons[key]
    if reason is not None and not by_name and key not in _warned and not tracing:
        _warned.add(key)
        warnings.warn(f"the backend {backend!r} is left out: {reason}", stacklevel=2)
    return reason


def switched_on() -> bool:
    """Whether backends are checked. Raises ``ValueError`` if ``DPO_KERNELS_SELF_CHECK`` is neither 0 nor 1."""
    mode = os.environ.get(SWITCH, "1")
    if mode not in ("0", "1"):
        raise ValueError(f"{SWITCH}={mode!r}, expected 0 or 1")
    return mode == "1"


def reason_against(backend: str, kernels: type[RowKernels], device: torch.device, dtype: torch.dtype) -> str | None:
    """Check a backend, unless an earlier process found it healthy. Return what is wrong with it.

    Only a healthy verdict is kept on disk. After a failure the next process looks again.
    """
    path, kind = path_of(device), f"{backend} {dtype}"
    if kept_files.entries_of(path).get(kind) == HEALTHY:
        return None
    reason = checked(kernels, device, dtype)
    if reason is None:
        try:
            kept_files.add_entry(path, kind, HEALTHY)
        except OSError as error:
            warnings.warn(
                f"the self-check's verdict cannot be kept in {path.parent} ({error}), and each process will check "
                f"again; {kept_files.FOLDER} names another folder, {SWITCH}=0 switches the check off",
                stacklevel=2,
            )
    return reason


def checked(kernels: type[RowKernels], device: torch.device, dtype: torch.dtype) -> str | None:
    """Run the self-check of a class of kernels. Return what is wrong in one sentence, or None.

    Raises:
        torch.OutOfMemoryError: there is no room for a few megabytes, which says nothing about the kernels.

    """
    hint = f"{SWITCH}=0 uses it all the same, `python -m dpo_kernels` writes a report"
    errors: tuple[type[Exception], ...] = (RuntimeError, *kernels.launch_errors)
    try:
        found = mismatches(kernels, dtype, device)
    except torch.OutOfMemoryError:
        raise
    except errors as error:
        text = str(error).strip().splitlines() or [""]
        return f"its self-check ended with {type(error).__name__}: {text[0][:300]} ({hint})"
    if not found:
        return None
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    return f"its self-check failed: {found[0]}{more} ({hint})"


def clear() -> None:
    """Forget the verdicts of this process; those on disk stay."""
    _reasons.clear()
    _warned.clear()


def path_of(device: torch.device) -> Path:
    """Return the file of the verdicts on a device. Other versions of anything that makes the code have another one."""
    folder = Path(__file__).parent
    text = "".join(path.read_text() for path in sorted(folder.rglob("*.py")))
    built = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in folder.parent.glob("_C*")]
    versions = (torch.__version__, torch.version.cuda, torch.version.hip, installed.triton_version())
    facts = (*versions, installed.driver_version(), *sorted(built))
    digest = hashlib.sha256((text + " ".join(map(str, facts))).encode()).hexdigest()[:12]
    return kept_files.path_of("self-check", name_of(device), digest)


def name_of(device: torch.device) -> str:
    """Return the name of a GPU, or the kind of processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"


def kernels_of(backend: str) -> type[RowKernels]:
    """Return the class of a backend that runs on a GPU: ``"triton"`` or ``"cuda"``."""
    if backend == "cuda":
        return CudaKernels
    from dpo_kernels.kernels.triton.backend import TritonKernels

    return TritonKernels


def _key(backend: str, device: torch.device, dtype: torch.dtype) -> Key:
    index = torch.cuda.current_device() if device.index is None else device.index
    return backend, f"{device.type}:{index}", str(dtype)


def _may_run(device: torch.device) -> bool:
    """Whether kernels may be launched: on a GPU that is there, outside of captures and of modes that see each call."""
    if not torch.cuda.is_available() or torch.compiler.is_compiling():
        return False  # torch is tracing for a GPU that is not here, or for one that is
    with torch.cuda.device(device):
        return not torch.cuda.is_current_stream_capturing() and torch._C._len_torch_dispatch_stack() == 0
