"""The tolerance rule: nobody may be worse than twice plain torch in the same dtype, against float64.

``err(got) <= 2 * err(plain) + floor`` in the largest absolute error, for every result. Gradients also keep a bar on
their relative L2 error, or that of plain torch where that is larger. The bars are for rows that are not saturated
(mean target probability at most 0.5).

Where the bars come from: bfloat16 has 8 significant bits, so a number m * 2^e with m in [1, 2) is off by at most 2^-8
of 2^e, uniformly distributed, which is 2^-7 / sqrt(12) in the root mean square. Over mantissas that are distributed as
1 / m, dividing by m gives ``2^-7 / sqrt(12) * sqrt(3 / (8 log 2)) = 1.66e-3`` of the number itself; measured 1.65e-3.
One such rounding, that of the result, is all that a gradient from float32 values costs; its bar is 2.2e-3. A head's
gradient in bfloat16 that is formed from a bfloat16 tile of logits' gradients has been rounded twice, independently:
``sqrt(2) * 1.65e-3 = 2.33e-3``, and its bar is 2.4e-3. Nothing else is formed with two: what rounding took from a row's
largest value is given back to the gradients of hidden states and bias in float32.

On a GPU, and under the models of one (``of_a_gpu``), the floor of float32 operands is higher. A kernel's exponential is
``ex2.approx`` of ``x * log2(e)``, which tests/triton_tools/gpu_arithmetic.py describes: 2 ulp away from the power of a
product that was rounded, with a constant that was rounded. ``exponential_error`` adds these up. A log-prob and a
gradient have a sum of exponentials in the denominator, whose mean error by probability is that of the mean distance
from the maximum. What a gradient has in the numerator is off by as much. Errors of one sign cancel in the quotient and
errors of both signs in the sum, so one such error is added to the floor.

The log-prob of a token is judged in nats, too (``log_prob_error``). On a GPU it depends on H, because tensor cores cut.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

RELATIVE_L2_BAR = {torch.bfloat16: 2.2e-3, torch.float16: 2.8e-4, torch.float32: 2e-6, torch.float64: 4e-15}
# These are for the head's gradient where the tile had the same dtype. float16 has three bits more than bfloat16.
TWO_ROUNDINGS_BAR = {torch.bfloat16: 2.4e-3, torch.float16: 2.4e-3 / 8}
FLOOR_ULPS = 4  # of the largest element: a few roundings of the result's own dtype
EX2_ERROR = 2 * 2.0**-23  # of ex2.approx.f32, relative: 2 ulp of a number that lies just above a power of two
PRODUCT_ERROR = 2.0**-24 + 1.34e-8  # of x * log2(e), relative: its own rounding, and that of the constant
MEAN_DISTANCE = 2.0  # nats from a row's maximum to its logits, the mean by probability; the tests' problems have less
FLOAT64_ULPS = 64  # there the oracle is no better than what it judges, and sums of hundreds of terms differ by this
LOG_PROBS_ON_A_CPU = 1e-4  # nats that a token's log-prob may be off for 16-bit operands, whose logits are float32
CUT_AT_A_TIME = 8  # products that an A100's tensor cores add before they cut the sum towards zero; an H100's add 16

_of_a_gpu: ContextVar[bool] = ContextVar("of_a_gpu", default=False)


@contextmanager
def of_a_gpu() -> Iterator[None]:
    """Results on the CPU are judged like those of a GPU, because they were computed with its errors."""
    before = _of_a_gpu.set(True)
    try:
        yield
    finally:
        _of_a_gpu.reset(before)


def exponential_error(distance: float) -> float:
    """Largest relative error of a kernel's float32 ``exp(-distance)`` on a GPU; 0 on the CPU."""
    return EX2_ERROR + PRODUCT_ERROR * distance if _of_a_gpu.get() else 0.0


def log_prob_error(width: int, largest: float, on_a_gpu: bool) -> float:
    """Nats that the log-prob of a token may be off, for 16-bit operands of ``width`` and logits up to ``largest``.

    On a GPU the logits of the label and of the row's maximum may each lose 2^-23 of themselves with every cut.
    """
    return 2 * width / CUT_AT_A_TIME * 2.0**-23 * largest if on_a_gpu else LOG_PROBS_ON_A_CPU


def floor_ulps(dtype: torch.dtype, on_a_gpu: bool) -> float:
    """The floor for operands of ``dtype``, in units of the result's last place."""
    if dtype == torch.float64:
        return FLOAT64_ULPS
    if dtype != torch.float32 or not on_a_gpu:
        return FLOOR_ULPS
    with of_a_gpu():
        return FLOOR_ULPS + exponential_error(MEAN_DISTANCE) / torch.finfo(torch.float32).eps


def largest_error(value: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference; NaN counts as infinite unless both are."""
    value, oracle = value.double(), oracle.double()
    difference = (value - oracle).abs()
    difference = torch.where(value == oracle, torch.zeros_like(difference), difference)  # equal infinities
    return float(difference.nan_to_num(nan=torch.inf).max()) if difference.numel() else 0.0


def relative_l2(value: Tensor, oracle: Tensor) -> float:
    """Relative error in the L2 norm; 0 where both vanish."""
    scale = float(oracle.double().norm())
    error = float((value.double() - oracle.double()).norm())
    return error / scale if scale else error


def violations(
    name: str,
    got: Tensor,
    oracle: Tensor,
    plain: Tensor,
    dtype: torch.dtype,
    *,
    gradient: bool,
    saturated: bool = False,
    two_roundings: bool = False,
) -> list[str]:
    """What of the rule ``got`` breaks; ``dtype`` is that of the operands, ``oracle`` the float64 truth.

    ``two_roundings``: a gradient of the head in 16 bits whose tile had 16 bits as well.
    """
    if got.shape != oracle.shape:
        return [f"{name}: shape {tuple(got.shape)}, expected {tuple(oracle.shape)}"]
    broken = []
    finite = oracle[oracle.isfinite()].abs().double()
    ulps = floor_ulps(dtype, got.is_cuda or _of_a_gpu.get())
    floor = ulps * torch.finfo(got.dtype).eps * (float(finite.max()) if finite.numel() else 0.0)
    error, allowed = largest_error(got, oracle), 2 * largest_error(plain, oracle) + floor
    if not error <= allowed:
        broken.append(f"{name}: largest error {error:.3e}, allowed {allowed:.3e}")
    if gradient and not saturated:
        bar = TWO_ROUNDINGS_BAR[dtype] if two_roundings else RELATIVE_L2_BAR[dtype]
        error, allowed = relative_l2(got, oracle), max(bar, relative_l2(plain, oracle))
        if not error <= allowed:
            broken.append(f"{name}: relative L2 error {error:.3e}, allowed {allowed:.3e}")
    return broken
