"""How large a scratch the free memory of a GPU allows: the default, and what an out-of-memory error recommends.

The default is chosen once for a model in a process and stays, since sizes that change would fragment the allocator, and
asking the driver takes time while the GPU waits. After an out-of-memory error the next call looks again.
"""

from collections.abc import Callable, Iterator

import torch

from dpo_kernels.planning.memory_budget import MIB, default_scratch_bytes
from dpo_kernels.problem import Workload

# The default is halved at most so often: 64 MiB of 2 GiB. A call with less would be very slow, and an error says more.
MOST_HALVINGS = 5
# An error recommends no scratch below this but 0. In between there are tiles of a few rows, which are as slow.
LEAST_RECOMMENDED_BYTES = 1 * MIB

# The bytes that a call with a scratch of so many bytes takes, or None if it cannot be planned.
Peak = Callable[[int], int | None]
_chosen: dict[tuple[object, ...], int] = {}


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that a CUDA device can still give: free ones, and those that torch's allocator can reuse.

    A process that was given a fraction of the device's memory gets no more than that. None stands for an allocator that
    is not torch's own: what it keeps for later cannot be told.
    """
    if torch.cuda.get_allocator_backend() == "pluggable":
        return None
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    share = int(total * torch.cuda.get_per_process_memory_fraction(device)) - reserved
    return min(free, share) + reserved - torch.cuda.memory_allocated(device)


def scratch_by_default(workload: Workload, peak_of: Peak) -> int:
    """Return the default scratch in bytes: the device's, halved until the call fits the free memory.

    Only a size that fits is kept for the model. Where none does, the call takes the least with which it can be planned,
    and the next one looks again. A call that will be refused chooses nothing.

    Ranks that share work must have the same chunks, so they do not look at their own memory. Neither does a tracer, nor
    a capture of a CUDA graph.
    """
    shared = max(workload.shard_ranks, workload.context_ranks) > 1
    if workload.device.type != "cuda" or workload.tracing or shared:
        return default_scratch_bytes(workload.device)
    model = (workload.device, workload.vocab, workload.width, workload.dtype, workload.needs_grad)
    if model in _chosen:
        return _chosen[model]
    most = default_scratch_bytes(workload.device)
    if not torch.cuda.is_available():
        return most
    with torch.cuda.device(workload.device):
        if torch.cuda.is_current_stream_capturing():
            return most
    free = free_bytes(workload.device)
    if free is None:
        return most
    sizes = [most >> halvings for halvings in range(MOST_HALVINGS + 1)]
    fitting = _largest_that_fits(iter(sizes), peak_of, free)
    if fitting is None:
        return next((size for size in reversed(sizes) if peak_of(size) is not None), most)
    _chosen[model] = fitting[0]
    return fitting[0]


def forget() -> None:
    """Let the next calls look at the free memory again."""
    _chosen.clear()


def recommended(scratch_bytes: int, device: torch.device, peak_of: Peak, ranks: int) -> str:
    """Return what to say of an out-of-memory error of a call: a smaller scratch that fits the free memory, or none.

    Args:
        scratch_bytes: the scratch of the call.
        device: a CUDA device whose memory the call no longer holds.
        peak_of: says what a call takes with another scratch.
        ranks: the number of ranks that share the call's work, or 0.

    """
    free, this_one = free_bytes(device), f"this call had scratch_bytes={scratch_bytes}"
    if free is None:
        return f"dpo_kernels: {this_one}, and a smaller one takes less memory"
    fitting = _largest_that_fits(_smaller(scratch_bytes), peak_of, free)
    if fitting is None:
        least = peak_of(0) or peak_of(scratch_bytes)
        takes = "" if least is None else f"without scratch the call takes {least / MIB:.0f} MiB beside its inputs, "
        return (
            f"dpo_kernels: no scratch_bytes would run: {takes}and {free / MIB:.0f} MiB are free. A frozen head, "
            "main_grad or fewer tokens take less"
        )
    size, peak = fitting
    everywhere = " on every rank" if ranks > 1 else ""
    return (
        f"dpo_kernels: scratch_bytes={size}{everywhere} would run: the call then takes {peak / MIB:.0f} MiB beside its "
        f"inputs, and {free / MIB:.0f} MiB are free ({this_one})"
    )


def _smaller(scratch_bytes: int) -> Iterator[int]:
    while (scratch_bytes := scratch_bytes // 2) >= LEAST_RECOMMENDED_BYTES:
        yield scratch_bytes
    yield 0


def _largest_that_fits(sizes: Iterator[int], peak_of: Peak, free: int) -> tuple[int, int] | None:
    """Return the first of the sizes with which a call fits ``free`` bytes, and what it then takes."""
    for size in sizes:
        peak = peak_of(size)
        if peak is not None and peak <= free:
            return size, peak
    return None
