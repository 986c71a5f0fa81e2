"""An output embedding as ``(hidden, weight, bias)`` of one linear map, whatever PEFT has wrapped around it.

A LoRA adapter on the head is the same linear map one block wider: ``h W^T + s (h A^T) B^T = [h, s h A^T] [W, B]^T``.
So ``W + s B A`` is never built. The map is exact in every dtype, and 16-bit weights do not round a small update away.

Each call costs one GEMM of rank r and a copy ``(V, H + r)``. Since ``[W, B]`` requires a gradient, a frozen W counts as
a trainable head: three GEMM passes instead of two. A float32 gradient ``(V, H + r)`` is formed, and all but B's r
columns of it are dropped.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_kernels.integrations import head_forward


class HeadInputs(NamedTuple):
    """What the fused functions take of a model: ``fn(hidden, weight, labels, shift=True, **options)``.

    Attributes:
        hidden: floating point ``(B, T, H)``.
        weight: floating point ``(V, H)``.
        options: ``bias`` ``(V,)`` or None, ``logit_scale`` and ``softcap``.

    Example::

        inputs = fused_lm_head(model)(input_ids=ids)
        logps = fused_sequence_logps(inputs.hidden, inputs.weight, labels, shift=True, **inputs.options)

    """

    hidden: Tensor
    weight: Tensor
    options: dict[str, Any]


# What reads a head: it is given ``hidden'``, ``weight'`` and ``bias'``.
Work = Callable[[Tensor, Any, Any], Any]
# How a module is entered: ``enter(module, hidden, read)`` returns ``read(module, hidden)``.
Enter = Callable[[Any, Tensor, Callable[[Any, Tensor], Any]], Any]


def operands(module: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Give the head's linear map for hidden states: its logits are ``hidden' weight'^T + bias'``.

    The result is differentiable with respect to the hidden states and to whatever is trainable in the head. No module
    is called, so that an engine which shards the head does not know that its weights are read. See ``inside``.

    Args:
        module: the output embedding, with what PEFT has put around it.
        hidden: floating point ``(..., H)``.

    Returns:
        ``hidden'`` ``(..., H + r)``, ``weight'`` ``(V, H + r)`` and ``bias'`` ``(V,)`` or None. Here r is the rank of
        the active LoRA adapters together, 0 without them.

    Raises:
        ValueError: an adapter is not linear in the hidden states or is of an unknown kind. Or ``adapter_names`` chooses
            an adapter for each sequence. Or a weight of the head is not whole here.

    Example:
        >>> hidden, weight, bias = operands(nn.Linear(4, 8), torch.zeros(2, 3, 4))
        >>> hidden.shape, weight.shape, bias.shape
        (torch.Size([2, 3, 4]), torch.Size([8, 4]), torch.Size([8]))

    """
    given: tuple[Tensor, Tensor, Tensor | None] = _apply(module, hidden, lambda *given: given, head_forward.directly)
    return given


def inside(module: nn.Module, hidden: Tensor, work: Work) -> Any:
    """Run work on the head's linear map, inside the forward of every module whose weights it reads.

    Engines that shard weights (FSDP, ZeRO-3) gather a module's weights in hooks around its forward, and again in the
    backward of what its forward returned.

    Args:
        module: the output embedding, with what PEFT has put around it.
        hidden: floating point ``(..., H)``.
        work: it is called with what ``operands`` returns. The engines find tensors in tuples, dicts and named tuples.

    Returns:
        What ``work`` returns.

    Raises:
        ValueError: as in ``operands``.

    Example:
        >>> inside(nn.Linear(4, 8), torch.zeros(2, 3, 4), lambda hidden, weight, bias: hidden @ weight.t() + bias).shape
        torch.Size([2, 3, 8])

    """
    return _apply(module, hidden, work, head_forward.call)


def _apply(module: Any, hidden: Tensor, work: Work, enter: Enter) -> Any:
    if isinstance(compiled := getattr(module, "_orig_mod", None), nn.Module):
        return _apply(compiled, hidden, work, enter)
    if any("adapter_names" in (getattr(hook, "keywords", None) or {}) for hook in module._forward_pre_hooks.values()):
        raise ValueError("adapter_names chooses an adapter of the head for each sequence: leave it out")

    def read(layer: Any, hidden: Tensor) -> Any:
        if hasattr(layer, "modules_to_save"):
            return _apply(_saved_module(layer), hidden, work, enter)
        if hasattr(layer, "token_adapter"):
            return _trained_tokens(layer, hidden, work, enter)
        if hasattr(layer, "base_layer"):
            return _lora(layer, hidden, work, enter)
        return work(*_same_dtype(hidden, layer.weight, layer.bias))

    return enter(module, hidden, read)


def _whole(layer: Any, weight: Any) -> Any:
    """Return a weight of an adapter of the head. Raise where an engine holds only a shard of it here."""
    if type(weight).__name__ == "DTensor" or weight.dim() != 2:
        raise ValueError(
            f"the head has an adapter whose weight is sharded where the head is computed ({type(layer).__name__}): "
            "let the unit of the head hold its adapters too, or leave the head out of target_modules"
        )
    return weight


def _same_dtype(hidden: Tensor, weight: Any, bias: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    hidden = hidden.to(weight.device)
    if not torch.is_autocast_enabled(weight.device.type):
        hidden = hidden.to(weight.dtype)  # a model in several dtypes casts before its own head too
    return hidden, weight, bias


def _saved_module(wrapper: Any) -> nn.Module:
    if wrapper.disable_adapters or not wrapper.active_adapters:
        return wrapper.original_module
    if len(wrapper.active_adapters) > 1:
        raise ValueError(f"the head has several active adapters in modules_to_save: {wrapper.active_adapters}")
    name = wrapper.active_adapters[0]
    return dict(wrapper.modules_to_save.items()).get(name, wrapper.original_module)


def _trained_tokens(wrapper: Any, hidden: Tensor, work: Work, enter: Enter) -> Any:
    layer = wrapper.token_adapter
    off = wrapper.disable_adapters or not wrapper.active_adapters or layer.disable_adapters or layer.merged
    if off and layer.disable_adapters and layer.merged:
        raise ValueError("the head's adapter is merged and disabled at once: unmerge it first")

    def merged(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        for name in layer.active_adapters:
            _whole(layer, layer.trainable_tokens_delta[name])
        return work(*_same_dtype(hidden, layer.get_merged_weights(layer.active_adapters), bias))

    return _apply(layer.base_layer, hidden, work if off else merged, enter)


def _lora(layer: Any, hidden: Tensor, work: Work, enter: Enter) -> Any:
    if layer.disable_adapters and layer.merged:
        raise ValueError("the head's adapter is merged and disabled at once: unmerge it first")
    names = [] if layer.disable_adapters or layer.merged else [*layer.active_adapters]
    for name in names:
        if name in getattr(layer, "lora_A", {}):
            _check_plain(layer, name)
        elif any(name in part for part in _adapter_parts(layer)):
            raise ValueError(f"the head's adapter {name!r} is not a plain LoRA: {type(layer).__name__}; use plain LoRA")
    names = [name for name in names if name in getattr(layer, "lora_A", {})]

    def widened(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        return _beside(layer, names, work, enter, [hidden], [weight], bias)

    return _apply(layer.base_layer, hidden, widened if names else work, enter)


def _beside(
    layer: Any, names: list[str], work: Work, enter: Enter, blocks: list[Tensor], columns: list[Tensor], bias: Any
) -> Any:
    """Put the adapters of these names beside the head, each inside the forward of its factors, and do the work."""
    if not names:
        return work(torch.cat(blocks, dim=-1), torch.cat(columns, dim=1), bias)
    name, *others = names
    hidden, weight = blocks[0], columns[0]
    down, up = layer.lora_A[name], layer.lora_B[name]

    def narrowed(down: Any, hidden: Tensor) -> Tensor:
        factor = _whole(down, down.weight)
        return nn.functional.linear(hidden.to(factor.dtype), factor) * layer.scaling[name]

    def read(up: Any, inner: Tensor) -> Any:
        wider = [*columns, _whole(up, up.weight).to(weight.dtype)]
        extra = bias
        if up.bias is not None:
            extra = up.bias.to(weight.dtype) * layer.scaling[name]
            extra = extra if bias is None else bias + extra
        return _beside(layer, others, work, enter, [*blocks, inner.to(hidden.dtype)], wider, extra)

    return enter(up, enter(down, hidden, narrowed), read)


def _adapter_parts(layer: Any) -> list[Any]:
    return [getattr(layer, name) for name in getattr(layer, "adapter_layer_names", ()) if hasattr(layer, name)]


def _check_plain(layer: Any, name: str) -> None:
    factors = [head_forward.within_fsdp1(parts[name]) for parts in (layer.lora_A, layer.lora_B)]
    if not all(isinstance(factor, nn.Linear) for factor in factors):
        # AdaLoRA's factors are bare parameters, with singular values of their own between them.
        raise ValueError(f"the head's adapter {name!r} is not a plain LoRA: {type(layer).__name__}; use plain LoRA")
    variant = getattr(layer, "lora_variant", {}).get(name)
    if variant is not None or getattr(layer, "use_dora", {}).get(name, False):
        kind = "DoRA" if variant is None else getattr(variant, "__name__", type(variant).__name__)
        raise ValueError(f"the head's adapter {name!r} is {kind}, which is not linear in its factors; use plain LoRA")
    dropout = dict(layer.lora_dropout.items()).get(name)
    if isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training:
        raise ValueError(
            f"the head's adapter {name!r} has lora_dropout={dropout.p}: its logits are random, and the reference and "
            "the policy would see different masks; set lora_dropout=0 (TRL's disable_dropout=True does)"
        )
