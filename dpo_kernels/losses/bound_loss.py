"""A loss of pairs with beta, options and modifiers fixed: one function of the sequences' log-probs."""

from collections.abc import Sequence
from dataclasses import field, replace
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.loss_interface import LossInputs
from dpo_kernels.losses.base import AutogradLoss
from dpo_kernels.losses.divergence import DIVERGENCES
from dpo_kernels.losses.registry import LOSSES, LossSpec
from dpo_kernels.records import dataclass
from dpo_kernels.shapes import sum_dtype

# The engine fills in this parameter of losses that are means over tokens.
TOKEN_FACTOR = "token_factor"

WITHOUT_KL = (
    ". chosen_kl and rejected_kl are None here: a function that reads them has an attribute needs_kl that is true"
)


@dataclass(frozen=True)
class Part:
    """One loss of a mix, with its weight and its options."""

    spec: LossSpec
    weight: float
    options: tuple[tuple[str, float], ...]


# eq=False keeps the hash by identity: torch 2.11 hashes an object whose call it traces, before it has its fields.
@dataclass(frozen=True, eq=False)
class BoundLoss(AutogradLoss):
    """A loss of pairs with beta, options and modifiers fixed; satisfies ``SequenceLoss``. ``bind`` makes it.

    Attributes:
        parts: the losses that are summed; more than one if ``loss_type`` is a list.
        beta: inverse temperature.
        f_divergence: key of ``DIVERGENCES``.
        f_alpha: parameter of the alpha-divergence.
        nll_weight: weight of the negative log-likelihood of the chosen sequences.
        tensors: what differs by pair, ``(P,)`` float64 each: options given as tensors, ``pair_weights``, and
            ``token_factor``, by which a sum of log-probs is multiplied to be its part of the mean over tokens.
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
        """Names of the parts, joined by "+"."""
        return "+".join(part.spec.name for part in self.parts)

    @property
    def needs_reference(self) -> bool:
        """Whether a part reads the reference's log-probs."""
        return any(part.spec.needs_reference for part in self.parts)

    @property
    def needs_kl(self) -> bool:
        """See ``SequenceLoss``."""
        return any(part.spec.needs_kl for part in self.parts)

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
        """Whether ``token_factor`` must be among the tensors before the loss is called."""
        return self.nll_weight != 0.0 or any(TOKEN_FACTOR in part.spec.filled_by_engine for part in self.parts)

    def bounds(self, sequences: int) -> Sequence[int]:
        """See ``SequenceLoss``: every two sequences are a pair."""
        return range(0, sequences + 1, 2)

    def with_token_factor(self, factor: Tensor, pairs: int) -> "BoundLoss":
        """Return the loss with ``token_factor``, 0-d: the divisor of the loss over that of its terms by token."""
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
        """Return the loss as a string, numbers and one ``(k, P)`` tensor, on the device of ``like``.

        An operator's schema can carry these. ``decode`` is the inverse.
        """
        code = f"{self.name};{self.f_divergence};{','.join(self.tensors)}"
        numbers = [self.f_alpha, self.nll_weight]
        for part in self.parts:
            given = dict(part.options)
            numbers += [part.weight, *(given.get(name, 0.0) for name in part.spec.options)]
        rows = list(self.tensors.values())
        return code, numbers, torch.stack(rows) if rows else like.new_empty(0, 0, dtype=sum_dtype(like.device))

    # --- values and derivatives ---

    def __call__(self, policy_S: Tensor, ref_S: Tensor, counts_S: Tensor, kl_S: Tensor | None = None) -> Tensor:
        """Return the losses ``(P,)`` from ``(S,)`` tensors in which chosen and rejected sequences alternate."""
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
                None if kl_S is None else kl_S[0::2],
                None if kl_S is None else kl_S[1::2],
            )
        )

    def evaluate(self, x: LossInputs) -> Tensor:
        """Return the losses ``(P,)``. Raise if a callable returns anything but one loss for each pair."""
        dtype = x.policy_chosen_logps.dtype
        tensors = {name: value.to(dtype) for name, value in self.tensors.items()}
        scored = self._score_log_ratios(x)
        total = None
        for part in self.parts:
            wanted = (*part.spec.by_pair, *part.spec.filled_by_engine)
            by_pair = {name: tensors[name] for name in wanted if name in tensors}
            part_inputs = scored if part.spec.uses_log_ratios_only else x
            try:
                losses_P = part.spec.fn(part_inputs, **dict(part.options), **by_pair)
            except (AttributeError, TypeError) as error:
                if x.chosen_kl is not None or "NoneType" not in str(error):
                    raise
                raise TypeError(f"loss_type: {part.spec.name} fails ({error}){WITHOUT_KL}") from error
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

    def _score_log_ratios(self, x: LossInputs) -> LossInputs:
        """Replace the policy's log-probs by the f-divergence's scores of the log-ratios, and the reference's by 0."""
        if self.f_divergence == "reverse_kl":
            return x
        score = DIVERGENCES[self.f_divergence]
        return x._replace(
            policy_chosen_logps=score(x.policy_chosen_logps - x.ref_chosen_logps, self.f_alpha),
            policy_rejected_logps=score(x.policy_rejected_logps - x.ref_rejected_logps, self.f_alpha),
            ref_chosen_logps=torch.zeros_like(x.ref_chosen_logps),
            ref_rejected_logps=torch.zeros_like(x.ref_rejected_logps),
        )

    def _check_graph(self, losses: Tensor, leaves: Sequence[Tensor]) -> None:
        """Raise if a separable callable uses another tensor that requires a gradient.

        The fused pass differentiates the loss by log-probs and KL divergences alone, so that tensor would silently get
        no gradient.
        """
        seen: set[Any] = set()
        todo = [losses.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None and all(variable is not leaf for leaf in leaves):
                raise ValueError(
                    f"loss_type: {self.name} is marked separable but uses a tensor of shape {tuple(variable.shape)} "
                    "that requires a gradient, which the fused pass cannot give; detach it, or leave `separable` unset"
                )
            todo.extend(parent for parent, _ in node.next_functions)


def decode(code: str, beta: float, numbers: Sequence[float], tensors: Tensor) -> BoundLoss:
    """Return the loss that ``BoundLoss.encode`` turned into a string, numbers and a ``(k, P)`` tensor."""
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


def _check_result(losses_P: Any, x: LossInputs, name: str) -> None:
    if not isinstance(losses_P, Tensor):
        raise TypeError(
            f"loss_type: {name} must return a tensor, got {type(losses_P).__name__}"
            f"{WITHOUT_KL if losses_P is None and x.chosen_kl is None else ''}"
        )
    if losses_P.shape != x.policy_chosen_logps.shape:
        raise ValueError(
            f"loss_type: {name} must return one loss per pair, shape {tuple(x.policy_chosen_logps.shape)}, "
            f"got {tuple(losses_P.shape)}"
        )
