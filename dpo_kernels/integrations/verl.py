"""verl's fused linear layer on this package's kernels: log-probs and entropies of single tokens.

    from dpo_kernels.integrations.verl import patch_verl

    patch_verl()  # before the workers build the model

verl calls the layer where ``use_fused_kernels`` is true and ``fused_kernel_options.impl_backend`` is "torch". verl has
no DPO trainer; the layer serves its PPO-like losses.
"""

import inspect
import sys
from typing import Any

from torch import Tensor

from dpo_kernels.integrations.token_logps import token_logps

MODULE, LAYER = "verl.utils.experimental.torch_functional", "FusedLinearForPPO"
ARGUMENTS = ("self", "hidden_states", "vocab_weights", "input_ids", "temperature")  # of its forward, as in verl 0.9.1
OURS = "dpo_kernels_patch"  # the attribute of a forward of ours that holds its patch
_patches: list["FusedForward"] = []  # those that are on, the oldest first


class FusedForward:
    """A forward that stands in the place of that of verl's layer.

    Args:
        replaced: verl's forward, or what another patch had put in its place.

    Attributes:
        replaced: the same.
        on: whether ``function`` computes here. If false, ``replaced`` does.
        function: the forward itself, with the arguments of verl's.

    Example:
        >>> import torch
        >>> forward = FusedForward(replaced=None)
        >>> forward.function(None, torch.ones(2, 8), torch.zeros(4, 8), torch.tensor([1, 3]))[0]
        tensor([-1.3863, -1.3863])

    """

    def __init__(self, replaced: Any) -> None:
        self.replaced = replaced
        self.on = True
        self.function = _function_of(self)


def _function_of(patch: FusedForward) -> Any:
    def forward(
        self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> Any:
        if patch.on:
            return fused_linear_for_ppo(hidden_states, vocab_weights, input_ids, temperature)
        return patch.replaced(self, hidden_states, vocab_weights, input_ids, temperature)

    setattr(forward, OURS, patch)
    return forward


def _patch_of(function: Any) -> FusedForward | None:
    """Return the patch whose forward this is, or None. A wrapper may have copied the attributes of ours."""
    patch: FusedForward | None = getattr(function, OURS, None)
    return patch if patch is not None and patch.function is function else None


def fused_linear_for_ppo(
    hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Compute log-probs and entropies of tokens with the arguments of verl's ``FusedLinearForPPO``.

    Args:
        hidden_states: floating point ``(T, H)`` or ``(B, T, H)``.
        vocab_weights: floating point ``(V, H)``.
        input_ids: the tokens that are scored, int64 or int32, ``(T,)`` or ``(B, T)``. They are rolled already.
        temperature: what logits are divided by, > 0.

    Returns:
        Log-probs and entropies in the shape of ``input_ids``, float32 and differentiable. verl's own entropies have the
        dtype of the hidden states. An entropy costs a pass over the head only where its gradient is computed.

    Raises:
        ValueError: a shape is wrong, or ``temperature`` is not > 0.
        TypeError: a dtype or a type is wrong.

    Example:
        >>> import torch
        >>> logps, entropy = fused_linear_for_ppo(torch.ones(1, 2, 8), torch.zeros(4, 8), torch.tensor([[1, 3]]))
        >>> logps, entropy
        (tensor([[-1.3863, -1.3863]]), tensor([[1.3863, 1.3863]]))

    """
    if input_ids.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"input_ids {tuple(input_ids.shape)} must have the shape of hidden_states without its last dimension, "
            f"{tuple(hidden_states.shape[:-1])}"
        )
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    logps, entropy, *_ = token_logps(
        rows, vocab_weights, None, input_ids.reshape(-1), temperature, outputs=("entropy",)
    )
    assert entropy is not None, "asked for"
    return logps.view(input_ids.shape), entropy.view(input_ids.shape)


def patch_verl() -> None:
    """Let verl's ``FusedLinearForPPO`` compute here.

    A second call changes nothing, unless another patch was put on meanwhile: the last one that is put on computes.

    Raises:
        ImportError: verl is not installed.
        RuntimeError: verl has no such layer, or calls it with other arguments.

    Example::

        patch_verl()

    """
    from verl.utils.experimental import torch_functional

    layer: Any = getattr(torch_functional, LAYER, None)
    if layer is None:
        raise RuntimeError(f"patch_verl() knows {MODULE}.{LAYER} of verl 0.9, and this verl has none")
    current = layer.forward
    while (ours := _patch_of(current)) is not None:
        if ours.on:
            return
        current = ours.replaced  # another patch has put back what it found, and meanwhile that was taken off
    found = tuple(inspect.signature(current).parameters)
    if found != ARGUMENTS:
        raise RuntimeError(f"patch_verl() knows {LAYER}.forward{ARGUMENTS}, and this verl has {found}")
    _patches.append(FusedForward(current))
    layer.forward = _patches[-1].function


def unpatch_verl() -> None:
    """Remove the patch of ``patch_verl()``. Without a patch this does nothing.

    What was there before is there again. If another patch was put on since, it stays, and what it has kept of this
    one computes as verl does.

    Example:
        >>> unpatch_verl()

    """
    while _patches:
        _patches.pop().on = False
    layer: Any = getattr(sys.modules.get(MODULE), LAYER, None)
    while layer is not None and (ours := _patch_of(layer.forward)) is not None:
        layer.forward = ours.replaced
