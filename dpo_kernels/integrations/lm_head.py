"""An output embedding as ``(hidden, weight, bias)`` of one linear map, whatever PEFT has wrapped around it.

A LoRA adapter on the head is the same linear map one block wider: ``h W^T + s (h A^T) B^T = [h, s h A^T] [W, B]^T``.
So ``W + s B A`` is never built. The map is exact in every dtype, and 16-bit weights do not round a small update away.

Each call costs one GEMM of rank r and a copy ``(V, H + r)``. Since ``[W, B]`` requires a gradient, a frozen W counts as
a trainable head: three GEMM passes instead of two. A float32 gradient ``(V, H + r)`` is formed, and all but B's r
columns of it are dropped.
"""

from typing import Any

import torch
from torch import Tensor, nn

# PEFT's names of adapters that do a part of their work in PEFT's own forward, around the model's. aLoRA does so too.
IN_PEFTS_FORWARD = ("XLORA", "POLY", "SHADOW")
# How the class names of quantised layers begin, in bitsandbytes, GPTQ, AWQ, HQQ, AQLM and EETQ.
QUANTISED = ("Linear4bit", "Linear8bitLt", "QuantLinear", "WQLinear", "HQQLinear", "AqlmLinear", "EetqLinear")


def why_not_linear(module: nn.Module | None) -> str:
    """Say why an output embedding cannot be used.

    Args:
        module: the output embedding, with what PEFT has put around it, or None.

    Returns:
        The reason in words, or an empty string.

    Example:
        >>> why_not_linear(nn.Linear(4, 8))
        ''
        >>> why_not_linear(nn.Embedding(8, 4))
        'the head is a Embedding, not torch.nn.Linear'

    """
    if module is None:
        return "the model has no output embedding (get_output_embeddings() is None)"
    layer = unwrapped(module)
    name = type(layer).__name__
    if name.startswith(QUANTISED) or name.endswith(("Int8Linear", "FP8Linear")):
        return (
            f"the head is quantised ({name}): its weights would have to be dequantised for every GEMM and have no "
            "gradient; keep the head out of quantisation (llm_int8_skip_modules, modules_to_not_convert)"
        )
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return f"the head is a {name} without a weight (V, H)"
    if not weight.is_floating_point():
        return f"the head is quantised: its weight is {weight.dtype}; keep the head out of quantisation"
    if weight.device.type == "meta":
        return (
            "the head's weight is on the meta device: it is offloaded or was never loaded, and the fused losses read "
            "it outside the head's own forward; keep the head on a device (device_map={..., 'lm_head': 0})"
        )
    if not isinstance(layer, nn.Linear):
        return f"the head is a {name}, not torch.nn.Linear"
    return ""


def unwrapped(module: nn.Module) -> nn.Module:
    """Find the module at the core of what PEFT and ``torch.compile`` have put around it.

    Args:
        module: any module.

    Returns:
        The innermost module.

    Example:
        >>> layer = nn.Linear(4, 8)
        >>> unwrapped(torch.compile(layer)) is layer
        True

    """
    while True:
        for attribute in ("_orig_mod", "base_layer", "original_module"):
            if isinstance(inner := getattr(module, attribute, None), nn.Module):
                module = inner
                break
        else:
            return module


def state(module: nn.Module) -> tuple[Any, ...]:
    """Collect what decides which of its adapters an output embedding applies.

    Args:
        module: the output embedding, with what PEFT has put around it.

    Returns:
        A value that can be compared and hashed. It lists the wrappers from the outermost inwards.

    Example:
        >>> state(nn.Linear(4, 8))
        ('Linear', None, (), ())

    """
    found: list[Any] = []
    while True:
        found += [type(module).__name__, getattr(module, "disable_adapters", None)]
        found += [tuple(getattr(module, name, ())) for name in ("active_adapters", "merged_adapters")]
        for attribute in ("token_adapter", "_orig_mod", "base_layer", "original_module"):
            if isinstance(inner := getattr(module, attribute, None), nn.Module):
                module = inner
                break
        else:
            return tuple(found)


def has_adapter(module: nn.Module | None) -> bool:
    """Say whether PEFT has an adapter on the module itself. ``modules_to_save`` is none, since it replaces the module.

    Args:
        module: any module, or None.

    Returns:
        True where there is an adapter, active or not.

    Example:
        >>> has_adapter(nn.Linear(4, 8))
        False

    """
    return module is not None and hasattr(module, "base_layer")


def left_out(model: Any, peft_model: Any) -> str:
    """Say which active adapter acts outside of the model, so that a call of its backbone alone would leave it out.

    Args:
        model: the causal model.
        peft_model: PEFT's model around it, or None where it is not known.

    Returns:
        The reason in words, or an empty string where there is no such adapter.

    Example:
        >>> left_out(nn.Linear(4, 8), None)
        ''

    """
    kinds = {
        name: _acts_in_pefts_forward(config) for name, config in (getattr(model, "peft_config", None) or {}).items()
    }
    if not any(kinds.values()) or getattr(peft_model, "_adapters_disabled", False):
        return ""
    if peft_model is not None:
        names = peft_model.active_adapter  # X-LoRA's own name; active_adapters has the names of its experts
        active = [*([names] if isinstance(names, str) else names), *peft_model.active_adapters]
    else:  # X-LoRA's layers do not tell that they are switched off
        layers = [module for module in model.modules() if hasattr(module, "adapter_layer_names")]
        active = [name for layer in layers if not layer.disable_adapters for name in layer.active_adapters]
        active += [name for name, kind in kinds.items() if kind == "XLORA"]
    for name in active:
        if kind := kinds.get(name):
            return (
                f"the adapter {name!r} ({kind}) acts in PEFT's own forward, around the model's, and the fused head "
                "would leave it out: use the model's own logits, or switch it off (with model.disable_adapter(): ...)"
            )
    return ""


def _acts_in_pefts_forward(config: Any) -> str:
    """Return the kind of an adapter that acts in PEFT's own forward, or an empty string."""
    if getattr(config, "alora_invocation_tokens", None):
        return "aLoRA"
    kind = getattr(config, "peft_type", "")
    name = str(getattr(kind, "value", kind))
    return name if name in IN_PEFTS_FORWARD else ""


def operands(module: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Give the head's linear map for hidden states: its logits are ``hidden' weight'^T + bias'``.

    The result is differentiable with respect to the hidden states and to whatever is trainable in the head.

    Args:
        module: the output embedding, with what PEFT has put around it.
        hidden: floating point ``(..., H)``.

    Returns:
        ``hidden'`` ``(..., H + r)``, ``weight'`` ``(V, H + r)`` and ``bias'`` ``(V,)`` or None. Here r is the rank of
        the active LoRA adapters together, 0 without them.

    Raises:
        ValueError: an adapter is not linear in the hidden states or is of an unknown kind. Or ``adapter_names`` chooses
            an adapter for each sequence.

    Example:
        >>> hidden, weight, bias = operands(nn.Linear(4, 8), torch.zeros(2, 3, 4))
        >>> hidden.shape, weight.shape, bias.shape
        (torch.Size([2, 3, 4]), torch.Size([8, 4]), torch.Size([8]))

    """
    if isinstance(compiled := getattr(module, "_orig_mod", None), nn.Module):
        return operands(compiled, hidden)
    if any("adapter_names" in (getattr(hook, "keywords", None) or {}) for hook in module._forward_pre_hooks.values()):
        raise ValueError("adapter_names chooses an adapter of the head for each sequence: leave it out")
    if hasattr(module, "modules_to_save"):
        return operands(_saved_module(module), hidden)
    if hasattr(module, "token_adapter"):
        return _trained_tokens(module, hidden)
    if hasattr(module, "base_layer"):
        return _lora(module, hidden)
    return _same_dtype(hidden, module.weight, module.bias)


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


def _trained_tokens(wrapper: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    layer = wrapper.token_adapter
    base = layer.base_layer
    if wrapper.disable_adapters or not wrapper.active_adapters or layer.disable_adapters or layer.merged:
        if layer.disable_adapters and layer.merged:
            raise ValueError("the head's adapter is merged and disabled at once: unmerge it first")
        return _same_dtype(hidden, base.weight, base.bias)
    return _same_dtype(hidden, layer.get_merged_weights(layer.active_adapters), getattr(base, "bias", None))


def _lora(layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    base = layer.base_layer
    hidden, weight, bias = _same_dtype(hidden, base.weight, base.bias)
    if layer.disable_adapters:
        if layer.merged:
            raise ValueError("the head's adapter is merged and disabled at once: unmerge it first")
        return hidden, weight, bias
    if layer.merged:
        return hidden, weight, bias
    blocks, columns = [hidden], [weight]
    for name in layer.active_adapters:
        if name not in getattr(layer, "lora_A", {}):
            if any(name in part for part in _adapter_parts(layer)):
                raise ValueError(
                    f"the head's adapter {name!r} is not a plain LoRA: {type(layer).__name__}; use plain LoRA"
                )
            continue
        _check_plain(layer, name)
        down, up = layer.lora_A[name], layer.lora_B[name]
        inner = nn.functional.linear(hidden.to(down.weight.dtype), down.weight) * layer.scaling[name]
        blocks.append(inner.to(hidden.dtype))
        columns.append(up.weight.to(weight.dtype))
        if up.bias is not None:
            extra = up.bias.to(weight.dtype) * layer.scaling[name]
            bias = extra if bias is None else bias + extra
    if len(blocks) == 1:
        return hidden, weight, bias
    return torch.cat(blocks, dim=-1), torch.cat(columns, dim=1), bias


def _adapter_parts(layer: Any) -> list[Any]:
    return [getattr(layer, name) for name in getattr(layer, "adapter_layer_names", ()) if hasattr(layer, name)]


def _check_plain(layer: Any, name: str) -> None:
    if not all(isinstance(factors[name], nn.Linear) for factors in (layer.lora_A, layer.lora_B)):
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
