"""What the host does of a call on a GPU: the kernels that it launches, and the time until the first matrix product.

No GPU is needed. Tensors lie on the CPU and say ``is_cuda``, and the Triton backend takes them. Its kernels and the
matrix products are stubs. ``python -m tests.host_path`` prints a table.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import dpo_kernels as dk

# Operations that are no views and yet launch nothing: they allocate, or look at a tensor.
NO_LAUNCH = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh")
MICROSECOND = 1e-6
GPU = torch.device("cuda", 0)


class Launches(TorchDispatchMode):
    """Counts torch's operations that launch a kernel on a GPU, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        filled = any(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
        if filled and not func.is_view and name not in NO_LAUNCH:
            self.by_name[name] += 1
        return out


class Stubs:
    """Stands in for kernels and matrix products; remembers what was launched, and when."""

    def __init__(self, scored: int | Sequence[int]) -> None:
        self.scored = scored  # tokens of each sequence, or one number for all
        self.kernels: Counter[str] = Counter()
        self.gemms = self.copies = 0
        self.synced = self.first_gemm = 0.0

    def kernel(self, kernel, *arguments, grid, warmup=False, **options) -> None:
        """Stand in for the launch of a Triton kernel. Of packing the results are written that decide what follows."""
        self.kernels[kernel.__name__] += 1
        if kernel.__name__ not in ("count_scored", "write_packed"):
            return
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        with _disable_current_modes():
            if kernel.__name__ == "count_scored":
                given["counts_ptr"].numpy()[:], given["bad_ptr"].numpy()[:] = self.scored, 0
                return
            for name in ("index_ptr", "packed_labels_ptr", "slot_ptr", "nan_if_invalid_ptr"):
                given[name].numpy()[...] = 0
            segments, sequences = given["segments_ptr"].numpy(), given["sequences"]
            starts = np.cumsum(np.broadcast_to(self.scored, sequences))
            segments[:] = np.searchsorted(starts, np.arange(len(segments)), side="right")

    def gemm(self, a, b, out, accumulate, alpha=1.0) -> None:
        """Stand in for a matrix product."""
        self.gemms += 1
        if not self.first_gemm:
            self.first_gemm = time.perf_counter()

    def sync(self, on_the_host: Callable[..., object]) -> Callable[..., object]:
        """Return the function that copies the counts to the host, which also remembers when it came back."""

        def copied(*arguments):
            with _disable_current_modes():
                out = on_the_host(*arguments)
            self.copies += 1
            self.synced, self.first_gemm = time.perf_counter(), 0.0
            return out

        return copied


@contextmanager
def on_a_gpu_of_stubs(scored: int | Sequence[int]) -> Iterator[Stubs]:
    """Take the CPU for a GPU on which the Triton backend runs. Each sequence has ``scored`` tokens, or as many each."""
    from triton.runtime.jit import JITFunction

    from dpo_kernels.inputs import packing
    from dpo_kernels.kernels import torch_kernels
    from dpo_kernels.kernels.triton import backend, launch_matmul
    from dpo_kernels.planning import plan, refusals
    from dpo_kernels.planning.tables import divide_scratch

    assert isinstance(backend, ModuleType)  # imported before anything is patched
    stubs = Stubs(scored)
    with (
        patch.object(torch.Tensor, "is_cuda", property(lambda tensor: True)),
        patch.object(torch.cuda, "device", lambda device: _NoDevice()),
        patch.object(JITFunction, "run", lambda kernel, *given, **options: stubs.kernel(kernel, *given, **options)),
        patch.object(torch_kernels, "_matmul_into", stubs.gemm),
        patch.object(packing, "_on_the_host", stubs.sync(packing._on_the_host)),
        patch.object(launch_matmul, "target_of", lambda device: "sm_90"),
        patch.object(refusals, "refuse_triton_on", lambda *given, **facts: None),
        patch.object(plan, "refuse_triton_on", lambda *given, **facts: None),
        patch.object(plan, "divide_scratch", lambda size, name, dtype, device: divide_scratch(size, name, dtype, GPU)),
    ):
        yield stubs


class _NoDevice:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def step_of(
    pairs: int,
    length: int = 4,
    chunks: int = 1,
    *,
    trainable: bool = True,
    scores_reference: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    gradient: str = "dense",
) -> Callable[[], None]:
    """Return a forward and backward pass of DPO in 16 bits, with a cached reference or one that is scored in it."""
    vocab, width = 512, 64
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * pairs, length, width, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=g).to(dtype).requires_grad_(trainable)
    labels = torch.randint(0, vocab, (2 * pairs, length), generator=g)
    reference = {"ref_logps": torch.randn(2 * pairs, generator=g)}
    if scores_reference:
        reference = {"ref_hidden": hidden.detach().clone(), "ref_weight": weight.detach().clone()}
    tile_bytes = 2 * pairs * length // chunks * vocab * 6  # a quarter more is the workspace
    options = {"strategy": "chunked", "backend": "triton", "scratch_bytes": -(-tile_bytes * 4 // 3)}
    options["gradient"] = gradient

    def step() -> None:
        hidden.grad = weight.grad = None
        dk.fused_dpo_loss(hidden, weight, labels, **reference, **options).loss.backward()

    return step


class Cost(NamedTuple):
    """The launches of a step."""

    torch: Counter[str]  # by operation; a copy to the host counts
    ours: Counter[str]  # by kernel
    gemms: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.torch.total() + self.ours.total() + self.gemms


def cost(step: Callable[[], None], scored: int) -> Cost:
    """Return what a step launches, whose sequences have ``scored`` tokens each."""
    with on_a_gpu_of_stubs(scored) as stubs:
        step()  # what is loaded once
    with on_a_gpu_of_stubs(scored) as stubs, Launches() as seen:
        step()
    return Cost(seen.by_name + Counter({"copy to the host": stubs.copies}), stubs.kernels, stubs.gemms)


def seconds_to_first_gemm(step: Callable[[], None], scored: int, tries: int = 100) -> float:
    """Return the least time in a number of tries between the one sync of a call and its first matrix product."""
    found = []
    with on_a_gpu_of_stubs(scored) as stubs:
        for _ in range(tries):
            step()
            found.append(stubs.first_gemm - stubs.synced)
    return min(found)


def python_calls_to_first_gemm(step: Callable[[], None], scored: int) -> int:
    """Return how many functions Python calls in between, its own and built-in ones. It is the same on every machine."""
    calls = 0

    def called(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call") and bool(stubs.synced) and not stubs.first_gemm

    with on_a_gpu_of_stubs(scored) as stubs:
        step()  # what is loaded once
        stubs.synced = 0.0
        sys.setprofile(called)
        try:
            step()
        finally:
            sys.setprofile(None)
    return calls


def main() -> None:
    """Print the launches of one chunk and of more, and the time to the first product."""
    for chunks in (1, 2, 4):
        found = cost(step_of(8, 64, chunks), 64)
        print(f"{chunks} chunks: {found.total} launches, {found.gemms} of them GEMMs")
        print(f"  torch {dict(found.torch)}\n  ours {dict(found.ours)}")
    for pairs in (8, 256):
        step = step_of(pairs)
        microseconds = seconds_to_first_gemm(step, 4) / MICROSECOND
        calls = python_calls_to_first_gemm(step, 4)
        print(f"{pairs} pairs: {microseconds:.0f} us and {calls} calls of Python from the sync to the first GEMM")


if __name__ == "__main__":
    main()
