"""The static model of a step with sparse gradients: ``python -m benchmarks.sparse_model`` prints the predictions.

The kernels are those of the Triton backend, in the terms of ``model.py``. The logits and their sums are as in a dense
step. The tile is read twice for the sample. Each kept entry then reads a row of the head and a row of X. How many
entries are kept is told, not predicted. Rows of the head come from the memory. Rows of X come from the second-level
cache where a chunk of X fits it.

Three numbers are assumptions, and are not measured: ``CACHE_RATE``, ``SORT_BYTES`` and ``EMPTY_PROGRAM_SECONDS``.
"""

from dataclasses import replace

import torch

from benchmarks.cases import CASES, Case
from benchmarks.model import IDLE_SECONDS, MS, Work, chunk_rows, floor, ours_chunked
from dpo_kernels.device_specs import GPUS, STREAMING_EFFICIENCY, Gpu
from dpo_kernels.kernels.sampling import most_entries
from dpo_kernels.kernels.torch_kernels import most_sampled_on_gpus

# Entries of a token for Llama's head, which nobody has counted. SmolLM2-135M keeps 588 of 49,152 on average at the
# default tau. More than 1/128 of them are given up in 16 bits, and 233 at the larger tau are not.
KEPT = 400
KEPT_OF_SMALL, TAU_OF_SMALL = 233, 2.0**-10
CACHE_RATE = 2.5  # of the second-level cache, over that of the memory
CACHE_BYTES = {"A100": 40e6, "H100": 50e6, "H200": 50e6}  # of the data sheets
# Places of 8 bytes are written. Four passes of a radix sort read and write a key of 4 bytes and a place, and one more
# counts the keys.
SORT_BYTES = 8 + 4 * 2 * 12 + 4
EMPTY_PROGRAM_SECONDS = 2e-9  # of a program that reads a flag and ends
ROW_COLUMNS, PRODUCT_TILE = 4096, 128  # that a program of the exact gradient and of its products handles


def launches_of_sparse(chunks: int, dtype: str = "bfloat16") -> int:
    """Launches of a 16-bit step with a trainable head and a cached reference, forward and backward.

    ``tests/kernels/test_host_path.py`` counts them on the Triton backend.
    """
    further = chunks - 1
    return 48 + 29 * further + 2 * (further > 0) + (4 * chunks if dtype == "float16" else 0)


def share_sampled(case: Case) -> float:
    """The part of a tile above which the Triton backend gives a sample up."""
    return most_sampled_on_gpus(getattr(torch, case.dtype))


def ours_sparse(case: Case, gpu: Gpu, kept: float = KEPT, tau: float = 2.0**-12, taken: bool = True) -> Work:
    """A chunked step of a trainable head with a cached reference, whose samples are all taken or all given up."""
    work, h, v = Work(gpu, 4 if case.dtype == "float32" else 2), case.hidden, case.vocab
    number = -(-case.tokens // chunk_rows(case))
    for at in range(number):
        c = case.tokens * (at + 1) // number - case.tokens * at // number
        work.gemm("logits", c, v, h, out=4)
        work.sweep("reduce", c * v, 4)
        work.sweep("count the sample", c * v, 4)
        if taken:
            work.sweep("write the sample", c * v, 4)
        _, capacity = most_entries(c, v, share_sampled(case), tau)
        work.sweep("sort the entries", capacity, SORT_BYTES)
        if taken:
            _of_a_sample(work, case, c, kept, add=at > 0)
        else:
            work.sweep("gradient", c * v, 4 + work.item)
            work.gemm("dX", c, h, v, out=4, share=STREAMING_EFFICIENCY)
            work.gemm("dW", v, h, c, out=4, add=at > 0, share=STREAMING_EFFICIENCY)
    work.sweep("round dW", v * h, 4 + work.item)
    work.sweep("pack rows", case.tokens * h, 4 * work.item)
    work.small("small kernels", max(0, launches_of_sparse(number, case.dtype) - work.launches))
    work.wait("host", IDLE_SECONDS)
    return work


def _of_a_sample(work: Work, case: Case, rows: int, kept: float, add: bool) -> None:
    """Both sums of kept rows, and the kernels of the exact gradient, whose programs find nothing to do."""
    h, v, row = case.hidden, case.vocab, case.hidden * work.item
    work.sweep("rows of the head for dX", 1, rows * (kept * row + 4 * h))
    in_cache = rows * row <= CACHE_BYTES[work.gpu.name]
    work.sweep("rows of X for dW", 1, rows * kept * row / (CACHE_RATE if in_cache else 1.0))
    work.sweep("write dW", v * h, 8 if add else 4)
    programs = rows * -(-v // ROW_COLUMNS) + -(-h // PRODUCT_TILE) * (-(-rows // PRODUCT_TILE) + -(-v // PRODUCT_TILE))
    work.wait("empty programs", programs * EMPTY_PROGRAM_SECONDS)


def break_even(case: Case, gpu: Gpu) -> float:
    """The kept entries of a token, as a part of the vocabulary, at which giving the sample up takes as long."""
    none, one = (ours_sparse(case, gpu, kept).seconds for kept in (0.0, 1.0))
    return (ours_sparse(case, gpu, taken=False).seconds - none) / (one - none) / case.vocab


def llama() -> Case:
    """Llama 3 8B's head, 8192 scored tokens, bfloat16, trainable, with a cached reference."""
    shape = next(case for case in CASES.values() if (case.device, case.hidden, case.vocab) == ("cuda", 4096, 128256))
    return replace(shape, reference="cached", trainable=True, dtype="bfloat16", tokens=8192)


def small(width: int) -> Case:
    """The same with the vocabulary of SmolLM2, whose entries were counted, and a width."""
    return replace(llama(), vocab=49152, hidden=width)


def times_of_small(gpu: Gpu, width: int) -> list[float]:
    """Times over the floor with that vocabulary: dense, taken with the larger tau, given up with the default."""
    case = small(width)
    ways = [ours_chunked(case, gpu), ours_sparse(case, gpu, KEPT_OF_SMALL, TAU_OF_SMALL)]
    ways.append(ours_sparse(case, gpu, taken=False))
    return [work.seconds / floor(case, gpu).seconds for work in ways]


def main() -> None:
    """Print, by GPU and case, times over the floor, what they are made of, and when a sample is better given up."""
    case = llama()
    print(f"N={case.tokens} H={case.hidden} V={case.vocab} bfloat16, over the floor of three GEMMs")
    for gpu in GPUS.values():
        least = floor(case, gpu).seconds
        ways = {"dense": ours_chunked(case, gpu)}
        ways |= {f"{kept} kept": ours_sparse(case, gpu, kept) for kept in (200, KEPT, 600)}
        ways["given up"] = ours_sparse(case, gpu, taken=False)
        times = ", ".join(f"{name} {work.seconds / least:.2f}" for name, work in ways.items())
        pays = f"giving up pays from 1/{1 / break_even(case, gpu):.0f} of V"
        print(f"{gpu.name}: {times}; {pays}; floor {least * MS:.1f} ms")
        for width in (576, 4096):
            dense, taken, given_up = times_of_small(gpu, width)
            kept = f"{KEPT_OF_SMALL} kept {taken:.2f}"
            print(f"  V=49152 H={width}: dense {dense:.2f}, {kept}, given up {given_up:.2f}")
        steps = sorted(ways[f"{KEPT} kept"].steps.items(), key=lambda step: -step[1])
        print("  " + ", ".join(f"{name} {seconds * MS:.2f} ms" for name, seconds in steps))


if __name__ == "__main__":
    main()
