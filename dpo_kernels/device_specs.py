"""Published constants of GPUs, from which chunks are planned. Each entry names the source of its numbers.

No entry has been tuned on its hardware. ``benchmarks/model.py`` predicts times from the same numbers, and the pages
``docs/benchmarks/nvidia-*.md`` show the predictions. A measurement that contradicts a number replaces it.
"""

from dataclasses import replace

import torch

from dpo_kernels.records import dataclass

# This is the part of the tensor cores' peak that large GEMMs of a library reach. It comes from three bare GEMMs of
# N=8192, H=4096, V=151936, which took 42 ms on an H100 (huggingface/trl #7244).
EFFICIENCY = 0.736
# A library's GEMM of 16-bit operands computes tiles of this many rows on these GPUs. A part of a tile takes as long as
# a whole one.
TILE_ROWS = 128
# A further chunk reads and writes each float32 element of the weight's gradient, which moves this many bytes.
ACCUMULATION_BYTES = 8
# A row costs this many FLOP per element of the weight: 2 each for the logits, for d hidden and for d weight.
UNIT_FLOP = 6
# This is the speed of a kernel that keeps its logits in registers, relative to a library's GEMM. It is an assumption,
# on the low side of what plain Triton matmuls are said to reach. It is not measured.
STREAMING_EFFICIENCY = 0.7
# The GEMM writes a float32 logit and the reduction reads it, which moves this many bytes.
LOGIT_BYTES = 8


@dataclass(frozen=True)
class ChunkCosts:
    """What a chunk costs beyond its rows.

    With the defaults every further chunk is too expensive. The plan then has as few chunks as fit, of equal size.
    """

    tile_rows: int = 1  # a chunk costs as much as one of the next multiple of this many rows
    extra_chunk_cost_rows: int = 10**9  # a further chunk costs as much as this many rows


@dataclass(frozen=True)
class Gpu:
    """Constants of a GPU. Rates are those of SXM boards and of dense matrices, without sparsity."""

    name: str
    names: tuple[str, ...]  # that the driver reports; no other board is taken for this one
    tensor_flops: float  # FLOP/s of the tensor cores with 16-bit operands
    plain_flops: float  # FLOP/s in float32; torch leaves TF32 off by default
    bandwidth: float  # byte/s of the memory (HBM)
    source: str
    streaming_measured: bool = False  # whether STREAMING_EFFICIENCY was measured on this GPU

    @property
    def chunking(self) -> ChunkCosts:
        """Costs of a chunk on this GPU.

        A further chunk reads and writes the gradient of the weight once more. ``extra_chunk_cost_rows`` is the number
        of rows that could be computed in that time. H and V cancel out of it.
        """
        rows = ACCUMULATION_BYTES / self.bandwidth * EFFICIENCY * self.tensor_flops / UNIT_FLOP
        return ChunkCosts(TILE_ROWS, round(rows))

    @property
    def streaming_width(self) -> int:
        """Largest H for which log-probs alone stream: the predicted one where the kernel was measured, else 0.

        A plain Triton matmul may reach much less of a newer chip than of those it was written for. So the library's
        GEMM computes the logits until somebody has measured.
        """
        return self.predicted_streaming_width if self.streaming_measured else 0

    @property
    def predicted_streaming_width(self) -> int:
        """Largest H for which log-probs alone are predicted to be faster without logits in memory.

        The time of a logit's GEMM grows with H, and the time of its memory traffic does not. Up to this width the
        traffic costs more than the slower GEMM of the streaming kernel loses. N and V cancel out.
        """
        per_column = 2 / (EFFICIENCY * self.tensor_flops)
        lost = per_column / STREAMING_EFFICIENCY - per_column
        return int(LOGIT_BYTES / self.bandwidth / lost)


GPUS = {
    "A100": Gpu(
        "A100",
        ("NVIDIA A100-SXM4-80GB",),
        312e12,
        19.5e12,
        2.039e12,
        "A100 80GB SXM data sheet: 312 TFLOP/s in 16 bits, 19.5 TFLOP/s in float32, 2039 GB/s; "
        "prediction: docs/benchmarks/nvidia-a100.md",
    ),
    "H100": Gpu(
        "H100",
        ("NVIDIA H100 80GB HBM3",),
        989.4e12,
        67e12,
        3.35e12,
        "H100 SXM data sheet: 1979 TFLOP/s sparse / 2 in 16 bits, 67 TFLOP/s in float32, 3.35 TB/s; "
        "prediction: docs/benchmarks/nvidia-h100.md",
    ),
    "H200": Gpu(
        "H200",
        ("NVIDIA H200",),
        989.4e12,
        67e12,
        4.8e12,
        "H200 SXM data sheet: 1979 TFLOP/s sparse / 2 in 16 bits, 67 TFLOP/s in float32, 4.8 TB/s; "
        "prediction: docs/benchmarks/nvidia-h200.md",
    ),
}
# The chunks of a GPU without an entry are planned as if it were this one.
UNKNOWN = replace(GPUS["H100"], name="unknown", names=())


def gpu_of(name: str) -> Gpu | None:
    """Return the entry for a device name as the driver reports it, or None if there is no entry."""
    return next((gpu for gpu in GPUS.values() if name in gpu.names), None)


def gpu_at(device: torch.device) -> Gpu | None:
    """Return the entry for a device, ``UNKNOWN`` for a GPU without an entry, or None where there is no GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return gpu_of(torch.cuda.get_device_name(device)) or UNKNOWN
