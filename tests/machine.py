"""What a reader of a test report needs to know of the machine that wrote it, and the CPU paths that a run can take."""

import functools
import os
import platform

import numpy
import torch

from benchmarks import environment
from dpo_kernels.kernels import extension, installed

SEED = 0  # of torch's generator before every test
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
INSTRUCTION_SETS = ("base", "avx2", "avx512")  # from the least to the best, as csrc/cpu/passes.h orders them
BY_INSTRUCTIONS = ("amx", "avx512_bf16", "brgemm")  # ways to multiply bfloat16: two of ours, and torch's


@functools.cache
def processor() -> tuple[str, tuple[str, ...]]:
    """Name of the CPU, and those of its features that decide which code runs."""
    name, flags = environment.processor()
    return name, tuple(flag for flag in CPU_FLAGS if flag in flags)


def row_instruction_set() -> str | None:
    """The instruction set of the C++ row passes in this process; None without the extension."""
    return None if extension.why_not("cpu") is not None else str(torch.ops.dpo_kernels.row_instruction_set())


def bfloat16_product() -> str | None:
    """How the C++ backend multiplies bfloat16: one of ``BY_INSTRUCTIONS``, "portable" or "float32"."""
    return None if extension.why_not("cpu") is not None else str(torch.ops.dpo_kernels.bfloat16_product())


def products_by_instructions() -> list[str]:
    """Those of ``BY_INSTRUCTIONS`` that are sure to run here; none where this process was held to less.

    A CPU with AMX does not tell whether Linux gives its registers to a process, so AMX counts where it is in use.
    """
    here, (_, flags) = bfloat16_product(), processor()
    if here not in BY_INSTRUCTIONS:
        return []
    others = {"brgemm", *({"avx512_bf16"} & set(flags))}
    return [name for name in BY_INSTRUCTIONS if name == here or name in others]


def lesser_instruction_sets() -> list[str]:
    """Those that the extension can be held to and that this process does not use already."""
    here = row_instruction_set()
    return [] if here is None else list(INSTRUCTION_SETS[: INSTRUCTION_SETS.index(here)])


def description() -> list[str]:
    """Lines for the head of a run and for the report of every test that fails."""
    name, flags = processor()
    if (missing := extension.why_not("cpu")) is not None:
        rows = f"no C++ extension: {missing}"
    else:
        product = bfloat16_product()
        how = f"as {product!r}, " + (
            "by this CPU's instructions" if product in BY_INSTRUCTIONS else "without bfloat16 instructions"
        )
        rows = f"C++ rows for {row_instruction_set()}; bfloat16 matrices are multiplied {how}"
    asked = {key: os.environ[key] for key in ("DPO_KERNELS_ISA", "DPO_KERNELS_BF16") if os.environ.get(key)}
    triton = installed.triton_version() or "none"
    return [
        f"cpu: {name}, {os.cpu_count()} cores ({' '.join(flags) or 'none of the features that are looked for'})",
        f"paths: {rows}" + (f"; asked for {asked}" if asked else ""),
        f"torch {torch.__version__} ({torch.get_num_threads()} threads, OMP_NUM_THREADS="
        f"{os.environ.get('OMP_NUM_THREADS', 'unset')}, CUDA {'is there' if torch.cuda.is_available() else 'is not'}), "
        f"triton {triton}, numpy {numpy.__version__}, Python {platform.python_version()}, seed {SEED}",
    ]
