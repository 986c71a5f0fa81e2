"""What a step costs: FLOP of its GEMMs and its largest allocation."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class Allocations(TorchDispatchMode):
    """Storages that operations make, largest first."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, tuple[int, tuple[int, ...]]] = {}
        self.kept: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:  # the parts of others are tensors too
                storage = leaf.untyped_storage()
                self.sizes.setdefault(storage._cdata, (storage.nbytes(), tuple(leaf.shape)))
                self.kept.append(leaf)  # a freed storage's address would be used again
        return out

    def largest(self, besides=()):
        """(bytes, shape) of the largest, of which the tensors ``besides`` are none."""
        given = {tensor.untyped_storage()._cdata for tensor in besides}
        return max(size for storage, size in self.sizes.items() if storage not in given)


def costs(call, besides=()):
    """(GEMM FLOPs, largest allocation) of a forward and backward. The caller's tensors ``besides`` do not count."""
    with FlopCounterMode(display=False) as flops, Allocations() as allocations:
        loss = call()
        if loss.requires_grad:
            loss.sum().backward()
    return flops.get_total_flops(), allocations.largest(besides)


MEASURE = """
import json, sys, torch
import dpo_kernels as dk

pairs, length, scratch_mib = map(int, sys.argv[1:])
torch.set_num_threads(1)
N, H, V = 2 * pairs * length, 256, 49152
hidden = torch.randn(2 * pairs, length, H).requires_grad_()
weight = torch.randn(V, H).mul_(0.05).requires_grad_()
labels = torch.randint(0, V, (2 * pairs, length))
# What is loaded once is loaded here.
small = dk.fused_dpo_loss(hidden[:, :1], weight[:64], labels[:, :1] % 64, reference_free=True)
small.loss.backward()
hidden.grad = weight.grad = None


def resident(field):
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(field)).split()[1]) * 1024


before = resident("VmRSS")
out = dk.fused_dpo_loss(hidden, weight, labels, reference_free=True, scratch_bytes=scratch_mib * 2**20)
out.loss.backward()
peak = resident("VmHWM")  # getrusage would count what the parent held before exec
print(json.dumps({
    "extra": peak - before,
    "gradients": hidden.grad.nbytes + weight.grad.nbytes,
    "finite": bool(hidden.grad.isfinite().all() and weight.grad.isfinite().all()),
}))
"""


def measure(pairs, length, scratch_mib):
    """Peak of one step in a process of its own, and whether its gradients are finite."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(pairs), str(length), str(scratch_mib)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=600,
    )
    return json.loads(done.stdout)
