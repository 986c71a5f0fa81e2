"""How gradients of logits fit the range of float16, whose numbers end at 65504 and lose digits below 2^-14.

The operands of the head's gradient are a tile of the logits' gradient, times the coefficients of its rows, and rows of
hidden states. A coefficient of 1e-9 is ordinary. So powers of two, which change no digit, move between the two:

- A row of the tile is multiplied by ``2^a``, which differs by row. Its largest entry is then between 2^-2 and 2^15.
- The same row of X is multiplied by ``2^(k - a)``. The products of a row are then too large by ``2^k``, where ``k`` is
  the same for all rows, and the GEMM multiplies its result by ``2^-k``.

The number ``k`` is known on the host before any coefficient is. It follows from the largest coefficient that a call may
have, ``expected``. With a row whose label's value is that large, the row of X is multiplied by about 1. With one that
is ``2^d`` times smaller, the tile gives way by up to ``2^SLACK``, and X takes the rest. Entries of X keep every digit
while they stay above 2^-14. So a coefficient may be 2^30 times smaller than expected before the rounding of X is as
large as that of the tile. Rows with larger coefficients than expected make X grow. It overflows at 65504, which gives
an infinite or NaN gradient and no wrong one.

Where the tile has given way by all of ``2^SLACK``, entries below 2^-12 of the row's largest one lose digits. Each is
off by 2^-25 at most, which makes ``2^-23 * sqrt(V)`` of the row's norm. For V = 2^18 that is 2^-14, a quarter of one
rounding to float16.
"""

import math

import torch
from torch import Tensor

from dpo_kernels.shapes import MOST_EXPONENT

TOP = 15  # exponent of the largest value that a row of the tile may end at; 2^16 is too large for float16
SLACK = 16  # by how many powers of two a row of the tile may end lower, before X gives way
MOST = (
    MOST_EXPONENT  # coefficients count as at least 2^-MOST and at most 2^MOST, so that their powers are float32 numbers
)


def x_exponent(expected: float) -> int:
    """Return ``k`` for a call whose largest coefficient is about ``expected``."""
    return TOP - expected_exponent(expected)


def expected_exponent(expected: float) -> int:
    """Return the smallest ``e`` with ``|expected| <= 2^e``, clamped; 0 for 0 and for what is not finite."""
    if expected == 0.0 or not math.isfinite(expected):
        return 0
    mantissa, exponent = math.frexp(abs(expected))
    return max(-MOST, min(MOST, exponent - (mantissa == 0.5)))


def row_scales(scale_C: Tensor | None, others_C: Tensor, expected: float) -> tuple[Tensor, Tensor]:
    """Return what rows of the tile are multiplied by, and what is left to the rows of X and of dX.

    Args:
        scale_C: ``(C,)`` coefficient of each row over its sum of exponentials, float32, or None for 1.
        others_C: ``(C,)`` minus the label's value of each row, float32. Where it is 0 the largest value is about 1.
        expected: about the largest coefficient of the call.

    Returns:
        ``scale_C * 2^a`` and ``2^-a``, ``(C,)`` float32 each, where ``a`` differs by row.

    """
    largest = torch.where(others_C > 0, others_C, 1.0)
    if scale_C is not None:
        largest = largest * scale_C.abs()
    exponent = torch.frexp(largest.clamp(2.0**-MOST, 2.0**MOST)).exponent
    slack = (expected_exponent(expected) - exponent).clamp(0, SLACK)
    power = torch.ldexp(torch.ones_like(others_C), TOP - slack - exponent)
    return power if scale_C is None else scale_C * power, power.reciprocal()
