"""Triton kernels compiled for GPUs that this machine need not have, and what their machine code holds.

``compile_for`` takes a launch's own way: a stand-in driver names the target, and ``warmup`` takes a dtype where a
launch takes a tensor, so that integers and pointers are specialised as a launch specialises them. ``measure`` reads the
result with the tools in Triton's wheel. To be imported in a process without ``TRITON_INTERPRET``.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, MockTensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.triton_tools.configurations import Configuration, Matrix

KiB = 1024


class Target(NamedTuple):
    """A GPU to compile for."""

    backend: str
    arch: int | str
    warp: int
    shared_cap: int  # bytes of shared memory that one program may ask for; Triton checks it at the launch alone
    matrix: str  # the matrix instruction that its peak rate needs

    @property
    def approximate(self) -> tuple[str, ...]:
        """The instructions with errors that tests/triton_tools/gpu_arithmetic.py models, or that are more accurate."""
        if self.backend == "cuda":
            return ("ex2.approx.f32", "ex2.approx.ftz.f32", "div.full.f32")
        return ("v_exp_f32", "v_rcp_f32")  # a quotient corrects the reciprocal until it is rounded right


# The caps: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; the LDS of CDNA3 has 64 KiB,
# and that of CDNA4 160 KiB. What holds for sm_86 holds for sm_89 as well.
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * KiB, "mma.sync"),
    "sm_86": Target("cuda", 86, 32, 99 * KiB, "mma.sync"),
    "sm_90": Target("cuda", 90, 32, 227 * KiB, "wgmma"),
    "sm_100": Target("cuda", 100, 32, 227 * KiB, "tcgen05"),
    "sm_103": Target("cuda", 103, 32, 227 * KiB, "tcgen05"),
    "sm_120": Target("cuda", 120, 32, 99 * KiB, "mma.sync"),
    "gfx942": Target("hip", "gfx942", 64, 64 * KiB, "mfma"),
    "gfx950": Target("hip", "gfx950", 64, 160 * KiB, "mfma"),
}


@dataclass(frozen=True)
class Measured:
    """Static facts about one compiled kernel. An MMA loop is an innermost loop with matrix instructions."""

    registers: int  # a thread's
    stack_bytes: int  # a thread's
    shared_bytes: int  # a program's
    tensor_columns: int  # a program's, of Blackwell's tensor memory
    matrix: dict[str, int]  # matrix instructions by kind
    loops: int  # MMA loops
    local: int  # loads and stores of local memory: spills, mostly
    local_in_loops: int  # those in MMA loops
    async_copies: int  # from global to shared memory, by cp.async or TMA
    loads_in_loops: int  # loads from global memory to registers in MMA loops
    prefetched: bool  # AMD: what the MMA loop loads is for a later round of it
    widest_bits: int  # of one thread's access to global memory; 0 where there is none but TMA's
    narrow: int  # accesses to global memory of 16 bits and fewer
    approximate: dict[str, int]  # instructions that round worse than IEEE 754, but for those of float64


class Instruction(NamedTuple):
    """A line of machine code; ``jump`` is the label that it may jump to."""

    name: str
    jump: str | None


# --- compiling ----------------------------------------------------------------------------------------------


class _StandIn(DriverBase):
    """What ``JITFunction.run`` asks of a driver before it launches."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.target = GPUTarget(*TARGETS[name][:3])

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return self.name  # the key of Triton's caches: one for each target

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        raise RuntimeError("no GPU stands behind this driver")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("no GPU stands behind this driver")


def compile_for(configuration: Configuration, target: str) -> Any:
    """The ``CompiledKernel`` of a launch of ``configuration`` on ``target``. Raises whatever the compiler raises."""
    kernel = configuration.kernel
    if not isinstance(kernel, JITFunction):
        raise TypeError(f"expected a @triton.jit function as the kernel, got {type(kernel).__name__}")
    wrong = set(kernel.arg_names) ^ set(configuration.arguments)
    if wrong:
        raise ValueError(f"the configuration and the kernel disagree on the parameters {', '.join(sorted(wrong))}")
    before = driver._active
    driver.set_active(_StandIn(target))
    try:
        arguments = [_passed(name, configuration) for name in kernel.arg_names]
        return kernel.warmup(*arguments, grid=(1,), **configuration.options)
    finally:
        driver._active = before


def _passed(name: str, configuration: Configuration) -> Any:
    """An argument as ``warmup`` takes it."""
    value = configuration.arguments[name]
    if not isinstance(value, Matrix):
        return value
    launch = configuration.arguments
    block = [launch["BLOCK_N" if name == "x_ptr" else "BLOCK_V"], launch["BLOCK_H"]]
    shape = [value.rows, value.cols]
    return TensorDescriptor(MockTensor(value.dtype, shape), shape, [value.cols, 1], block)


# --- measuring ----------------------------------------------------------------------------------------------


def measure(compiled: Any, target: str) -> Measured:
    """What the machine code of a kernel compiled for ``target`` holds."""
    if TARGETS[target].backend == "cuda":
        return _measure_nvidia(compiled)
    return _measure_amd(compiled)


def mma_loops(lines: Iterable[str | Instruction], is_matrix: re.Pattern[str]) -> list[list[str]]:
    """Names of the instructions of every MMA loop; ``lines`` holds labels (strings) and instructions in order."""
    places: dict[str, int] = {}
    instructions: list[Instruction] = []
    for line in lines:
        if isinstance(line, Instruction):
            instructions.append(line)
        else:
            places[line] = len(instructions)
    found: list[tuple[int, int]] = []
    spans = {(places.get(line.jump or "", at + 1), at + 1) for at, line in enumerate(instructions)}
    for begin, end in sorted((span for span in spans if span[0] < span[1]), key=lambda span: span[1] - span[0]):
        holds = any(is_matrix.match(line.name) for line in instructions[begin:end])
        if holds and not any(begin < inner_end and inner_begin < end for inner_begin, inner_end in found):
            found.append((begin, end))
    return [[line.name for line in instructions[begin:end]] for begin, end in sorted(found)]


SASS_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)(.*)")
SASS_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
SASS_MATRIX = re.compile(r"(?P<wgmma>[A-Z]GMMA)|(?P<tcgen05>UTC[A-Z]*MMA)|(?P<mma>[A-Z]MMA)")
SASS_KINDS = {"wgmma": "wgmma", "tcgen05": "tcgen05", "mma": "mma.sync"}
SASS_ASYNC = re.compile(r"LDGSTS|UTMALDG|UBLKCP")
SASS_LOCAL = re.compile(r"(?:LDL|STL)\b")
SASS_LOAD = re.compile(r"LDG\b")
SASS_GLOBAL = re.compile(r"(?:LDG|STG|LDGSTS)\b")


def sass(cubin: bytes) -> list[str | Instruction]:
    """Labels and instructions of a cubin, by nvdisasm."""
    lines: list[str | Instruction] = []
    for line in _tool("nvdisasm", cubin, "-c").splitlines():
        label, code = SASS_LABEL.match(line), SASS_LINE.match(line)
        if label:
            lines.append(label[1])
        elif code:
            jump = re.search(r"\.L_x_\d+", code[2])
            lines.append(Instruction(code[1], jump[0] if jump and code[1].startswith("BRA") else None))
    return lines


PTX_APPROXIMATE = re.compile(r"\b\w+\.(?:approx|full)(?:\.ftz)?\.(?:f32|f16x?2?|bf16x?2?)\b")


def _measure_nvidia(compiled: Any) -> Measured:
    used = _tool("cuobjdump", compiled.asm["cubin"], "--dump-resource-usage")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", used).groups()
    lines = sass(compiled.asm["cubin"])
    names = [line.name for line in lines if isinstance(line, Instruction)]
    loops = mma_loops(lines, SASS_MATRIX)
    inside = [name for loop in loops for name in loop]
    kinds = [SASS_KINDS[found.lastgroup] for name in names if (found := SASS_MATRIX.match(name))]
    return Measured(
        registers=int(registers),
        stack_bytes=int(stack),
        shared_bytes=compiled.metadata.shared,
        tensor_columns=getattr(compiled.metadata, "tmem_size", None) or 0,
        matrix=dict(Counter(kinds)),
        loops=len(loops),
        local=_count(SASS_LOCAL, names),
        local_in_loops=_count(SASS_LOCAL, inside),
        async_copies=_count(SASS_ASYNC, names),
        loads_in_loops=_count(SASS_LOAD, inside),
        prefetched=False,
        widest_bits=max((_sass_bits(name) for name in names if SASS_GLOBAL.match(name)), default=0),
        narrow=sum(_sass_bits(name) <= 16 for name in names if SASS_GLOBAL.match(name)),
        approximate=dict(sorted(Counter(PTX_APPROXIMATE.findall(compiled.asm["ptx"])).items())),
    )


def _sass_bits(name: str) -> int:
    """``LDG.E.128.CONSTANT`` is 128 bits wide, ``STG.E.U16`` 16; a plain ``LDG.E`` 32."""
    sizes = [part.lstrip("US") for part in name.split(".") if re.fullmatch(r"[US]?(8|16)|64|128|256", part)]
    return int(sizes[0]) if sizes else 32


GCN_LINE = re.compile(r"^\s+([a-z]\w+)(.*)")
GCN_LABEL = re.compile(r"^(\.L\w+):")
GCN_MATRIX = re.compile(r"v_s?mfma")
GCN_LOCAL = re.compile(r"scratch_(?:load|store)|buffer_(?:load|store)\w*_offset_scratch")
GCN_LOAD = re.compile(r"(?:global|buffer|flat)_load")
GCN_APPROXIMATE = re.compile(r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_f(?:32|16)")
GCN_GLOBAL = re.compile(r"(?:global|buffer|flat)_(?:load|store)_(?:dwordx?(?P<words>\d?)|[us]?(?P<part>byte|short))")


def _measure_amd(compiled: Any) -> Measured:
    text = compiled.asm["amdgcn"]
    lines: list[str | Instruction] = []
    for line in text.splitlines():
        label, code = GCN_LABEL.match(line), GCN_LINE.match(line)
        if label:
            lines.append(label[1])
        elif code:
            jump = re.search(r"\.L\w+", code[2])
            lines.append(Instruction(code[1], jump[0] if jump and "branch" in code[1] else None))
    names = [line.name for line in lines if isinstance(line, Instruction)]
    loops = mma_loops(lines, GCN_MATRIX)
    inside = [name for loop in loops for name in loop]
    matrix = _count(GCN_MATRIX, names)
    return Measured(
        registers=_number(text, "vgpr_count"),
        stack_bytes=_number(text, "private_segment_fixed_size"),
        shared_bytes=compiled.metadata.shared,
        tensor_columns=0,
        matrix={"mfma": matrix} if matrix else {},
        loops=len(loops),
        local=_count(GCN_LOCAL, names),
        local_in_loops=_count(GCN_LOCAL, inside),
        async_copies=0,
        loads_in_loops=_count(GCN_LOAD, inside),
        prefetched=_prefetched(compiled.asm["ttgir"]),
        widest_bits=max((_gcn_bits(name) for name in names), default=0),
        narrow=sum(0 < _gcn_bits(name) <= 16 for name in names),
        approximate=dict(sorted(Counter(f[0] for name in names if (f := GCN_APPROXIMATE.match(name))).items())),
    )


TTGIR_LOAD = re.compile(r"(%[\w#]+) = (?:tt\.load|\w+\.buffer_load) ")
TTGIR_FILLED = re.compile(r"= ttg\.local_alloc (%[\w#]+) :")


def _prefetched(ttgir: str) -> bool:
    """Whether loads reach shared memory by a store into a buffer that outlives the round, and none into one of its own.

    AMD's loads go through registers even when pipelined: the machine code does not tell whose round they are for.
    """
    at_once = set(TTGIR_LOAD.findall(ttgir)) & set(TTGIR_FILLED.findall(ttgir))
    return "ttg.local_store" in ttgir and not at_once


def _gcn_bits(name: str) -> int:
    access = GCN_GLOBAL.match(name)
    if access is None:
        return 0
    if access["part"]:
        return {"byte": 8, "short": 16}[access["part"]]
    return 32 * int(access["words"] or 1)


def _number(text: str, key: str) -> int:
    """A number in the metadata of AMD's assembly."""
    return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])


def _count(pattern: re.Pattern[str], names: list[str]) -> int:
    return sum(1 for name in names if pattern.match(name))


def _tool(name: str, cubin: bytes, flag: str) -> str:
    """What one of the tools in Triton's wheel prints about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin" / name, flag, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
