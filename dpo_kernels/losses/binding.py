"""A loss with beta and options fixed: how names, mixes, modifiers and callables become one function of log-probs."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.checks import check_choice, check_number, check_real, refuse_forward_mode
from dpo_kernels.loss_interface import LossInputs
from dpo_kernels.losses.divergence import DIVERGENCES
from dpo_kernels.losses.registry import LOSSES, LossFunction, LossSpec
from dpo_kernels.shapes import sum_dtype

Loss = str | LossFunction | Sequence[str]
# Every loss takes these beside its own options; f-divergences go with losses of log-ratios only.
MODIFIERS = ("nll_weight", "pair_weights")
DIVERGENCE = ("f_divergence", "f_alpha")
MIX = ("loss_weights",)
TOKEN_FACTOR = "token_factor"


@dataclass(frozen=True)
class Part:
    """One loss of a mix: its weight and options."""

    spec: LossSpec
    weight: float
    options: tuple[tuple[str, float], ...]


@dataclass(frozen=True, eq=False)  # torch 2.11 hashes what it traces a call of, before it has its fields
class BoundLoss:
    """A loss with beta, options and modifiers fixed; satisfies ``SequenceLoss``.

    ``tensors`` holds what differs by pair, ``(P,)`` float64 each: options given as tensors, ``pair_weights``, and
    ``token_factor``, which turns a sum of log-probs into its part of the mean over tokens.
    """

    parts: tuple[Part, ...]
    beta: float
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    nll_weight: float = 0.0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    # --- what the engine must know ---

    @property
    def name(self) -> str:
        """Names of the parts."""
        return "+".join(part.spec.name for part in self.parts)

    @property
    def needs_reference(self) -> bool:
        """Whether a part does."""
        return any(part.spec.needs_reference for part in self.parts)

    @property
    def separable(self) -> bool:
        """Whether a pair's loss depends on that pair alone."""
        return all(part.spec.separable for part in self.parts)

    @property
    def is_callable(self) -> bool:
        """Whether the loss is a user's function, which has no name that an operator could carry."""
        return any(part.spec is not LOSSES.get(part.spec.name) for part in self.parts)

    @property
    def difference(self) -> str | None:
        """See ``SequenceLoss``."""
        kinds = {part.spec.difference for part in self.parts}
        if len(kinds) > 1 or self.nll_weight != 0.0 or self.f_divergence != "reverse_kl":
            return None
        return kinds.pop()

    @property
    def sigmoid(self) -> tuple[float, float] | None:
        """See ``SequenceLoss``."""
        plain = len(self.parts) == 1 and self.parts[0].spec is LOSSES["sigmoid"] and self.parts[0].weight == 1.0
        if not plain or self.tensors or self.nll_weight != 0.0 or self.f_divergence != "reverse_kl":
            return None
        return self.beta, dict(self.parts[0].options)["label_smoothing"]

    @property
    def needs_token_factor(self) -> bool:
        """Whether ``token_factor`` must be among the tensors."""
        return self.nll_weight != 0.0 or any(TOKEN_FACTOR in part.spec.filled_by_engine for part in self.parts)

    def bounds(self, sequences: int) -> Sequence[int]:
        """See ``SequenceLoss``: pairs."""
        return range(0, sequences + 1, 2)

    def with_token_factor(self, factor: Tensor, pairs: int) -> "BoundLoss":
        """The same with ``token_factor``, 0-d: the loss's divisor over that of its token-level terms."""
        if not self.needs_token_factor:
            return self
        return replace(self, tensors={**self.tensors, TOKEN_FACTOR: factor.to(sum_dtype(factor.device)).expand(pairs)})

    def of_examples(self, first: int, last: int) -> "BoundLoss":
        """See ``SequenceLoss``."""
        if not self.tensors:
            return self
        return replace(self, tensors={name: value[first:last] for name, value in self.tensors.items()})

    # --- as an operator's schema can carry it ---

    def encode(self, like: Tensor) -> tuple[str, list[float], Tensor]:
        """(code, numbers, ``(k, P)`` tensors); ``decode`` is the inverse."""
        code = f"{self.name};{self.f_divergence};{','.join(self.tensors)}"
        numbers = [self.f_alpha, self.nll_weight]
        for part in self.parts:
            given = dict(part.options)
            numbers += [part.weight, *(given.get(name, 0.0) for name in part.spec.options)]
        rows = list(self.tensors.values())
        return code, numbers, torch.stack(rows) if rows else like.new_empty(0, 0, dtype=sum_dtype(like.device))

    # --- values and derivatives ---

    def __call__(self, policy_S: Tensor, ref_S: Tensor, counts_S: Tensor) -> Tensor:
        """Losses ``(P,)`` from ``(S,)`` tensors in which chosen and rejected alternate."""
        tokens_S = counts_S.to(policy_S.dtype)
        return self.evaluate(
            LossInputs(
                policy_S[0::2],
                policy_S[1::2],
                ref_S[0::2],
                ref_S[1::2],
                tokens_S[0::2],
                tokens_S[1::2],
                self.beta,
            )
        )

    def evaluate(self, x: LossInputs) -> Tensor:
        """Losses ``(P,)``; refuses what a callable must not return."""
        dtype = x.policy_chosen_logps.dtype
        tensors = {name: value.to(dtype) for name, value in self.tensors.items()}
        scored = self._scored(x)
        total = None
        for part in self.parts:
            wanted = (*part.spec.by_pair, *part.spec.filled_by_engine)
            by_pair = {name: tensors[name] for name in wanted if name in tensors}
            losses_P = part.spec.fn(scored if part.spec.scores else x, **dict(part.options), **by_pair)
            _check_result(losses_P, x, part.spec.name)
            if part.weight != 1.0:
                losses_P = part.weight * losses_P
            total = losses_P if total is None else total + losses_P
        assert total is not None, "a mix has parts"
        if "pair_weights" in tensors:
            total = total * tensors["pair_weights"]
        if self.nll_weight != 0.0:
            total = total - self.nll_weight * x.policy_chosen_logps * tensors[TOKEN_FACTOR]
        return total

    def value_and_grad(self, policy_S: Tensor, ref_S: Tensor, counts_S: Tensor) -> tuple[Tensor, Tensor]:
        """Losses ``(P,)`` and the derivative of their sum by ``policy_S``; detached."""
        with recording_gradients():
            leaf_S = policy_S.detach().requires_grad_()
            losses_P = self(leaf_S, ref_S, counts_S)
            if not losses_P.requires_grad:
                return losses_P.detach(), torch.zeros_like(policy_S)
            _refuse_foreign_leaves(losses_P, leaf_S, self.name)
            (grad_S,) = torch.autograd.grad(losses_P.sum(), leaf_S, allow_unused=True)
        return losses_P.detach(), torch.zeros_like(policy_S) if grad_S is None else grad_S

    def _scored(self, x: LossInputs) -> LossInputs:
        """Log-ratios replaced by their scores under the f-divergence; their reference is then 0."""
        if self.f_divergence == "reverse_kl":
            return x
        score = DIVERGENCES[self.f_divergence]
        return x._replace(
            policy_chosen_logps=score(x.policy_chosen_logps - x.ref_chosen_logps, self.f_alpha),
            policy_rejected_logps=score(x.policy_rejected_logps - x.ref_rejected_logps, self.f_alpha),
            ref_chosen_logps=torch.zeros_like(x.ref_chosen_logps),
            ref_rejected_logps=torch.zeros_like(x.ref_rejected_logps),
        )


# --- binding ----------------------------------------------------------------------------------------------------------


def bind(loss_type: Loss, beta: float, label_smoothing: float, options: dict[str, Any]) -> BoundLoss:
    """Check a loss and its options by name and bind them. The only place that raises about losses.

    ``loss_type`` is a name, a callable, or a sequence of names that are summed with ``loss_weights``. Raises
    ``ValueError`` for an unknown name, an option that the loss does not have or a value out of range, ``TypeError`` for
    a wrong type. Options that are tensors are checked against the batch by ``calls``.
    """
    specs = _find_all(loss_type)
    beta = check_number("beta", beta)
    positive = [spec.name for spec in specs if spec.beta_positive]
    if beta < 0 or (positive and beta == 0):
        raise ValueError(f"beta must be {'> 0 for ' + positive[0] if positive else '>= 0'}, got {beta}")
    given = dict(options)
    label_smoothing = check_number("label_smoothing", label_smoothing)
    if label_smoothing != 0.0 or any("label_smoothing" in spec.options for spec in specs):
        given["label_smoothing"] = label_smoothing
    own = tuple(dict.fromkeys(name for spec in specs for name in spec.options))
    modifiers: tuple[str, ...] = MODIFIERS
    if any(spec.scores for spec in specs):
        modifiers += DIVERGENCE
    if not isinstance(loss_type, str) and not callable(loss_type):
        modifiers += MIX
    _check_names(given, specs, own, modifiers)
    f_divergence = given.pop("f_divergence", "reverse_kl")
    check_choice("f_divergence", f_divergence, tuple(DIVERGENCES))
    f_alpha = check_number("f_alpha", given.pop("f_alpha", 0.5))
    nll_weight = check_number("nll_weight", given.pop("nll_weight", max(spec.nll_weight for spec in specs)))
    weights = _check_weights(given.pop("loss_weights", None), specs)
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor) or name == "pair_weights"}
    parts = []
    for spec, weight in zip(specs, weights, strict=True):
        numbers = {name: given[name] for name in spec.options if name in given and name not in tensors}
        for name, value in numbers.items():
            _check_value(spec, name, value)
        defaults = {name: value for name, value in spec.defaults.items() if name not in tensors}
        for name, value in defaults.items():
            if value is inspect.Parameter.empty and name not in numbers:
                raise ValueError(f"the loss {spec.name!r} needs the option {name}")
        parts.append(Part(spec, weight, tuple((defaults | numbers).items())))
    for name, value in tensors.items():
        tensors[name] = _check_tensor(name, value, specs)
    return BoundLoss(tuple(parts), beta, f_divergence, f_alpha, nll_weight, tensors)


def decode(code: str, beta: float, numbers: Sequence[float], tensors: Tensor) -> BoundLoss:
    """A named loss from what an operator's schema can carry."""
    names, f_divergence, rows = code.split(";")
    kept = dict(zip(rows.split(","), tensors, strict=True)) if rows else {}
    left = list(numbers)
    f_alpha, nll_weight = left.pop(0), left.pop(0)
    parts = []
    for name in names.split("+"):
        spec = LOSSES[name]
        weight = left.pop(0)
        options = tuple((option, left.pop(0)) for option in spec.options)
        parts.append(Part(spec, weight, tuple((option, value) for option, value in options if option not in kept)))
    return BoundLoss(tuple(parts), beta, f_divergence, f_alpha, nll_weight, kept)


def _find_all(loss_type: Loss) -> tuple[LossSpec, ...]:
    if isinstance(loss_type, str):
        return (_find(loss_type),)
    if callable(loss_type):
        # The function's own options, if any, are bound by its author: functools.partial or a closure.
        name = getattr(loss_type, "__name__", type(loss_type).__name__)
        return (LossSpec(name, loss_type, separable=bool(getattr(loss_type, "separable", False))),)
    if not isinstance(loss_type, tuple | list):
        raise TypeError(f"loss_type must be a name or a callable, or a list of names, got {type(loss_type).__name__}")
    if not loss_type:
        raise ValueError("loss_type is empty: a mix has at least one loss")
    for name in loss_type:
        if not isinstance(name, str):
            raise TypeError(f"a mix in loss_type is of names, got {type(name).__name__}")
    if len(set(loss_type)) < len(loss_type):
        raise ValueError(f"loss_type names a loss twice: {', '.join(loss_type)}; give it the sum of its weights")
    return tuple(_find(name) for name in loss_type)


def _find(name: str) -> LossSpec:
    if name not in LOSSES:
        raise ValueError(f"unknown loss_type {name!r}; known: {', '.join(sorted(LOSSES))}, or a callable")
    return LOSSES[name]


def _check_names(
    given: dict[str, Any], specs: Sequence[LossSpec], own: tuple[str, ...], modifiers: tuple[str, ...]
) -> None:
    for name in given:
        if name in own or name in modifiers:
            continue
        loss = "+".join(spec.name for spec in specs)
        known = f"{', '.join(own) or 'none'}; beside them: {', '.join(modifiers)}"
        raise ValueError(f"{name} is not an option of the loss {loss!r}; it has: {known}")


def _check_weights(weights: Any, specs: Sequence[LossSpec]) -> list[float]:
    if weights is None:
        return [1.0] * len(specs)
    if not isinstance(weights, tuple | list):
        raise TypeError(f"loss_weights must be a list of numbers, got {type(weights).__name__}")
    if len(weights) != len(specs):
        raise ValueError(f"loss_weights has {len(weights)} numbers for {len(specs)} losses")
    return [check_number("loss_weights", weight) for weight in weights]


def _check_value(spec: LossSpec, name: str, value: Any) -> None:
    number = check_number(name, value)
    if name in spec.limits:
        low, high = spec.limits[name]
        if not low <= number <= high:
            raise ValueError(f"{name} must lie in [{low}, {high}] for {spec.name!r}, got {value}")


def _check_tensor(name: str, value: Any, specs: Sequence[LossSpec]) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor (P,), got {type(value).__name__}")
    if name != "pair_weights" and not any(name in spec.by_pair for spec in specs):
        raise TypeError(f"{name} must be a real number, got a tensor")
    check_real(name, value)
    if value.dim() > 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected (P,) or ()")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which the loss does not give; detach it")
    refuse_forward_mode(name, value)
    return value


def fit_to_batch(loss: BoundLoss, pairs: int, device: torch.device) -> BoundLoss:
    """Tensor options as ``(P,)`` float64 on the device of the log-probs; raises where they do not fit."""
    fitted = {}
    for name, value in loss.tensors.items():
        if value.dim() == 1 and value.shape[0] != pairs:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected ({pairs},): one number for each pair")
        if value.device != device and (value.dim() or value.device.type != "cpu"):
            raise ValueError(f"{name} is on {value.device} but the log-probs are on {device}: move one of them")
        dtype = torch.float32 if device.type == "mps" else torch.float64
        fitted[name] = value.detach().to(device, dtype).expand(pairs)
    return replace(loss, tensors=fitted) if fitted else loss


def _check_result(losses_P: Any, x: LossInputs, name: str) -> None:
    if not isinstance(losses_P, Tensor):
        raise TypeError(f"loss_type: {name} must return a tensor, got {type(losses_P).__name__}")
    if losses_P.shape != x.policy_chosen_logps.shape:
        raise ValueError(
            f"loss_type: {name} must return one loss per pair, shape {tuple(x.policy_chosen_logps.shape)}, "
            f"got {tuple(losses_P.shape)}"
        )


def _refuse_foreign_leaves(losses_P: Tensor, leaf_S: Tensor, name: str) -> None:
    """A separable loss is differentiated inside the fused pass, by log-probs alone: it can train nothing else."""
    seen: set[Any] = set()
    todo = [losses_P.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and variable is not leaf_S:
            raise ValueError(
                f"loss_type: {name} is marked separable but uses a tensor of shape {tuple(variable.shape)} that "
                "requires a gradient, which the fused pass cannot give; detach it, or leave `separable` unset"
            )
        todo.extend(parent for parent, _ in node.next_functions)


_AUTOGRAD_KEYS = (
    "AutogradFunctionality",
    "AutogradOther",
    "AutogradNestedTensor",
    "AutogradCPU",
    "AutogradCUDA",
)


@contextmanager
def recording_gradients() -> Iterator[None]:
    """Gradient recording even inside a custom operator, where the dispatcher has switched autograd off."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
