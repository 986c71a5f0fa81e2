"""The parts of a causal model of transformers, and what it and its configuration say about its head."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from dpo_kernels.integrations import lm_head

# The names by which configurations call a factor on the logits, a divisor of the logits, and a soft cap. The self-check
# of the head tells whether a name still means what it did.
MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVIDERS = ("logits_scaling", "logits_mup_width_multiplier")
MULTIPLIES_BY_DIVIDER = ("hyperclovax",)  # model types whose "divisor" is a factor
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Layers with such class names, beside backbone and output embedding, are taken to stand between the two. Layers with
# other names (a vision tower, a value head) may stand anywhere; the self-check of the head tells.
BEFORE_THE_HEAD = re.compile("Head|Prediction|Transform")


def layers_around(model: Any) -> Iterator[Any]:
    """Yield a model and the models inside it, from the outermost inwards.

    Args:
        model: a causal model, or what PEFT and ``torch.compile`` have put around it, in whatever order.

    Yields:
        Each wrapper, and the causal model last.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> list(layers_around(model))
        [Linear(in_features=2, out_features=2, bias=True)]

    """
    yield model
    while True:
        if isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return
        yield model


def innermost(model: Any) -> Any:
    """Find the causal model inside what PEFT and ``torch.compile`` have put around it.

    Args:
        model: a causal model or a wrapper of one.

    Returns:
        The causal model.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 2)
        >>> innermost(torch.compile(model)) is model
        True

    """
    return list(layers_around(model))[-1]


def backbone(model: Any) -> nn.Module:
    """Find the part of a causal model that returns hidden states.

    Args:
        model: a causal model of transformers, without wrappers.

    Returns:
        The backbone, a module inside the model.

    Raises:
        ValueError: the model has none.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> type(backbone(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)))).__name__
        'LlamaModel'

    """
    for candidate in (model.base_model, getattr(model, "model", None)):
        if isinstance(candidate, nn.Module) and candidate is not model:
            return candidate
    raise ValueError(f"{type(model).__name__} has no backbone apart from itself")


def learns_a_prompt(model: Any) -> bool:
    """Say whether a model is PEFT's, with an adapter that puts virtual tokens before the input.

    Args:
        model: any module.

    Returns:
        True for prompt tuning, prefix tuning and the like.

    Example:
        >>> learns_a_prompt(nn.Linear(2, 2))
        False

    """
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def logit_scaling(config: Any) -> tuple[float, float | None]:
    """Read scale and soft cap of the logits from a configuration.

    Args:
        config: the configuration of a text model.

    Returns:
        The factor on the logits, 1.0 where the configuration has none, and the soft cap or None.

    Example:
        >>> from transformers import GraniteConfig
        >>> logit_scaling(GraniteConfig(logits_scaling=4.0))
        (0.25, None)

    """

    def first(names: tuple[str, ...]) -> Any:
        return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)

    scale, softcap = first(MULTIPLIERS), first(SOFTCAPS)
    if scale is None and (divider := first(DIVIDERS)) is not None:
        scale = divider if config.model_type in MULTIPLIES_BY_DIVIDER else 1.0 / divider
    return 1.0 if scale is None else float(scale), None if softcap is None else float(softcap)


def why_not_direct(model: Any) -> str:
    """Say which layers stand between the backbone and the output embedding.

    Args:
        model: a causal model of transformers, without wrappers.

    Returns:
        A reason in words why the head is not linear in the hidden states, or an empty string.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> why_not_direct(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)))
        ''

    """
    embedding, body = model.get_output_embeddings(), backbone(model)
    width = getattr(model.config.get_text_config(), "hidden_size", None)
    linear: Any = lm_head.unwrapped(embedding)
    narrower = width is not None and lm_head.whole_shape(linear.weight)[1] != width
    for name, child in model.named_children():
        if child is body or child is embedding:
            continue
        others = {id(p) for p in child.parameters()} - {id(p) for p in (*embedding.parameters(), *body.parameters())}
        holds = any(module is embedding for module in child.modules())
        if others and (holds or narrower or BEFORE_THE_HEAD.search(type(child).__name__)):
            holders = [m for m in child.modules() if m is not embedding and m._parameters]
            layers = sorted({type(module).__name__ for module in holders})
            return (
                f"its head {name!r} is not linear in the hidden states: {', '.join(layers)} come before the output "
                "embedding; fused losses need logits = scale (W h + b), so use the model's own logits"
            )
    return ""


def forward_parameters(model: Any) -> list[str]:
    """List the parameters of the forward of a model's class.

    Args:
        model: any module.

    Returns:
        Their names in order, without ``self``.

    Example:
        >>> forward_parameters(nn.Linear(2, 2))
        ['input']

    """
    return [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
