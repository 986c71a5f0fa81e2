"""Who is measured: the registry of providers, one module per family.

A provider turns the tensors of a case into a *step*: a callable that runs forward and backward, leaves the gradients in
``data.hidden.grad`` and (unless the head is frozen) ``data.weight.grad``, and returns loss and sequence log-probs. One
that cannot do that here raises ``Unavailable`` with the reason, which becomes its row. Everything that a user would set
up once (modules, compiled functions, preallocated outputs) is made outside the step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks.cases import LEVELS, Case
from benchmarks.data import Data

Variant = dict[str, Any]


class Outputs(NamedTuple):
    """What a step returns, both detached or not."""

    loss: Tensor
    logps: Tensor | None  # (S,), chosen then rejected; None where the provider does not tell


Step = Callable[[], Outputs | None]


class Unavailable(Exception):
    """The provider cannot run this case here; the message is the reason that its row shows."""


def _one_variant(case: Case) -> list[Variant]:
    return [{}]


def _dpo(case: Case) -> str:
    return "dpo"


@dataclass(frozen=True)
class Provider:
    """One row of every table."""

    name: str
    family: str  # "ours", "floor", "yardstick" (not the same work) or the peer: what pictures are grouped by
    about: str  # what it runs, and where its work differs from the others'
    build: Callable[[Data, Variant], Step]
    level: str = "core"  # the least thorough level of a case that includes it
    group: str | None = None  # the only group of cases that it is for; None: all
    variants: Callable[[Case], list[Variant]] = _one_variant  # tried once each, the fastest is measured
    objective: Callable[[Case], str] = _dpo  # one of truth.OBJECTIVES: what its numbers mean
    gated: bool = True  # the floor computes no loss to be judged; what scores other tokens is judged in its own case
    token_logps: Callable[[Data], Tensor] | None = None  # of the scored rows: an accuracy more, where it is to be had
    compiles: tuple[str, ...] = ()  # devices where its first call compiles, and must not be measured

    def runs_in(self, case: Case) -> bool:
        """Whether a case asks for it."""
        return self.group in (None, *case.groups) and LEVELS.index(self.level) >= LEVELS.index(case.level)


def registry() -> dict[str, Provider]:
    """All providers by name, in the order of the tables. Importing the families imports no peer."""
    from benchmarks.providers import heads, ours, peers, plain

    made = [*plain.PROVIDERS, *ours.PROVIDERS, *peers.PROVIDERS, *heads.PROVIDERS]
    return {provider.name: provider for provider in made}
