"""What the Triton backend does around the products of a chunk, next to the same by torch's operations."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dpo_kernels import losses
from dpo_kernels.engine import places
from dpo_kernels.kernel_interface import LogitsGradient, RowScale, RowState
from dpo_kernels.kernels.torch_kernels import TorchKernels
from dpo_kernels.kernels.triton.backend import TritonKernels
from dpo_kernels.shapes import Head

KINDS = (TorchKernels, TritonKernels)
# Relative. Sums and losses are float64 in both. The others are rounded once to float32, and an exponential may be off
# by two units in the last place.
FLOAT64, FLOAT32 = 1e-12, 4e-7
Compared = tuple[str, Tensor, Tensor, float]


def broken() -> list[str]:
    """What differs, by name."""
    found = []
    for part in (log_probs(), losses_and_factors(), residuals(), tiles_without_a_label(), input_rows()):
        for name, expected, got, rtol in part:
            close = torch.allclose(got, expected.to(got.dtype), rtol=rtol, atol=0.0, equal_nan=True)
            if expected.shape != got.shape or not close:
                found.append(name)
    return found


def log_probs() -> Iterator[Compared]:
    """Rows of several blocks: random ones, and labels whose other tokens weigh from 1e-3 to 1e-25."""
    g = torch.Generator().manual_seed(0)
    z, labels = torch.randn(8, 4200, generator=g), torch.tensor([4199, 0, 7, 4100, 0, 1, 2, 3])
    z[0] -= 20.0  # no logit is above 0
    for row, ahead in zip((4, 5, 6, 7), (16.0, 26.0, 45.0, 66.0), strict=True):
        z[row, labels[row]] = ahead
    outs = []
    for kind in KINDS:
        logp = torch.full((10,), torch.nan)
        state = kind(torch.float32, 2**30).reduce_to_logps(z.clone(), labels, logp[1:9], True)
        outs.append((logp, state.max, state.others, state.target))
    # The log-prob of a row is the difference of two numbers of about 10. torch's are float32.
    exact = z.double().log_softmax(1).gather(1, labels[:, None])[:, 0]
    yield "log-probs", exact[:4], outs[1][0][1:5], 2e-7
    yield "log-probs of nearly certain labels", outs[0][0][5:9], outs[1][0][5:9], FLOAT32 * 4
    yield "log-probs beyond the rows", outs[0][0][[0, 9]], outs[1][0][[0, 9]], 0.0
    for name, expected, got in zip(("max", "others", "target"), outs[0][1:], outs[1][1:], strict=True):
        yield name, expected, got, 4e-6 if name == "others" else 0.0


def losses_and_factors() -> Iterator[Compared]:
    """Pairs of 300 tokens and fewer, none among them, in a chunk that is not the first; capacity to spare, or less."""
    g = torch.Generator().manual_seed(1)
    counts = torch.tensor([300, 1, 0, 9, 40, 0])
    loss = losses.bind("sigmoid", 0.1, 0.2, {})
    for spare in (0, 30, -7):
        tokens = int(counts.sum()) + spare
        segments = torch.arange(6).repeat_interleave(counts)[:tokens]
        segments = torch.cat([segments, torch.full((max(spare, 0),), 5)])
        weights = torch.rand(tokens, generator=g)
        weights[int(counts.sum()) :] = 0.0
        state = RowState(*(torch.randn(tokens, generator=g).abs() for _ in range(3)))
        state.target = state.max - state.target
        logp, ref = -torch.rand(tokens, generator=g), -torch.rand(6, generator=g).double() * 50
        invalid = torch.zeros((), dtype=torch.float64)
        found = [kind(torch.float32, 2**20).sequence_loss(logp, weights, counts, ref, invalid, loss) for kind in KINDS]
        for name, expected, got in zip(("log-probs", "losses", "derivative"), *found, strict=True):
            yield f"{name} without factors", expected, got, FLOAT64
        for weight in (weights, weights.double(), None if spare <= 0 else weights):
            for scale in (1.0, 3.0):
                given = RowScale(state, segments + 4, 4, 0.7, torch.tensor(3.0, dtype=torch.float64), scale)
                found = [
                    kind(torch.float32, 2**20).sequence_loss_and_scale(logp, weight, counts, ref, invalid, loss, given)
                    for kind in KINDS
                ]
                for name, expected, got in zip(("log-probs", "losses", "factors"), *found, strict=True):
                    what = f"{name} of sequences, {spare} places to spare, grad_scale {scale}"
                    yield what, expected, got, FLOAT32 if name == "factors" else FLOAT64


def residuals() -> Iterator[Compared]:
    """The residual of each row's label, for a head with strides, whose H is more than a block."""
    g = torch.Generator().manual_seed(2)
    wide = torch.randn(2100, 40, generator=g).bfloat16()
    labels, residual = torch.tensor([39, 0, 7]), torch.randn(3, generator=g)
    for weight in (wide.t(), wide.t().contiguous()):
        outs = []
        for kind in KINDS:
            out = torch.ones(3, 2100)
            gradient = LogitsGradient(out, None, labels, residual)
            kind(torch.bfloat16, 2**20).add_rounding_residual(gradient, Head(weight), out)
            outs.append(out)
        # The kernel may round the product and the sum at once.
        yield "residuals", outs[0].double() + 10, outs[1].double() + 10, FLOAT32


def tiles_without_a_label() -> Iterator[Compared]:
    """The residual of rows whose label lies left of the tile, in it, or right of it."""
    tile, labels = torch.zeros(3, 4200), torch.tensor([3, 4300, 9000])
    zeros = torch.zeros(3)
    got = TritonKernels(torch.bfloat16, 2**20).dlogits_(
        tile, labels, 100, zeros, torch.full((3,), 1.001), Head(torch.zeros(1, 1)), torch.ones(3)
    )
    lost = -1.001 - float(torch.tensor(-1.001).bfloat16())
    yield "residual by tile", torch.tensor([0.0, lost if 4300 - 100 < 4200 else 0.0, 0.0]), got.residual, 1e-3
    labels = torch.tensor([99, 4299, 100])
    got = TritonKernels(torch.bfloat16, 2**20).dlogits_(
        torch.zeros(3, 4200), labels, 100, zeros, torch.full((3,), 1.001), Head(torch.zeros(1, 1)), torch.ones(3)
    )
    yield "residual at the ends of a tile", torch.tensor([0.0, lost, lost]), got.residual, 1e-3


def input_rows() -> Iterator[Compared]:
    """Packed rows at their places, of more than a block, in each dtype."""
    g = torch.Generator().manual_seed(3)
    dx = torch.randn(6, 1500, generator=g)
    dx[5] = 0
    slot, factor = torch.tensor([5, 3, 0, 5, 4, 1, 2]), torch.tensor(1.7, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = places.to_input_rows(dx, slot, factor.float(), dtype)
        got = TritonKernels.to_input_rows(dx, slot, factor, dtype)
        assert got.dtype == dtype
        yield f"input rows {dtype}", expected, got, 0.0
