"""What is known of GPUs: the constants that chunks are planned with, each entry with the source of its numbers.

No entry has been tuned on its hardware; ``benchmarks/model.py`` predicts with the same numbers, and the pages
``docs/benchmarks/nvidia-*.md`` say what they lead to. A measurement that contradicts one replaces it, and its source.
"""

from dataclasses import dataclass

import torch

# Part of the peak that a library's large GEMMs reach: three bare ones of N=8192, H=4096, V=151936 in 42 ms on an H100
# (huggingface/trl #7244).
EFFICIENCY = 0.736
# Rows of a library GEMM's tile of 16-bit operands on these GPUs; a part of one takes as long as a whole.
TILE_ROWS = 128
ACCUMULATION_BYTES = 8  # of each element of dW that a further chunk reads and writes, float32
UNIT_FLOP = 6  # of each element of dW for a row: logits, dX and dW
# A kernel that keeps its logits in registers, against a library's GEMM: an assumption, on the low side of what plain
# Triton matmuls are said to reach; not measured.
STREAMING_EFFICIENCY = 0.7
LOGIT_BYTES = 8  # a float32 logit, written by the GEMM and read by the reduction


@dataclass(frozen=True)
class ChunkCosts:
    """What a chunk costs beyond its rows; without either the fewest chunks are best, and even ones."""

    tile_rows: int = 1  # a chunk costs as much as the next multiple of these
    extra_chunk_cost_rows: int = 10**9  # in rows that could be computed instead


@dataclass(frozen=True)
class Gpu:
    """Constants of a GPU (dense, without sparsity; SXM boards)."""

    name: str
    tensor_flops: float  # FLOP/s of 16-bit tensor cores
    plain_flops: float  # FLOP/s of float32 without TF32, which torch leaves off
    bandwidth: float  # of HBM, byte/s
    source: str

    @property
    def chunking(self) -> ChunkCosts:
        """A chunk more costs the traffic of dW, in rows that could be computed instead; H and V cancel out."""
        rows = ACCUMULATION_BYTES / self.bandwidth * EFFICIENCY * self.tensor_flops / UNIT_FLOP
        return ChunkCosts(TILE_ROWS, round(rows))

    @property
    def streaming_width(self) -> int:
        """The largest H for which log-probs alone are faster without logits in memory; N and V cancel out.

        The GEMM's time grows with H and the traffic of a logit does not: below this, the traffic is more than what the
        slower GEMM loses.
        """
        per_column = 2 / (EFFICIENCY * self.tensor_flops)
        lost = per_column / STREAMING_EFFICIENCY - per_column
        return int(LOGIT_BYTES / self.bandwidth / lost)


GPUS = {
    "A100": Gpu(
        "A100",
        312e12,
        19.5e12,
        2.039e12,
        "A100 80GB SXM data sheet: 312 TFLOP/s, 19.5, 2039 GB/s; prediction: docs/benchmarks/nvidia-a100.md",
    ),
    "H100": Gpu(
        "H100",
        989.4e12,
        67e12,
        3.35e12,
        "H100 SXM data sheet: 1979 TFLOP/s sparse / 2, 67, 3.35 TB/s; prediction: docs/benchmarks/nvidia-h100.md",
    ),
    "H200": Gpu(
        "H200",
        989.4e12,
        67e12,
        4.8e12,
        "H200 SXM data sheet: 1979 TFLOP/s sparse / 2, 67, 4.8 TB/s; prediction: docs/benchmarks/nvidia-h200.md",
    ),
}
UNKNOWN = GPUS["H100"]  # of a GPU without an entry


def gpu_of(name: str) -> Gpu | None:
    """The entry for a device's name as the driver reports it."""
    return next((gpu for key, gpu in GPUS.items() if key in name), None)


def gpu_at(device: torch.device) -> Gpu | None:
    """The entry for a device; None where there is no GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return gpu_of(torch.cuda.get_device_name(device)) or UNKNOWN
