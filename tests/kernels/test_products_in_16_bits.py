"""On a GPU every product with a side of the vocabulary's length reads 16-bit operands in a 16-bit call.

The tensors have no memory and say ``is_cuda``. Triton kernels and operators of the extension do nothing. What torch
multiplies is seen by a dispatch mode.
"""

import importlib.util
from contextlib import ExitStack
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_kernels.engine import passes
from dpo_kernels.kernels import extension
from dpo_kernels.losses import bind
from dpo_kernels.planning.plan import lay_out
from dpo_kernels.problem import MainGrad, Problem
from dpo_kernels.shapes import Head, NeedsGrad, PackedTokens

VOCAB, WIDTH, SEQUENCES, LENGTH = 4096, 64, 8, 32
TOKENS = SEQUENCES * LENGTH
WHOLE, SMALL = (
    6 * VOCAB * TOKENS * 2,
    6 * VOCAB * LENGTH,
)  # bytes of scratch: all tokens, and fewer than those of a pair
HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")),
    pytest.param("cuda", marks=pytest.mark.skipif(extension.why_not("cpu") is not None, reason="no extension")),
]
PRODUCTS = ("mm", "addmm", "mv", "addmv", "bmm", "baddbmm", "dot")


class Products(TorchDispatchMode):
    """The dtypes of the operands of every product with a side of the vocabulary's length, or of a part of it."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.removeprefix("aten::") in PRODUCTS:
            left, right = [arg for arg in args if isinstance(arg, torch.Tensor)][-2:]
            if max(*left.shape, *right.shape) > TOKENS:
                self.found.append((left.dtype, right.dtype))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def products():
    """Take tensors without memory for those of a GPU, with kernels that do nothing."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.Tensor, "is_cuda", property(lambda tensor: True)))
        stack.enter_context(patch("dpo_kernels.problem.traced", lambda tensor: False))
        stack.enter_context(patch.object(passes, "autocast_off", lambda tensor: ExitStack()))
        stack.enter_context(patch.object(torch.cuda, "device", lambda device: ExitStack()))
        if HAS_TRITON:
            stack.enter_context(patch("triton.runtime.jit.JITFunction.run", lambda kernel, *given, **options: None))
            facts = lambda device: type("Facts", (), {"multi_processor_count": 4, "major": 9, "minor": 0})()  # noqa: E731
            stack.enter_context(patch.object(torch.cuda, "get_device_properties", facts))
            stack.enter_context(patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)))
            stack.enter_context(patch.object(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100"))
            stack.enter_context(
                patch("dpo_kernels.kernels.triton.autotune.fastest_launch", lambda k, family, *_: family[0])
            )
        stack.enter_context(torch.no_grad())
        yield stack


def packed(known):
    counts = torch.full((SEQUENCES,), LENGTH if known else -1, dtype=torch.int64)
    return lambda: PackedTokens(
        index=torch.empty(TOKENS, dtype=torch.int64, device="meta"),
        labels=torch.empty(TOKENS, dtype=torch.int64, device="meta"),
        weights=torch.empty(TOKENS, device="meta"),
        segments=torch.empty(TOKENS, dtype=torch.int64, device="meta"),
        slot=torch.empty(TOKENS, dtype=torch.int64, device="meta"),
        counts=torch.empty(SEQUENCES, dtype=torch.int64, device="meta"),
        counts_host=counts,
        nan_if_invalid=torch.empty((), dtype=torch.float64, device="meta"),
    )


class Call(NamedTuple):
    strategy: str
    expected: int  # products by torch, at least
    trainable: bool = True
    rich: bool = False
    main_grad: bool = False
    scratch: int = WHOLE
    known: bool = True

    def run(self, dtype, backend, make_packed):
        hidden = torch.empty(TOKENS, WIDTH, dtype=dtype, device="meta")
        weight = torch.empty(VOCAB, WIDTH, dtype=dtype, device="meta")
        bias = torch.empty(VOCAB, dtype=dtype, device="meta") if self.rich else None
        into = torch.empty(VOCAB, WIDTH, device="meta")
        needs = NeedsGrad(True, self.trainable, self.rich)
        with_loss = self.strategy == "chunked" and self.trainable
        problem = Problem(
            hidden,
            Head(weight, bias, 1.0, 30.0 if self.rich else None),
            make_packed(),
            dtype,
            needs,
            loss=bind("sigmoid", 0.1, 0.0, {}) if with_loss else None,
            main_grad=MainGrad(into, 2.0) if self.main_grad else None,
            static=not self.known,
        )
        plan = lay_out(problem.workload, self.strategy, backend, self.scratch)
        dtypes = passes.GradDtypes.of(hidden, weight, bias)
        sums = torch.empty(SEQUENCES, dtype=torch.float64, device="meta")
        if with_loss:
            result = passes.loss_and_gradients(problem, plan, sums, sums[0])
            passes.finalize_gradients(sums[0], result.kept, problem.packed.slot, dtypes, needs, backend)
        else:
            saved = passes.logps(problem, plan).saved
            if not passes.saves_dlogp_dhidden(self.strategy, needs):
                passes.logps_gradients(sums, problem, plan, saved, dtypes)


CALLS = {
    "chunked": Call("chunked", 3),
    "chunks": Call("chunked", 6, scratch=WHOLE // 8),
    "oversized": Call("chunked", 6, scratch=SMALL),
    "static": Call("chunked", 3, known=False),
    "bias and softcap": Call("chunked", 3, rich=True),
    "main_grad": Call("chunked", 3, main_grad=True),
    "frozen": Call("frozen_head", 2, trainable=False),
    "frozen, cut rows": Call("frozen_head", 4, trainable=False, scratch=6 * 1024 * TOKENS),
    "recompute": Call("recompute", 3),
    "recompute, bias and softcap": Call("recompute", 3, rich=True),
    "streaming": Call("streaming", 2),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_products_read_16_bits(products, dtype, backend, name):
    call = CALLS[name]
    make_packed = packed(call.known)
    if backend == "cuda":
        products.enter_context(nothing_of_the_extension())
    seen = products.enter_context(Products())
    call.run(dtype, backend, make_packed)
    assert len(seen.found) >= call.expected, seen.found
    assert all(pair == (dtype, dtype) for pair in seen.found), seen.found


def nothing_of_the_extension():
    stack = ExitStack()
    for name in extension.OPERATORS[:3]:
        stack.enter_context(patch.object(torch.ops.dpo_kernels, name, lambda *given, **facts: None))
    return stack
