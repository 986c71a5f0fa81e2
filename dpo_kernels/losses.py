"""The family of preference losses: one pure function of sequence log-probs each.

A loss sees ``LossInputs`` (``(P,)`` float64 tensors) and returns ``(P,)``; it knows no vocabulary. Its derivative
is torch autograd on these few numbers. To add one: write the function here, a row in ``tests/test_losses.py`` and a
row in the README's table.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels.checks import check_number
from dpo_kernels.types import LossInputs

LossFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class LossSpec:
    """A member of the family: its function and what the engine must know about it.

    ``difference`` is "sum" or "mean" if the function depends on log-probs only through chosen minus rejected (sums
    or averages). ``limits`` are closed intervals of the options; ``beta_positive`` forbids beta = 0.
    """

    name: str
    fn: LossFunction
    separable: bool = True
    needs_reference: bool = True
    difference: str | None = None
    beta_positive: bool = False
    limits: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the keyword options that the function takes."""
        parameters = inspect.signature(self.fn).parameters.values()
        return tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)

    @property
    def defaults(self) -> dict[str, Any]:
        """Default values of the options."""
        parameters = inspect.signature(self.fn).parameters
        return {name: parameters[name].default for name in self.options}


LOSSES: dict[str, LossSpec] = {}


def register(**facts: Any) -> Callable[[LossFunction], LossFunction]:
    """Enter the decorated function into the family under its own name."""

    def enter(fn: LossFunction) -> LossFunction:
        LOSSES[fn.__name__] = LossSpec(name=fn.__name__, fn=fn, **facts)
        return fn

    return enter


def _logratio_difference(x: LossInputs) -> Tensor:
    chosen = x.policy_chosen_logps - x.ref_chosen_logps
    rejected = x.policy_rejected_logps - x.ref_rejected_logps
    return chosen - rejected


@register(difference="sum", limits={"label_smoothing": (0.0, 0.5)})
def sigmoid(x: LossInputs, *, label_smoothing: float = 0.0) -> Tensor:
    """DPO, ``-log sigmoid(u)``, Rafailov et al., arXiv 2305.18290, eq. 7; smoothed it is cDPO.

    ``u = beta * [(logp_w - ref_w) - (logp_l - ref_l)]``. With smoothing e,
    ``-(1 - e) log sigmoid(u) - e log sigmoid(-u)`` (Mitchell, "A note on DPO with noisy preferences", 2023, eq. 3).
    """
    u = x.beta * _logratio_difference(x)
    if label_smoothing == 0.0:
        return -F.logsigmoid(u)
    return -(1.0 - label_smoothing) * F.logsigmoid(u) - label_smoothing * F.logsigmoid(-u)


@register(difference="sum")
def hinge(x: LossInputs) -> Tensor:
    """``max(0, 1 - u)`` on DPO's margin: SLiC-HF's hinge, Zhao et al., arXiv 2305.10425, eq. 1, as RSO has it.

    RSO is Liu et al., arXiv 2309.06657, eq. 9 ("hinge-norm").
    """
    return F.relu(1.0 - x.beta * _logratio_difference(x))


@register(difference="mean", beta_positive=True)
def ipo(x: LossInputs) -> Tensor:
    """IPO, ``(h - 1 / (2 beta))^2``, Azar et al., arXiv 2310.12036, eq. 17, on log-ratios per token.

    The averages (over scored tokens, at least 1) are the authors' later recommendation and what TRL computes.
    """
    chosen = (x.policy_chosen_logps - x.ref_chosen_logps) / x.chosen_tokens.clamp(min=1)
    rejected = (x.policy_rejected_logps - x.ref_rejected_logps) / x.rejected_tokens.clamp(min=1)
    return (chosen - rejected - 1.0 / (2.0 * x.beta)).square()


@dataclass(frozen=True)
class BoundLoss:
    """A loss with beta and options fixed; satisfies ``types.PairLoss``."""

    spec: LossSpec
    beta: float
    options: tuple[tuple[str, float], ...]

    @property
    def difference(self) -> str | None:
        """See ``types.PairLoss``."""
        return self.spec.difference

    @property
    def is_callable(self) -> bool:
        """Whether the loss is a user's function, which has no name that an operator could carry."""
        return self.spec is not LOSSES.get(self.spec.name)

    @property
    def sigmoid(self) -> tuple[float, float] | None:
        """See ``types.PairLoss``."""
        return (self.beta, dict(self.options)["label_smoothing"]) if self.spec is LOSSES["sigmoid"] else None

    @property
    def separable(self) -> bool:
        """Whether a pair's loss depends on that pair alone."""
        return self.spec.separable

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
        losses_P = self.spec.fn(x, **dict(self.options))
        if not isinstance(losses_P, Tensor):
            raise TypeError(f"loss_type: {self.spec.name} must return a tensor, got {type(losses_P).__name__}")
        if losses_P.shape != x.policy_chosen_logps.shape:
            raise ValueError(
                f"loss_type: {self.spec.name} must return one loss per pair, shape "
                f"{tuple(x.policy_chosen_logps.shape)}, got {tuple(losses_P.shape)}"
            )
        return losses_P

    def value_and_grad(self, policy_S: Tensor, ref_S: Tensor, counts_S: Tensor) -> tuple[Tensor, Tensor]:
        """Losses ``(P,)`` and the derivative of their sum by ``policy_S``; detached."""
        with _recording_gradients():
            leaf_S = policy_S.detach().requires_grad_()
            losses_P = self(leaf_S, ref_S, counts_S)
            if not losses_P.requires_grad:
                return losses_P.detach(), torch.zeros_like(policy_S)
            _refuse_foreign_leaves(losses_P, leaf_S, self.spec.name)
            (grad_S,) = torch.autograd.grad(losses_P.sum(), leaf_S, allow_unused=True)
        return losses_P.detach(), torch.zeros_like(policy_S) if grad_S is None else grad_S


def bind(loss_type: str | LossFunction, beta: float, label_smoothing: float, options: dict[str, Any]) -> BoundLoss:
    """Check a loss and its options by name and bind them. The only place that raises about losses.

    Raises ``ValueError`` for an unknown name, an option the loss does not have or a value out of range, ``TypeError``
    for a wrong type.
    """
    spec = _find(loss_type)
    beta = check_number("beta", beta)
    if beta < 0 or (spec.beta_positive and beta == 0):
        raise ValueError(f"beta must be {'> 0 for ' + spec.name if spec.beta_positive else '>= 0'}, got {beta}")
    given = dict(options)
    label_smoothing = check_number("label_smoothing", label_smoothing)
    if "label_smoothing" in spec.options or label_smoothing != 0.0:
        given["label_smoothing"] = label_smoothing
    for name, value in given.items():
        if name not in spec.options:
            known = ", ".join(spec.options) or "none"
            raise ValueError(f"{name} is not an option of the loss {spec.name!r}; it has: {known}")
        if name in spec.limits:
            low, high = spec.limits[name]
            if not low <= check_number(name, value) <= high:
                raise ValueError(f"{name} must lie in [{low}, {high}] for {spec.name!r}, got {value}")
    return BoundLoss(spec, beta, tuple((spec.defaults | given).items()))


def rebind(name: str, beta: float, values: Sequence[float]) -> BoundLoss:
    """A named loss from what an operator's schema can carry; ``values`` follow the order of the spec's options."""
    spec = LOSSES[name]
    return BoundLoss(spec, beta, tuple(zip(spec.options, values, strict=True)))


def _find(loss_type: str | LossFunction) -> LossSpec:
    if isinstance(loss_type, str):
        if loss_type not in LOSSES:
            raise ValueError(f"unknown loss_type {loss_type!r}; known: {', '.join(sorted(LOSSES))}, or a callable")
        return LOSSES[loss_type]
    if callable(loss_type):
        # The function's own options, if any, are bound by its author: functools.partial or a closure.
        name = getattr(loss_type, "__name__", type(loss_type).__name__)
        return LossSpec(name, loss_type, separable=bool(getattr(loss_type, "separable", False)))
    raise TypeError(f"loss_type must be a name or a callable, got {type(loss_type).__name__}")


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
def _recording_gradients() -> Iterator[None]:
    """Gradient recording even inside a custom operator, where the dispatcher has switched autograd off."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
