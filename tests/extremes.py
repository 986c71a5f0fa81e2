"""Inputs at the edge of a dtype, and comparisons by bits."""

import math

import torch

from dpo_kernels import losses


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def extreme(dtype=torch.float32, scale=1.0, labels=None, width=5):
    """Four sequences over a vocabulary of 37, logits about ``scale`` large."""
    g = torch.Generator().manual_seed(2)
    return {
        "hidden": (torch.randn(4, width, 8, generator=g) * scale).to(dtype).requires_grad_(),
        "weight": torch.randn(37, 8, generator=g).to(dtype).requires_grad_(),
        "labels": torch.randint(0, 37, (4, width), generator=g) if labels is None else labels,
        "ref_logps": torch.tensor([-3.0, -2.0, -4.0, -1.0]),
    }


def masked(*rows):
    """Labels in which the given sequences are masked whole."""
    labels = torch.randint(0, 37, (4, 5), generator=torch.Generator().manual_seed(3))
    labels[list(rows)] = -100
    return labels


F64 = torch.float64


COUNTS = (200_000, 0, 99_000, 995)  # 300,000 with five more, which belong to no sequence


def assert_summed_in_float64(kernels, counts=COUNTS, weights_dtype=None):
    """Alone and by the tail of the sigmoid loss, which some backends do in a pass of its own."""
    g = torch.Generator().manual_seed(5)
    values = -8 * torch.rand(sum(counts) + 5, generator=g)  # nats
    weights = None if weights_dtype is None else torch.rand(values.shape, generator=g, dtype=weights_dtype)
    terms = values.double() if weights is None else values.double() * weights.double()
    exact = torch.tensor([math.fsum(part.tolist()) for part in terms[: sum(counts)].split(counts)], dtype=F64)
    ref_S = exact + torch.tensor([0.25, -0.25]).repeat(len(counts) // 2)  # margins of half a nat, whatever the sums
    loss, zero = losses.bind("sigmoid", 0.5, 0.0, {}), torch.zeros((), dtype=F64)
    counts_S = torch.tensor(counts)
    sums, found, grad = kernels.sequence_loss(values, weights, counts_S, ref_S, zero, loss)
    for got in (kernels.segment_sum(values, weights, counts_S), sums):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    slope = torch.tensor([-0.5, 0.5], dtype=F64) * math.exp(0.25) / (1 + math.exp(0.25))  # at u = -0.25
    torch.testing.assert_close(found, torch.full_like(found, math.log1p(math.exp(0.25))), rtol=1e-8, atol=0)
    torch.testing.assert_close(grad, slope.repeat(len(counts) // 2), rtol=1e-8, atol=0)
