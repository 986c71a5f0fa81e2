"""A default device other than that of the tensors: every tensor of ours says where it is to be.

``torch.set_default_device`` and ``with torch.device(...)`` are ordinary in training scripts, and models are built under
``torch.device("meta")``; what a call makes for itself must lie where its arguments do.
"""

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils._device import _device_constructors

import dpo_kernels as dk
from tests.cases import LEAVES, RICH, STRATEGIES, Case
from tests.small import BACKENDS

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def context():
    with torch.device("meta"):
        yield


@contextmanager
def default():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


WAYS = (context, default)


def tensors_of(result):
    """Everything in a result that is a tensor."""
    if isinstance(result, torch.Tensor):
        return [result]
    parts = result.values() if isinstance(result, dict) else result
    return [tensor for part in parts for tensor in tensors_of(part)]


def with_gradients(out, inputs):
    """A result with the gradients of its first tensor."""
    leaves = [inputs[name] for name in LEAVES if name in inputs and inputs[name].requires_grad]
    first = tensors_of(out)[0]
    return [*tensors_of(out), *torch.autograd.grad(first, leaves, torch.ones_like(first))]


DESIRABLE = torch.tensor([True, False, False, True, True, False])
LOGPS = [torch.tensor(values) for values in ([-3.0, -4.0], [-5.0, -2.5], [-3.5, -4.5], [-4.0, -4.0])]
HALF = torch.tensor(0.5)
WINS = torch.tensor([[0, 8, 3], [4, 0, 5], [5, 3, 0]])
LABELS = torch.tensor([[-100, 1, 2], [3, 4, 5], [-100, -100, 1], [2, 2, -100]])


def pairs(how, **options):
    """``fused_dpo_loss`` of one kind of problem."""

    def call():
        case = Case(**how, options=options)
        inputs = case.tensors()
        return lambda where: with_gradients(dk.fused_dpo_loss(**inputs, **case.keywords(), **where), inputs)

    return call


def module():
    case = Case(bias=True, weights=True)
    inputs = case.tensors()
    return lambda where: with_gradients(dk.FusedDPOLoss(beta=0.3, **where)(**inputs), inputs)


def kto():
    inputs = Case().tensors()
    return lambda where: with_gradients(
        dk.fused_kto_loss(**inputs, desirable=DESIRABLE, kl=0.7, desirable_weight=2.0, **where), inputs
    )


def bco():
    inputs = Case().tensors()

    def call(where):
        delta = dk.RunningDelta()
        dk.fused_kto_loss(**inputs, desirable=DESIRABLE, loss_type="bco", delta=delta.value, **where)
        delta.update(LOGPS[0], LOGPS[1])
        again = dk.RunningDelta()
        again.load_state_dict(delta.state_dict())
        delta.update(LOGPS[2], LOGPS[3])
        out = dk.fused_kto_loss(**inputs, desirable=DESIRABLE, loss_type="bco", delta=delta.value, **where)
        return [delta.value, again.value, *with_gradients(out, inputs)]

    return call


def groups():
    inputs = Case().tensors()
    return lambda where: with_gradients(dk.fused_group_loss(**inputs, group_sizes=[2, 1, 3], **where), inputs)


def sparse_head():
    inputs = Case().tensors()

    def call(where):
        options = {"gradient": "sparse", "tau": 0.01, "sparse_weight_grad": True}
        inputs["weight"].grad = None
        dk.fused_dpo_loss(**inputs, **options, **where).loss.backward()
        grad = inputs["weight"].grad
        return [grad.coalesce().indices(), grad.coalesce().values(), grad.to_dense()]

    return call


def log_probs(function):
    def call():
        inputs = Case(bias=True, reference="free").tensors()
        return lambda where: with_gradients(function(**inputs, shift=True, **where), inputs)

    return call


def plan():
    inputs = Case().tensors()
    return lambda where: [torch.tensor(len(str(dk.explain(**inputs, **where))), device="cpu")]


def warm_up():
    """Packed and weighted, so that the call makes every tensor that it can make."""
    inputs = Case(layout="packed", weights=True, reference="hidden").tensors()
    of_a_batch = {name: value for name, value in inputs.items() if name not in ("hidden", "weight", "labels")}
    return lambda where: [torch.tensor(len(str(dk.warm_up(inputs["weight"], 1, **of_a_batch, **where))), device="cpu")]


def main_grad():
    inputs = Case().tensors()

    def call(where):
        buffer = torch.zeros_like(inputs["weight"], requires_grad=False)
        loss = dk.fused_dpo_loss(**inputs, main_grad=buffer, main_grad_scale=2.0, **where).loss
        return [loss, *torch.autograd.grad(2 * loss, inputs["hidden"]), buffer]

    return call


ALL_OF_THEM = ("entropy", "mean_logits", "top1", "log_sum_p2", "token_logps")
EVERY = ("chunked", "chunked-tiny", "recompute-tiles", "streaming")
WHOLE = ("chunked", "recompute-tiles", "streaming")  # a longer unit is refused
# What is called on the head, and by which strategies.
CALLS = {
    "cached reference": (pairs({}), EVERY),
    "scored reference, weights, bias": (pairs({"reference": "hidden", "weights": True, "bias": True}, **RICH), EVERY),
    "packed, shifted": (pairs({"layout": "packed", "shift": True}, stats=ALL_OF_THEM), EVERY),
    "static capacity": (pairs({"bias": True}, max_scored_tokens=60, stats=("token_logps",)), WHOLE),
    "frozen": (pairs({"frozen": True, "reference": "shared"}, denominator=3.0), EVERY),
    "bfloat16": (pairs({"dtype": torch.bfloat16}, denominator=HALF), EVERY),
    "a mix": (
        pairs({}, loss_type=("sigmoid", "ipo", "sft"), loss_weights=(1.0, 0.5, 0.25), token_denominator=7.0),
        EVERY,
    ),
    "margins": (pairs({}, loss_type="odpo", margin=torch.tensor([0.1, 0.2, 0.3]), nll_weight=0.5), EVERY),
    "module": (module, EVERY),
    "kto": (kto, EVERY),
    "bco": (bco, EVERY),
    "groups": (groups, WHOLE),
    "explain": (plan, EVERY),
    "warm_up": (warm_up, ("chunked", "streaming")),
    "token log-probs": (log_probs(dk.fused_token_logps), WHOLE[1:]),
    "sequence log-probs": (log_probs(dk.fused_sequence_logps), WHOLE[1:]),
    "by pair": (pairs({}, reduction="none"), WHOLE[1:]),
    "coupled": (pairs({}, loss_type="aot"), WHOLE[1:]),
    "main_grad": (main_grad, EVERY[:2]),
    "sparse gradient of the head": (sparse_head, EVERY[:1]),
}
BESIDE = {
    "dpo_loss": lambda: dk.dpo_loss(*LOGPS, loss_type="ipo", token_denominator=3.0, nll_weight=1.0),
    "dpo_loss, reference-free": lambda: dk.dpo_loss(*LOGPS[:2], None, None, reference_free=True),
    "kto_kl": lambda: dk.kto_kl(LOGPS[0], LOGPS[1]),
    "bradley_terry_loss": lambda: dk.bradley_terry_loss(LOGPS[0], LOGPS[1], margin=0.5),
    "bradley_terry_strengths": lambda: dk.bradley_terry_strengths(WINS),
    "bradley_terry_strengths of one": lambda: dk.bradley_terry_strengths(WINS[:1, :1]),
    "ld_token_weights": lambda: dk.ld_token_weights(LABELS, 0.5, shift=True),
    "ld_token_weights, packed": lambda: dk.ld_token_weights(
        LABELS.flatten(), 0.5, cu_seqlens=torch.tensor([0, 2, 6, 9, 12], device="cpu"), pairs="interleaved"
    ),
    "metrics": lambda: dk.DPOLossOutput(HALF, *LOGPS, *LOGPS[:2], {"tokens": torch.ones(4, device="cpu")}).metrics(),
    "wpo_pair_weights": lambda: dk.wpo_pair_weights(
        dk.DPOLossOutput(
            HALF, *LOGPS, *LOGPS[:2], {name: torch.ones(4, device="cpu") for name in ("tokens", "log_sum_p2")}
        )
    ),
}


def assert_same(found, wanted):
    assert len(found) == len(wanted) > 0
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.device.type == "cpu"
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_calls_on_the_head(name, backend):
    call, strategies = CALLS[name]
    run = call()
    for strategy in strategies:
        asked, scratch = STRATEGIES[strategy]
        where = {"strategy": asked, "scratch_bytes": scratch, "backend": backend}
        wanted = run(where)
        with default():
            found = run(where)
        assert_same(found, wanted)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_them(name, way):
    wanted = tensors_of(BESIDE[name]())
    with way():
        found = tensors_of(BESIDE[name]())
    assert_same(found, wanted)


def test_a_step_within_a_context():
    run = module()
    where = {"strategy": "chunked", "scratch_bytes": None}
    wanted = run(where)
    with context():
        found = run(where)
    assert_same(found, wanted)


def test_every_public_function_is_among_them():
    called = Path(__file__).read_text(encoding="utf-8")
    functions = {name for name in dk.__all__ if callable(getattr(dk, name)) and name[0].islower()}
    functions |= {"FusedDPOLoss", "RunningDelta"}
    functions -= {"empty_cache"}  # it makes no tensor
    assert functions
    assert [name for name in sorted(functions) if f"dk.{name}" not in called] == []


# --- the source -------------------------------------------------------------------------------------------------------

# What torch itself moves to the default device, by the last part of its name: read from torch, so that none is missing.
FACTORIES = {function.__name__ for function in _device_constructors()}


def without_a_device(source):
    """Lines of a source that make a tensor of torch's without saying where."""
    tree = ast.parse(source)
    roots, names = set(), set()  # what this file calls torch, and functions imported from it by name
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {
                alias.asname or alias.name.split(".")[0] for alias in node.names if alias.name.split(".")[0] == "torch"
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names |= {alias.asname or alias.name for alias in node.names if alias.name in FACTORIES}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function, at = node.func, node.func
        while isinstance(at, ast.Attribute):
            at = at.value
        root = at.id if isinstance(at, ast.Name) else None
        factory = (isinstance(function, ast.Attribute) and function.attr in FACTORIES and root in roots) or (
            isinstance(function, ast.Name) and function.id in names
        )
        device = next((word.value for word in node.keywords if word.arg == "device"), None)
        if factory and (device is None or (isinstance(device, ast.Constant) and device.value is None)):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("folder", ["dpo_kernels", "examples", "demo", "benchmarks"])
def test_every_factory_call_says_its_device(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert len(files) > 2
    found = [f"{path.relative_to(ROOT)}:{line}" for path in files for line in without_a_device(path.read_text("utf-8"))]
    assert found == []


PLANTED = {
    "import torch\nx = torch.zeros(3)": 1,
    "import torch as th\nx = th.full((2,), 1.0)": 1,
    "from torch import arange\nx = arange(3)": 1,
    "import torch\nx = torch.empty(3, device=None)": 1,
    "import torch\nx = torch.tensor([1]).to('cuda')": 1,
    "import torch\nx = torch.nested.nested_tensor([])": 1,
    "import torch\nx = torch.zeros(3, device='cpu') + torch.ones(3)": 1,
    "import torch\nx = torch.zeros(3, device=y.device)": 0,
    "import torch\nx = y.new_zeros(3) + torch.zeros_like(y)": 0,
    "import numpy\nx = numpy.zeros(3)": 0,
}


@pytest.mark.parametrize("source", PLANTED)
def test_the_search_finds_what_is_planted(source):
    assert len(without_a_device(source)) == PLANTED[source]
