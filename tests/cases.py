"""Problems for the equivalence tests, and how each is run through the oracle and through the library.

The distribution "half-sure": half the labels are the head's first choice, half are random, and the logits are peaked
enough for the mean probability of a label to lie between 0.1 and 0.5, as in a model that has learned something.
"""

import itertools
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import dpo_kernels
from dpo_kernels.engine import autograd, operators
from dpo_kernels.inputs import packing
from dpo_kernels.kernels import extension
from dpo_kernels.kernels.cpp import CppKernels
from dpo_kernels.reference import dpo_loss_reference
from tests.tolerance import violations

# Small, and nothing divides anything: V is odd, lengths are ragged, one sequence is masked whole.
LENGTHS = (9, 7, 1, 8, 5, 6)
PROMPTS = (3, 0, 0, 8, 2, 1)
HIDDEN, REF_HIDDEN, VOCAB = 24, 16, 211

# Scratch that makes each strategy show what it can do: (strategy, scratch_bytes).
STRATEGIES = {
    "chunked": ("chunked", None),
    "chunked-tiny": ("chunked", 3 * VOCAB * 8 * 2),  # a few rows: every longer pair is oversized
    "recompute": ("recompute", None),
    "recompute-tiles": ("recompute", 8192),  # the vocabulary is cut
    "streaming": ("streaming", 16384),
}


def strategy_and_scratch(strategy: str, backend: str, dtype: torch.dtype) -> tuple[str, int | None]:
    """``STRATEGIES`` by dtype: logits of 16 bits get a third, or the few rows would hold every pair."""
    name, scratch = STRATEGIES[strategy]
    if scratch is None or strategy != "chunked-tiny" or backend != "cpp" or extension.why_not("cpu") is not None:
        return name, scratch
    return name, scratch // 3 if CppKernels.can_code_logits(dtype) else scratch


LAYOUTS = {
    "padded": {"layout": "padded"},
    "padded-shift-interleaved": {"layout": "padded", "shift": True, "pairs": "interleaved"},
    "packed": {"layout": "packed"},
    "packed-shift-interleaved": {"layout": "packed", "shift": True, "pairs": "interleaved"},
}
REFERENCES = ("hidden", "shared", "cached", "free")
RICH = {"softcap": 12.0, "logit_scale": 0.7, "stats": ("entropy", "mean_logits", "top1", "log_sum_p2")}


@dataclass(frozen=True)
class Case:
    """One problem: what kind of inputs, and which options."""

    dtype: torch.dtype = torch.float32
    layout: str = "padded"  # padded, packed
    pairs: str = "stacked"
    shift: bool = False
    reference: str = "cached"  # hidden, shared, cached, free; none for a loss that has no reference
    frozen: bool = False
    bias: bool = False
    weights: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
        """Inputs, rounded to the dtype; ``hidden`` and, unless frozen, the head require a gradient."""
        g = torch.Generator().manual_seed(seed)
        count, longest = len(LENGTHS), max(LENGTHS) + 2

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=g) * scale).to(self.dtype)

        hidden = normal(count, longest, HIDDEN)
        weight = normal(VOCAB, HIDDEN, scale=1.2)
        bias = normal(VOCAB, scale=0.5)
        logits = hidden.double() @ weight.double().t() + (bias.double() if self.bias else 0.0)
        random = torch.randint(0, VOCAB, (count, longest), generator=g)
        sure = torch.rand(count, longest, generator=g) < 0.5
        labels = torch.where(sure, logits.argmax(-1), random)
        if self.shift:
            labels = torch.cat([random[:, :1], labels[:, :-1]], dim=1)
        place = torch.arange(longest)
        length, prompt = torch.tensor(LENGTHS)[:, None], torch.tensor(PROMPTS)[:, None]
        labels = labels.masked_fill((place >= length) | (place < prompt), -100)
        inputs: dict[str, Any] = {"hidden": hidden, "weight": weight, "labels": labels}
        if self.bias:
            inputs["bias"] = bias
        if self.weights:
            inputs["token_weights"] = torch.rand(count, longest, generator=g) + 0.25
        if self.reference in ("hidden", "shared"):
            width = HIDDEN if self.reference == "shared" else REF_HIDDEN
            inputs["ref_hidden"] = normal(count, longest, width)
        if self.reference == "hidden":
            inputs["ref_weight"] = normal(VOCAB, REF_HIDDEN)
        if self.layout == "packed":
            keep = place < length
            for name in ("hidden", "labels", "token_weights", "ref_hidden"):
                if name in inputs:
                    inputs[name] = inputs[name][keep]
            inputs["cu_seqlens"] = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
        if self.reference == "cached":
            inputs["ref_logps"] = torch.randn(count, generator=g, dtype=torch.float64).to(torch.float32) * 5 - 20
        inputs = {name: value.to(device) for name, value in inputs.items()}
        inputs["hidden"].requires_grad_()
        for name in ("weight", "bias"):
            if name in inputs and not self.frozen:
                inputs[name].requires_grad_()
        return inputs

    def keywords(self) -> dict[str, Any]:
        """Options of the call."""
        base = {
            "pairs": self.pairs,
            "shift": self.shift,
            "beta": 0.3,
            "reference_free": self.reference == "free",
        }
        return base | self.options

    def but(self, **changes: Any) -> "Case":
        """A variant."""
        return replace(self, **changes)


LEAVES = ("hidden", "weight", "bias")
RESULTS = (
    "loss",
    "chosen_rewards",
    "rejected_rewards",
    "chosen_logps",
    "rejected_logps",
    "ref_chosen_logps",
    "ref_rejected_logps",
)


def run(function: Any, inputs: dict[str, Any], upstream: Tensor | float = 1.0, **keywords: Any) -> dict[str, Tensor]:
    """Results and gradients of one call by name."""
    leaves = {name: inputs[name] for name in LEAVES if name in inputs and inputs[name].requires_grad}
    out = function(**inputs, **keywords)
    results = {name: getattr(out, name).detach() for name in RESULTS}
    results |= {f"stats.{name}": value for name, value in out.stats.items()}
    if leaves:
        seed = upstream if isinstance(upstream, Tensor) else torch.full_like(out.loss, upstream)
        grads = torch.autograd.grad(out.loss, list(leaves.values()), seed.to(out.loss.dtype))
        results |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same rounded numbers in float64."""
    wide = {}
    for name, value in inputs.items():
        wide[name] = value
        if isinstance(value, Tensor) and value.is_floating_point():
            wide[name] = value.detach().double().requires_grad_(value.requires_grad)
    return wide


def rounded_tile(backend: str, dtype: torch.dtype, device_type: str = "cpu") -> bool:
    """Whether a backend's gradient GEMMs read a 16-bit dtype: on a GPU always, on a CPU if it multiplies bfloat16.

    Triton's kernels do the same in the interpreter as on a GPU. ``auto`` is the C++ backend on a CPU that has it.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if device_type == "cuda" or backend == "triton":
        return True
    if backend not in ("cpp", "auto") or extension.why_not("cpu") is not None:
        return False
    return CppKernels(dtype, 0).rounds_operands(torch.empty(0))


def broken_rules(
    case: Case,
    strategy: str = "chunked",
    backend: str = "torch",
    upstream: Tensor | float = 1.0,
    device: str = "cpu",
) -> list[str]:
    """Run a case three ways and say which results break the tolerance rule."""
    return broken_by(case.tensors(device=device), case.keywords(), case.dtype, strategy, backend, upstream)


def broken_over_forms(
    dtype: torch.dtype, layout: str, strategy: str, backend: str, device: str = "cpu"
) -> dict[tuple[str, bool, bool], list[str]]:
    """What breaks over every form of reference, trainable and frozen heads, plain and rich options."""
    broken = {}
    for reference, frozen, rich in itertools.product(REFERENCES, (False, True), (False, True)):
        case = Case(
            dtype,
            reference=reference,
            frozen=frozen,
            bias=rich,
            weights=rich,
            options=RICH if rich else {},
            **LAYOUTS[layout],
        )
        rules = broken_rules(case, strategy, backend, device=device)
        if rules:
            broken[reference, frozen, rich] = rules
    return broken


def broken_by(
    inputs: dict[str, Any],
    keywords: dict[str, Any],
    dtype: torch.dtype,
    strategy: str = "chunked",
    backend: str = "torch",
    upstream: Tensor | float = 1.0,
    saturated: bool = False,
) -> list[str]:
    """The same for given inputs."""
    name, scratch = strategy_and_scratch(strategy, backend, dtype)
    how = {"strategy": name, "scratch_bytes": scratch, "backend": backend}
    got = run(dpo_kernels.fused_dpo_loss, inputs, upstream, **how, **keywords)
    return broken_results(got, inputs, keywords, dtype, backend, upstream, saturated)


def broken_results(
    got: dict[str, Tensor],
    inputs: dict[str, Any],
    keywords: dict[str, Any],
    dtype: torch.dtype,
    backend: str = "torch",
    upstream: Tensor | float = 1.0,
    saturated: bool = False,
) -> list[str]:
    """The same for results that have been computed from these inputs."""
    oracle = run(dpo_loss_reference, widened(inputs), upstream, **keywords)
    plain = run(dpo_loss_reference, inputs, upstream, **keywords)
    assert got.keys() == oracle.keys()
    broken = []
    for key, value in got.items():
        gradient = key in ("dhidden", "dweight", "dbias")
        broken += violations(
            key,
            value,
            oracle[key],
            plain[key],
            dtype,
            gradient=gradient,
            saturated=saturated,
            two_roundings=key == "dweight" and rounded_tile(backend, dtype, inputs["hidden"].device.type),
        )
        expected = dtype if gradient else torch.float64 if dtype == torch.float64 else torch.float32
        if value.dtype != expected and not key.startswith("stats."):
            broken.append(f"{key}: {value.dtype}, expected {expected}")
    return broken


# What brings every custom operator with every kind of argument.
OPERATOR_CALLS = {
    "fused pass": {},
    "fused pass, weighted, bias": {"bias": True, "weights": True},
    "log-probs": {"options": {"strategy": "recompute", "stats": ("entropy", "top1")}},
    "log-probs, frozen head": {"frozen": True, "options": {"reduction": "none"}},
    "streaming": {"options": {"strategy": "streaming", "softcap": 9.0}},
    "static capacity": {"options": {"max_scored_tokens": 60}},
    "packed, computed reference": {"layout": "packed", "reference": "hidden", "shift": True},
}


def recorded_operators(monkeypatch: Any, case: Case, backend: str = "auto") -> list[tuple[Any, tuple[Any, ...]]]:
    """Arguments of every operator that a call and its backward run, when everything goes through operators."""
    seen = []

    class Recorder:
        def __init__(self, op: Any) -> None:
            self.op = op

        def __call__(self, *args: Any) -> Any:
            seen.append((self.op, args))
            return self.op(*args)

    with monkeypatch.context() as patches:
        for module in (packing, autograd):
            patches.setattr(module, "traced", lambda tensor: True)
        patches.setattr(packing, "pack_operator", Recorder(packing.pack_operator))
        for name in [name for name in vars(operators) if name.endswith("_operator")]:
            patches.setattr(operators, name, Recorder(getattr(operators, name)))
        out = dpo_kernels.fused_dpo_loss(**case.tensors(), **case.keywords(), backend=backend)
        out.loss.sum().backward()
    return seen


def failed_opchecks(operators: list[tuple[Any, tuple[Any, ...]]]) -> list[tuple[str, dict[str, Any]]]:
    """Which of the recorded operators are registered wrongly, by ``torch.library.opcheck``."""
    failed = []
    for op, args in operators:
        forward = not op._qualname.endswith("_backward")  # backward operators run where nothing is recorded
        leaves = tuple(
            a.detach().requires_grad_(a.requires_grad and forward) if isinstance(a, Tensor) else a for a in args
        )
        with warnings.catch_warnings():
            # From torch 2.14 on opcheck itself reads ``.grad`` of what is no leaf, for any operator.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
            results = torch.library.opcheck(op, leaves, raise_exception=False)
        if set(results.values()) != {"SUCCESS"}:
            failed.append((op._qualname, results))
    return failed


def registered_operators() -> set[str]:
    """The package's differentiable operators, as torch knows them; those of the extension run inside them."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("dpo_kernels::")}
    return names - {f"dpo_kernels::{name}" for name in extension.OPERATORS}
