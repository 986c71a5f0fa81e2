"""The kernels around the products of a chunk, next to torch's operations, and a call with ``main_grad``."""

import pytest
import torch

import dpo_kernels as dk
from tests.interpreted import bookkeeping
from tests.triton_tools.interpreter import sanitize


def test_bookkeeping_is_that_of_torch():
    with sanitize() as launches:
        assert bookkeeping.broken() == []
    assert set(launches) == {"reduce_rows", "sigmoid_sequence_loss", "add_label_rows", "dlogits_rows", "to_input_rows"}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(value):
    kernels, logp = bookkeeping.TritonKernels(torch.float32, 2**20), torch.zeros(4)
    z = torch.zeros(4, 40)
    z[1, 3], z[2] = value, -torch.inf
    z[3, :20] = -torch.inf
    with sanitize():
        kernels.reduce_to_logps(z, torch.tensor([0, 1, 1, 5]), logp, True)
    assert logp.isnan().tolist() == [False, True, True, False]
    assert float(logp[3]) == -torch.inf


def test_a_buffer_of_the_caller_by_the_kernels_and_by_torch():
    """``main_grad`` and its scale, in several chunks, with an upstream other than 1."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(8, 5, 24, generator=g), torch.randn(70, 24, generator=g)
    labels, found = torch.randint(0, 70, (8, 5), generator=g), []
    for backend in ("torch", "triton"):
        x, w, buffer = hidden.clone().requires_grad_(), weight.clone().requires_grad_(), torch.ones(70, 24)
        options = {"main_grad": buffer, "main_grad_scale": 4.0, "scratch_bytes": 12 * 80 * 6 * 4 // 3}
        out = dk.fused_dpo_loss(x, w, labels, reference_free=True, backend=backend, strategy="chunked", **options)
        (out.loss * 4.0).backward()
        found.append((out.loss.detach(), buffer - 1, x.grad))
    for plain, mine in zip(*found, strict=True):
        error = torch.linalg.vector_norm((mine - plain).double()) / torch.linalg.vector_norm(plain.double())
        assert error <= 2e-6
