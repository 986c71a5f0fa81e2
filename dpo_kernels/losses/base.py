"""The base classes of the losses: torch autograd differentiates them by the sequences' log-probs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class AutogradLoss:
    """A function of sequence log-probs whose derivative torch autograd computes."""

    def __call__(self, policy_S: Tensor, ref_S: Tensor, counts_S: Tensor, kl_S: Tensor | None = None) -> Tensor:
        """Return one loss for each example, from the ``(S,)`` log-probs and token counts of all sequences.

        ``kl_S`` are the sequences' KL divergences, for a loss with ``needs_kl``.
        """
        raise NotImplementedError

    def value_and_grad(self, policy_S: Tensor, ref_S: Tensor, counts_S: Tensor) -> tuple[Tensor, Tensor]:
        """Return one loss for each example and the derivative of their sum by ``policy_S``, both detached.

        The derivative is zero if the losses do not depend on ``policy_S``.
        """
        losses, (grad_S,) = self._differentiated(lambda leaf_S: self(leaf_S, ref_S, counts_S), policy_S)
        return losses, grad_S

    def value_and_grads(
        self, policy_S: Tensor, ref_S: Tensor, counts_S: Tensor, kl_S: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do the same with ``kl_S``, and return the derivative by it too."""
        losses, (grad_S, kl_grad_S) = self._differentiated(
            lambda leaf_S, kl_leaf_S: self(leaf_S, ref_S, counts_S, kl_leaf_S), policy_S, kl_S
        )
        return losses, grad_S, kl_grad_S

    def _differentiated(self, of: Callable[..., Tensor], *values: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return a function's losses and the derivatives of their sum by its arguments, 0 where it ignores one."""
        with recording_gradients():
            leaves = [value.detach().requires_grad_() for value in values]
            losses = of(*leaves)
            if not losses.requires_grad:
                return losses.detach(), [torch.zeros_like(value) for value in values]
            self._check_graph(losses, leaves)
            grads = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
        found = [torch.zeros_like(value) if grad is None else grad for value, grad in zip(values, grads, strict=True)]
        return losses.detach(), found

    def _check_graph(self, losses: Tensor, leaves: Sequence[Tensor]) -> None:
        """Raise if the losses were computed from something that the derivatives by ``leaves`` leave out."""


class UnnamedLoss(AutogradLoss):
    """A loss that no operator can name: it holds tensors or sizes of its own, so it is passed as an object.

    The engine treats it like a user's separable callable. No backend computes it in one kernel.
    """

    separable, is_callable, difference, sigmoid, needs_kl = True, True, None, None, False


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
