"""The CUDA kernels and their launchers, compiled by g++ and run on emulated threads (``emulated.h``)."""

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dpo_kernels.kernel_interface import RowState

TOOLS = Path(__file__).resolve().parent
KERNELS = TOOLS.parents[1] / "csrc" / "cuda"
COMPILE = (
    *("g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DDPO_KERNELS_EMULATED"),
    "-fno-gnu-unique",  # or several of these libraries in one process would share their variables
)
# Misaligned vectors, overflowing integers and the like become reports; -fwrapv would hide some of them.
CHECKED = ("-O1", "-g", "-fsanitize=undefined", "-fno-wrapv")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # launch.h's DType

HAS_COMPILER = sys.platform == "linux" and shutil.which("g++") is not None
NO_COMPILER = "there is no g++, or this is not Linux"


class EmulationError(AssertionError):
    """A kernel did what it must not do on a GPU."""


def includes(kernels: Path) -> list[str]:
    """Options that find the kernels and the stand-in for CUDA."""
    return [f"-I{kernels}", f"-I{TOOLS}"]


def mutated(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of the kernels in ``folder`` with the first ``old`` of ``file`` replaced."""
    shutil.copytree(KERNELS, folder)
    source = (folder / file).read_text(encoding="utf-8")
    if old not in source:
        raise ValueError(f"{file} has no {old!r} to mutate")
    (folder / file).write_text(source.replace(old, new, 1), encoding="utf-8")
    return folder


def compile_object(source: Path, into: Path, *options: str) -> Path:
    """Compile one file."""
    subprocess.run([*COMPILE, "-fPIC", *options, "-c", source, "-o", into], check=True, timeout=300)
    return into


def compile_fibers(folder: Path) -> Path:
    """The emulated threads, the same for every set of kernels."""
    return compile_object(TOOLS / "fibers.cpp", folder / "fibers.o", "-O1", *includes(KERNELS))


class Emulated:
    """The launchers of ``launch.h`` on CPU tensors; raises EmulationError where a thread does what it must not.

    ``fibers`` is what ``compile_fibers`` made. A library that lies in ``folder`` already is used as it is.
    """

    def __init__(self, folder: Path, fibers: Path, kernels: Path = KERNELS, options: Sequence[str] = CHECKED) -> None:
        source, library = TOOLS / "emulated.cpp", folder / "emulated.so"
        if not library.exists():
            compile_object(source, folder / "emulated.o", *options, *includes(kernels))
            # Without -fsanitize: fibers.cpp has handlers of its own.
            subprocess.run(["g++", "-shared", folder / "emulated.o", fibers, "-o", library], check=True, timeout=300)
        self._library = ctypes.CDLL(str(library))

    def order(self, order: int) -> None:
        """Of warps, lanes and blocks: 0 ascending, 1 descending, more is a seed."""
        self._library.emulated_order(ctypes.c_uint(order))

    def apply_bias_scale_cap(self, tile: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> None:
        shape = (*tile.shape, tile.stride(0))
        self._call("apply_bias_scale_cap", DTYPES[tile.dtype], tile, *shape, bias, scale, softcap or 0.0)

    def reduce_rows(self, tile: Tensor, labels: Tensor, start: int, state: RowState) -> None:
        self._call(
            "reduce_rows",
            DTYPES[tile.dtype],
            tile,
            *tile.shape,
            tile.stride(0),
            start,
            labels,
            state.max,
            state.others,
            state.target,
            state.entropy,
            state.logit_sum,
            state.argmax,
            state.square_sum,
        )

    def dlogits_rows(
        self,
        tile: Tensor,
        out: Tensor | None,
        labels: Tensor,
        start: int,
        max_C: Tensor,
        others_C: Tensor,
        scale_C: Tensor | None,
        residual_C: Tensor | None,
        softcap: float | None,
    ) -> None:
        to = tile if out is None else out
        self._call(
            "dlogits_rows",
            DTYPES[tile.dtype],
            tile,
            tile.stride(0),
            DTYPES[to.dtype],
            to,
            to.stride(0),
            *tile.shape,
            start,
            labels,
            max_C,
            others_C,
            scale_C,
            residual_C,
            softcap or 0.0,
        )

    def segment_sum(self, values: Tensor, weights: Tensor | None, offsets: Tensor) -> Tensor:
        sums = torch.full((offsets.shape[0] - 1,), torch.nan, dtype=torch.float64)
        self._call("segment_sum", *self._tokens(values, weights, offsets), sums.shape[0], sums)
        return sums

    def sigmoid_sequence_loss(
        self,
        logp: Tensor,
        weights: Tensor | None,
        offsets: Tensor,
        ref: Tensor,
        nan_if_invalid: Tensor,
        beta: float,
        label_smoothing: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        pairs = ref.shape[0] // 2
        sums, losses, grad = torch.empty_like(ref), torch.empty_like(ref[:pairs]), torch.empty_like(ref)
        tokens = self._tokens(logp, weights, offsets)
        results = (sums, losses, grad)
        self._call("sigmoid_sequence_loss", *tokens, pairs, ref, nan_if_invalid, beta, label_smoothing, *results)
        return sums, losses, grad

    def rounded(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """float32 values in bfloat16 and float16, as the stand-in rounds them."""
        narrow = torch.empty(values.shape, dtype=torch.bfloat16), torch.empty(values.shape, dtype=torch.float16)
        self._call("round", values, values.numel(), *narrow)
        return narrow

    def widened(self, bfloat16: Tensor, float16: Tensor) -> tuple[Tensor, Tensor]:
        """The way back."""
        wide = torch.empty(bfloat16.shape), torch.empty(float16.shape)
        self._call("widen", bfloat16, float16, bfloat16.numel(), *wide)
        return wide

    @staticmethod
    def _tokens(values: Tensor, weights: Tensor | None, offsets: Tensor) -> tuple[int | Tensor | None, ...]:
        weights_dtype = DTYPES[values.dtype if weights is None else weights.dtype]
        return DTYPES[values.dtype], values, weights_dtype, weights, values.shape[0], offsets

    def _call(self, name: str, *arguments: Tensor | int | float | None) -> None:
        function = getattr(self._library, f"emulated_{name}")
        function.restype = None if name in ("round", "widen") else ctypes.c_char_p
        said = function(*map(_as_c, arguments))
        if said is not None:
            raise EmulationError(f"{name}: {said.decode()}")


def _as_c(value: Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_double:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_double(value)
