"""Log-probs of single tokens with a head that ZeRO-3 gathers for TRL's function only, in forward and in backward."""

from typing import Any

import torch
from torch import Tensor

from dpo_kernels.integrations.token_logps import (
    differentiable_entropy,
    head_options,
    same_dtype,
    scored,
    token_logps,
)


def gathered_token_logps(*given: Any) -> tuple[Tensor | None, ...]:
    """Do as ``token_logps`` does, for a head whose weights are gone when the backward begins.

    TRL gathers the head of ZeRO-3 around its function. So nothing of the forward is kept but hidden states. The
    backward gathers the head again, and computes its gradients in one go: four GEMM passes in all with a trainable
    head, three with a frozen one. Every rank must run it, also one without tokens.

    Args:
        *given: the arguments of ``token_logps``, all of them and in order.

    Returns:
        As ``token_logps``. Log-probs and entropy are differentiable.

    Raises:
        ValueError, TypeError: as in ``token_logps``.

    Example:
        >>> hidden = torch.zeros(2, 4, requires_grad=True)
        >>> logps, *_ = gathered_token_logps(hidden, torch.ones(3, 4), None, torch.tensor([0, 2]), 1.0, None, 1.0, ())
        >>> logps.sum().backward()
        >>> logps.detach()
        tensor([-1.0986, -1.0986])

    """
    values: tuple[Tensor | None, ...] = _Gathered.apply(*given)
    return values


class _Gathered(torch.autograd.Function):
    """``token_logps`` that keeps no weights; they are gathered again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        kind = hidden.device.type
        ctx.autocast = {"device_type": kind, "enabled": torch.is_autocast_enabled(kind)}
        ctx.autocast["dtype"] = torch.get_autocast_dtype(kind)
        ctx.options = head_options(temperature, softcap, logit_scale)
        values = token_logps(hidden, weight, bias, targets, temperature, softcap, logit_scale, outputs)
        ctx.mark_non_differentiable(*(value for value in values[2:] if value is not None))
        ctx.save_for_backward(hidden, weight, bias, targets, values[1])
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logps: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        from trl.trainer.utils import maybe_gather_lm_head_ctx

        hidden, weight, bias, targets, entropy = ctx.saved_tensors
        with maybe_gather_lm_head_ctx(weight, bias), torch.enable_grad(), torch.autocast(**ctx.autocast):
            # Views of the gathered weights; the gradients belong to the parameters themselves.
            given: list[Any] = [
                None if tensor is None else tensor.detach().requires_grad_(needed)
                for tensor, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
            ]
            rows, head, shift = same_dtype(*given)
            total: Any = 0.0
            if grad_logps is not None:

                def along(x: Any) -> Tensor:
                    return x.policy_chosen_logps * grad_logps

                total = scored(rows, head, shift, targets, ctx.options, along, reduction="sum").loss
            if grad_entropy is not None:
                entropies = differentiable_entropy(rows, head, shift, entropy, ctx.options)
                total = total + (entropies * grad_entropy).sum()
            wanted = [tensor for tensor in given if tensor is not None and tensor.requires_grad]
            grads = iter(torch.autograd.grad(total, wanted) if torch.is_tensor(total) else [None] * len(wanted))
        found = [next(grads) if tensor is not None and tensor.requires_grad else None for tensor in given]
        return (*found, *[None] * 5)
