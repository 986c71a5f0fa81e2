"""An output embedding: whether it can be used, and which adapters it applies."""

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
    if not isinstance(weight, Tensor) or len(whole_shape(weight)) != 2:
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


def whole_shape(weight: Any) -> torch.Size:
    """Return the shape of a weight, whole where ZeRO-3 keeps a shard of it.

    Args:
        weight: a tensor.

    Example:
        >>> whole_shape(nn.Linear(4, 8).weight)
        torch.Size([8, 4])

    """
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)
    return shape


def gathered(tensor: Any) -> Any:
    """Gather what tensor parallelism splits over a group. All of its ranks must ask for it.

    Args:
        tensor: a ``DTensor``, or anything else.

    Returns:
        The whole tensor. What is no ``DTensor`` is returned itself.

    Example:
        >>> weight = torch.zeros(3, 4)
        >>> gathered(weight) is weight
        True

    """
    return tensor.full_tensor() if type(tensor).__name__ == "DTensor" else tensor


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
        for attribute in ("_fsdp_wrapped_module", "_orig_mod", "base_layer", "original_module"):
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
        for attribute in ("_fsdp_wrapped_module", "token_adapter", "_orig_mod", "base_layer", "original_module"):
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
