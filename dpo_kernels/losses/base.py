"""The base classes of the losses: torch autograd differentiates them by the sequences' log-probs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class AutogradLoss:
    """A function of sequence log-probs whose derivative torch autograd computes."""

    def __call__(self, policy_S: Tensor, ref_S: Tensor, counts_S: Tensor) -> Tensor:
        """Return one loss for each example, from the ``(S,)`` log-probs and token counts of all sequences."""
        raise NotImplementedError

    def value_and_grad(self, policy_S: Tensor, ref_S: Tensor, counts_S: Tensor) -> tuple[Tensor, Tensor]:
        """Return one loss for each example and the derivative of their sum by ``policy_S``, both detached.

        The derivative is zero if the losses do not depend on ``policy_S``.
        """
        with recording_gradients():
            leaf_S = policy_S.detach().requires_grad_()
            losses = self(leaf_S, ref_S, counts_S)
            if not losses.requires_grad:
                return losses.detach(), torch.zeros_like(policy_S)
            self._check_graph(losses, leaf_S)
            (grad_S,) = torch.autograd.grad(losses.sum(), leaf_S, allow_unused=True)
        return losses.detach(), torch.zeros_like(policy_S) if grad_S is None else grad_S

    def _check_graph(self, losses: Tensor, leaf_S: Tensor) -> None:
        """Raise if the losses were computed from something that the derivative by ``leaf_S`` leaves out."""


class UnnamedLoss(AutogradLoss):
    """A loss that no operator can name: it holds tensors or sizes of its own, so it is passed as an object.

    The engine treats it like a user's separable callable. No backend computes it in one kernel.
    """

    separable, is_callable, difference, sigmoid = True, True, None, None


# A custom operator runs with these dispatch keys excluded, which switches autograd off.
_AUTOGRAD_KEYS = (
    "AutogradFunctionality",
    "AutogradOther",
    "AutogradNestedTensor",
    "AutogradCPU",
    "AutogradCUDA",
)


@contextmanager
def recording_gradients() -> Iterator[None]:
    """Switch autograd on, even inside a custom operator, where the dispatcher has switched it off."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
