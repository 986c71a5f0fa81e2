"""Tracing for a GPU that is not here: fake CUDA tensors reach the Triton backend's operators, and no kernel runs.

A torch without CUDA cannot even slice a fake CUDA tensor, as no guard for that device is registered. One that does
nothing is compiled, and the tests run in a process that loaded it, so that no other test meets it.
"""

import multiprocessing
import subprocess
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.cpp_extension import get_cxx_compiler, include_paths, library_paths

import dpo_kernels as dk

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
}
"""
HIDDEN, WEIGHT, LABELS = (4, 6, 8), (50, 8), (4, 6)
# The operators of a call and its backward, by strategy.
OPERATORS = {
    "chunked": ["pack", "loss", "loss_backward"],
    "recompute": ["pack", "logps", "logps_backward"],
    "streaming": ["pack", "logps", "logps_backward"],
}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Calls a function of this module in a process where fake tensors may be on CUDA."""
    library = None if torch.backends.cuda.is_built() else _compiled(tmp_path_factory.mktemp("guard"))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=_load, initargs=(library,)) as process:
        yield lambda function, *args: process.submit(function, *args).result()


def _compiled(folder):
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(GUARD)
    paths = [*(f"-I{path}" for path in include_paths()), *(f"-L{path}" for path in library_paths())]
    flags = ["-std=c++20", "-shared", "-fPIC", *paths, "-lc10"]
    subprocess.run([get_cxx_compiler(), str(source), "-o", str(library), *flags], check=True)
    return str(library)


def _load(library):
    if library is not None:
        torch.ops.load_library(library)


def _fake_inputs(dtype):
    with FakeTensorMode() as mode:
        hidden = torch.empty(HIDDEN, device="cuda", dtype=dtype, requires_grad=True)
        weight = torch.empty(WEIGHT, device="cuda", dtype=dtype, requires_grad=True)
        return mode, (hidden, weight, torch.zeros(LABELS, device="cuda", dtype=torch.int64))


def _gradients(output, leaves):
    """Gradients by the leaves, node by node: autograd's engine asks the driver for streams."""
    order = []

    def visit(node):
        if node is not None and node not in order:
            for following, _ in node.next_functions:
                visit(following)
            order.append(node)

    visit(output.grad_fn)
    arrived, found = defaultdict(dict), {}
    arrived[output.grad_fn][0] = torch.ones_like(output)
    for node in reversed(order):
        grads = arrived.pop(node)
        if hasattr(node, "variable"):
            (found[node.variable],) = grads.values()
            continue
        places = range(len(node._input_metadata))  # one for each output of the operator
        results = getattr(node, "apply", node)(*(grads.get(place) for place in places))
        results = results if isinstance(results, tuple) else (results,)
        for (following, place), grad in zip(node.next_functions, results, strict=False):  # numbers have no node
            if following is not None and grad is not None:
                before = arrived[following].get(place)
                arrived[following][place] = grad if before is None else before + grad
    return [found[leaf] for leaf in leaves]


def _call(strategy, gradient="dense"):
    def call(hidden, weight, labels):
        out = dk.fused_dpo_loss(
            hidden,
            weight,
            labels,
            reference_free=True,
            stats=("entropy",),
            backend="triton",
            strategy=strategy,
            scratch_bytes=2**20,
            gradient=gradient,
        )
        return out.loss, out.chosen_logps, out.stats["entropy"], *_gradients(out.loss, (hidden, weight))

    return call


def _described(tensors):
    return [(tuple(tensor.shape), str(tensor.device), str(tensor.dtype)) for tensor in tensors]


def _operators(graph):
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return [name.split(".")[1] for name in names if name.startswith("dpo_kernels.")]


def run_fake(dtype, strategy):
    mode, inputs = _fake_inputs(dtype)
    with mode:
        return _described(_call(strategy)(*inputs))


def trace(dtype, strategy, gradient):
    mode, inputs = _fake_inputs(dtype)
    with mode:
        graph = make_fx(_call(strategy, gradient))(*inputs).graph
    return _described(node.meta["val"] for node in graph.output_node().args[0]), _operators(graph)


class Step(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, hidden, labels):
        return dk.fused_dpo_loss(hidden, self.weight, labels, reference_free=True, backend="triton").loss


def export(dtype, strict):
    mode, (hidden, weight, labels) = _fake_inputs(dtype)
    with mode:
        step = Step(weight.detach())
    graph = torch.export.export(step, (hidden.detach(), labels), strict=strict).graph
    return _described(node.meta["val"] for node in graph.output_node().args[0]), _operators(graph)


def expected(dtype):
    return [
        ((), "cuda:0", "torch.float32"),
        ((2,), "cuda:0", "torch.float32"),
        ((4,), "cuda:0", "torch.float32"),
        (HIDDEN, "cuda:0", str(dtype)),
        (WEIGHT, "cuda:0", str(dtype)),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("strategy", OPERATORS)
def test_fake_cuda_tensors_forward_and_backward(elsewhere, strategy, dtype):
    assert elsewhere(run_fake, dtype, strategy) == expected(dtype)


@pytest.mark.parametrize("gradient", ["dense", "sparse"])
@pytest.mark.parametrize("strategy", OPERATORS)
def test_the_traced_graph_holds_the_operators(elsewhere, strategy, gradient):
    described, operators = elsewhere(trace, torch.bfloat16, strategy, gradient)
    assert described == expected(torch.bfloat16)
    assert operators == OPERATORS[strategy]


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export(elsewhere, strict):
    described, operators = elsewhere(export, torch.bfloat16, strict)
    assert described == expected(torch.bfloat16)[:1]
    assert operators == ["pack", "loss"]
