"""The problem of the self-check: its inputs, the truth about them, and what counts as a difference.

Hidden states and weights have at most seven significant bits. Every dtype holds them, TF32 too, and their products are
exact in float32. The vocabulary is odd, longer than a block of the row kernels, and not a multiple of anything. Tiles
are views whose rows do not begin where the last one ended.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_kernels.kernel_interface import LogitsGradient, RowKernels, RowState
from dpo_kernels.kernels.torch_kernels import TorchKernels
from dpo_kernels.shapes import Head, accumulation_dtype, padded

WORKSPACE_BYTES = 2**22  # the temporaries that each backend may have
# Rows, columns and width. The first is for kernels that walk along a row, the second for those that multiply.
WIDE, TALL = (4, 4421), (133, 389)
WIDTH, WIDTH_OF_PRODUCTS = 40, 8  # H where logits are formed, and where gradients are multiplied
CUT = 0.55  # the part of the columns that lies in the first of two tiles
# What may differ, relative to the value. Float32 sums of a few thousand terms lose 1e-6, and approximate exponentials
# of a GPU about as much. A single column of WIDE too much is 2e-4 of a sum.
OF_SUMS, OF_LOGITS, OF_EXPONENTIALS = 2e-5, 1e-4, 1e-4
# Of the softcap: what exponentials and quotients of 2 ulp each may take from a logit near 0.
OF_SOFTCAP = 3e-7
# One rounding to bfloat16 is 2**-9 of a value at most, and 2**-8 of a value just above a power of two.
OF_BFLOAT16 = 4.5e-3
OF_FLOAT16 = OF_BFLOAT16 / 8  # whose mantissas have three bits more
# Of the largest value of a GEMM's result. The operands may be rounded to 8 bits, or to the 10 bits of TF32.
OF_GEMMS = 5e-3
OF_FLOAT64 = 1e-6  # of sums over sequences, which are float64 of float32 values
FLOOR = 1e-3  # values below this part of the largest one are compared with that


@dataclass(frozen=True)
class Mismatch:
    """A result of a kernel that differs from torch's by more than rounding explains."""

    kernel: str  # the operation of ``RowKernels``
    launch: str  # its sizes and forms, and the launch where there are several
    result: str  # which of its results
    error: float  # the largest error, as a multiple of what is allowed; infinite for a NaN

    def __str__(self) -> str:
        return f"{self.kernel} [{self.launch}]: {self.result} is off by {self.error:.3g} times what rounding explains"


class Sigmoid(NamedTuple):
    """DPO's loss as a backend sees it, with the derivative in closed form."""

    sigmoid: tuple[float, float] = (0.3, 0.1)  # beta and label smoothing

    def value_and_grad(self, policy_S: Tensor, ref_S: Tensor, counts_S: Tensor) -> tuple[Tensor, Tensor]:
        """Return one loss for each pair, and the derivative ``(S,)`` of their sum by ``policy_S``."""
        beta, smoothing = self.sigmoid
        ratios_P2 = (policy_S - ref_S).view(-1, 2)
        u_P = beta * (ratios_P2[:, 0] - ratios_P2[:, 1])
        log_sigmoid = torch.nn.functional.logsigmoid
        losses_P = -(1 - smoothing) * log_sigmoid(u_P) - smoothing * log_sigmoid(-u_P)
        slope_P = beta * (smoothing * u_P.sigmoid() - (1 - smoothing) * (-u_P).sigmoid())
        return losses_P, torch.stack([slope_P, -slope_P], dim=1).view(-1)


def difference(got: Tensor, want: Tensor, relative: float, floor: float, absolute: float = 0.0) -> float:
    """The largest error over what is allowed; equal infinities are no error, and a NaN is an infinite one."""
    got, want = got.detach().to("cpu", torch.float64), want.to(torch.float64)
    if got.shape != want.shape:
        return torch.inf
    finite = want[want.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    allowed = relative * (want.abs() + floor * largest) + absolute + torch.finfo(torch.float32).tiny
    error = torch.where(got == want, 0.0, (got - want).abs() / allowed)
    return float(error.nan_to_num(nan=torch.inf, posinf=torch.inf).max()) if error.numel() else 0.0


class SmallProblem:
    """A backend on a device beside torch in float64 on the CPU."""

    def __init__(self, kernels: type[RowKernels], dtype: torch.dtype, device: torch.device) -> None:
        self.kernels, self.truth = kernels, TorchKernels(torch.float64, WORKSPACE_BYTES)
        self.dtype, self.device, self.sums = dtype, device, accumulation_dtype(dtype)
        self.random = torch.Generator(device="cpu").manual_seed(0)

    @property
    def ours(self) -> RowKernels:
        """New kernels: an instance serves one call, and may keep what it has made of the call's head."""
        return self.kernels(self.dtype, WORKSPACE_BYTES)

    # --- inputs, in float64 on the CPU ---

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(*shape, generator=self.random, dtype=torch.float64, device="cpu")

    def short(self, *shape: int, unit: float) -> Tensor:
        """Multiples of ``unit`` with at most seven bits, about as large as normal numbers times 16 units."""
        return (self.normal(*shape) * 16).round_().clamp_(-127, 127) * unit

    def labels(self, rows: int, cols: int) -> Tensor:
        """Labels in every part of the vocabulary, its first and its last column among them."""
        labels = torch.randint(0, cols, (rows,), generator=self.random, device="cpu")
        labels[:2] = torch.tensor([cols - 1, 0], device="cpu")
        return labels

    def logits(self, rows: int, cols: int) -> Tensor:
        """Logits as float32 holds them, below 8. Their mean is 1, so that no sum of them vanishes."""
        return (1.5 * self.normal(rows, cols) + 1.0).clamp_(-7.9, 7.9).to(torch.float32).to(torch.float64)

    def head(self, cols: int, rich: bool, width: int = WIDTH) -> Head:
        """A head, and with ``rich`` its bias, scale and softcap."""
        weight = self.short(cols, width, unit=2.0**-6)
        return Head(weight, self.short(cols, unit=2.0**-5), 0.75, 8.0) if rich else Head(weight)

    def moved(self, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor on the device; floats get the dtype of sums, unless another is given."""
        return value.to(self.device, (dtype or self.sums) if value.is_floating_point() else value.dtype)

    def moved_head(self, head: Head) -> Head:
        """The head on the device, in the dtype of the operands."""
        bias = None if head.bias is None else self.moved(head.bias, self.dtype)
        return replace(head, weight=self.moved(head.weight, self.dtype), bias=bias)

    def tile(self, rows: int, cols: int, values: Tensor | None = None) -> Tensor:
        """A tile as a strategy makes it, with the values if there are any and NaN elsewhere."""
        logits = rows * padded(cols, self.ours.row_alignment(self.device.type))
        tile = self.ours.tile_in(self.ours.scratch(self.device, logits).fill_(torch.nan), rows, cols)
        return tile if values is None else tile.copy_(values)

    def whole_state(self, z: Tensor, labels: Tensor, stats: Sequence[str] = ()) -> RowState:
        """The true state of rows after all columns."""
        state = self.truth.new_state(z.shape[0], z.device, stats)
        self.truth.reduce(state, z.clone(), labels, 0)
        return state

    # --- comparisons ---

    def compare(
        self,
        kernel: str,
        launch: str,
        pairs: dict[str, tuple[Tensor, Tensor]],
        relative: float,
        floor: float = FLOOR,
        absolute: float = 0.0,
    ) -> Iterator[Mismatch]:
        """Yield results that differ; ``pairs`` holds ours and the true one by name."""
        for name, (got, want) in pairs.items():
            error = difference(got, want, relative, floor, absolute)
            if not error <= 1.0:
                yield Mismatch(kernel, f"{launch}, {str(self.dtype).removeprefix('torch.')}", name, error)

    def compare_states(
        self, kernel: str, launch: str, got: RowState, want: RowState, off: float = 0.0, cols: int = 1
    ) -> Iterator[Mismatch]:
        """Yield fields of a state that differ, where each of ``cols`` logits may be ``off`` by so much."""
        fields = {name: value for name, value in vars(want).items() if isinstance(value, Tensor)}
        lacking = [name for name in fields if getattr(got, name) is None]
        assert not lacking, f"{kernel} keeps no {lacking}"
        absolute = {"max": off, "target": off, "logit_sum": cols * off}
        for name, value in fields.items():
            pair = {name: (getattr(got, name), value)}
            yield from self.compare(kernel, launch, pair, OF_SUMS, absolute=absolute.get(name, 0.0))

    def compare_gradient(
        self, kernel: str, launch: str, got: LogitsGradient, want: LogitsGradient, start: int
    ) -> Iterator[Mismatch]:
        """Yield a mismatch if the gradients of a tile differ, each with its scale and its rounding residual."""
        allowed = {torch.bfloat16: OF_BFLOAT16, torch.float16: OF_FLOAT16}.get(got.values.dtype, OF_EXPONENTIALS)
        pair = {"values": (whole_gradient(got, start), whole_gradient(want, start))}
        yield from self.compare(kernel, launch, pair, allowed)


def in_float64(d: LogitsGradient) -> LogitsGradient:
    """The same numbers in float64 on the CPU."""

    def moved(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to("cpu", torch.float64)

    return LogitsGradient(d.values.to("cpu", torch.float64), moved(d.scale), d.labels.to("cpu"), moved(d.residual))


def whole_gradient(d: LogitsGradient, start: int) -> Tensor:
    """The gradient in float64 on the CPU, with its residual and its scale."""
    d = in_float64(d)
    column = d.labels - start
    inside = (column >= 0) & (column < d.values.shape[1])
    values, label = d.values.clone(), column.clamp(0, d.values.shape[1] - 1)[:, None]
    if d.residual is not None:
        values.scatter_add_(1, label, torch.where(inside, d.residual, 0.0)[:, None])
    return values if d.scale is None else values * d.scale[:, None]
