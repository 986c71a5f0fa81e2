"""A fingerprint of everything that a model's log-probs depend on.

It covers weights and buffers, whether or not ``state_dict`` keeps them, and the configuration. It covers the numbers
and functions that modules hold beside their tensors, such as an attention scale or LoRA's scaling. It covers the
adapters that are active, but not their names.

What does not compute is left out: training modes, dropout, adapters that are off, names and paths, and what a forward
leaves behind. Code that replaces a model's own at run time (forward hooks, a patched forward) is not seen.
"""

# The model's answers to a probe would show even such code, but no threshold would serve. Between batch sizes, numbers
# of threads and machines log-probs differ, in 16 bits by some 0.1 nats for a token. A small change of a model moves
# them by less. A probe would also need a forward of the model where everything is on disk already.

import contextlib
import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpo_kernels.integrations.fingerprint_values import Values, computed_with, is_dropout
from dpo_kernels.integrations.transformers import FusedLMHead, fused_lm_head

# Attributes of configurations that choose a kernel, and with it the last bits.
IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")
# Modules that compute nothing in evaluation mode.
NOTHING = {nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout}
SHARDING = "torch.distributed.fsdp"  # FSDP puts a class of this package before the class of a module
# Attributes of modules that no forward reads. FusedLMHead.attach and accelerate replace "forward".
NOT_READ = {
    "training", "forward", "config", "generation_config", "gradient_checkpointing", "is_gradient_checkpointing",
    "is_parallelizable", "model_parallel", "hf_device_map", "name_or_path", "warnings_issued", "model_tags",
    "loss_type", "kernel_config", "all_tied_weights_keys", "peft_config", "merged_adapters",
    "base_layer",
    # A forward of RecurrentGemma and of vision-language models leaves these for the next steps of a generation. The
    # last is RWKV's mark that its weights are divided.
    "recurrent_states", "conv1d_state", "rope_deltas", "layers_are_rescaled",
}  # fmt: skip
# A forward makes some tables anew for longer inputs. This many rows of such a table show the numbers that all of them
# follow from.
FIRST_ROWS = 8
ROPE_BY_LENGTH = re.compile(r"(Dynamic|NTK|LongRoPE|SuScaled)\w*Rotary")  # names of classes that have no rope_type


def model_fingerprint(model: nn.Module, head: FusedLMHead | None = None) -> str:
    """Hash what a model computes with, scale and softcap of its head, and the state of autocast.

    Args:
        model: a model as ``fused_lm_head`` takes it.
        head: its head where scale or softcap were changed; None for the one that the model has by default.

    Returns:
        32 hexadecimal digits, the same in every process.

    Raises:
        ValueError: weights are on the meta device, or as in ``fused_lm_head``.
        TypeError: a tensor does not tell its numbers, or as in ``fused_lm_head``.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> before = model_fingerprint(model)
        >>> model_fingerprint(model.train()) == before
        True
        >>> with torch.no_grad():
        ...     model.lm_head.weight[0, 0] += 1.0
        >>> model_fingerprint(model) == before
        False

    """
    head = fused_lm_head(model) if head is None else head
    digest = hashlib.blake2b(digest_size=16)
    walk = _Walk(digest.update)
    walk.module("", head.model)
    config = head.model.config
    implementations = [getattr(c, name, None) for c in (config, config.get_text_config()) for name in IMPLEMENTATIONS]
    device = input_device(head.model).type
    autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "off"
    walk.values.value("config", computed_with(config.to_dict()))
    walk.values.value("head", (head.logit_scale, head.softcap, implementations, autocast))
    return digest.hexdigest()


def input_device(model: Any) -> torch.device:
    """Find the device on which a model takes its token ids, where its embedding is offloaded too.

    Args:
        model: a causal model of transformers.

    Returns:
        The device.

    Example::

        hidden = model(input_ids.to(input_device(model)))

    """
    embedding = model.get_input_embeddings()
    device: torch.device = next(embedding.parameters()).device
    if device.type != "meta":
        return device
    hook = getattr(embedding, "_hf_hook", None)
    device = getattr(hook, "execution_device", None) or next(model.get_output_embeddings().parameters()).device
    return torch.device(device)


class _Walk:
    """A walk over modules that gives everything they compute with to ``add``, as bytes and in a fixed order."""

    def __init__(self, add: Callable[[Any], None]) -> None:
        self.add = add
        self.values = Values(add, self.module)
        self.divided: dict[int, int] = {}  # by id of a layer: what its weight is yet to be divided by

    def module(self, path: str, module: Any) -> None:
        if isinstance(compiled := getattr(module, "_orig_mod", None), nn.Module):
            self.module(path, compiled)
        elif hasattr(module, "original_module"):
            self.module(path, _in_use(module))
        elif hasattr(module, "base_layer"):
            self.adapted(path, module)
        elif type(module) not in NOTHING:  # PEFT has nn.Identity for no dropout
            self.plain_module(path, module, module.named_children())

    def adapted(self, path: str, layer: Any) -> None:
        """Add a layer of PEFT as what it computes. Where no adapter acts, that is the layer inside it alone."""
        self.module(path, layer.base_layer)
        merged = list(getattr(layer, "merged_adapters", ()))
        # Merged adapters are in the weights already. If they are merged but off, the next forward takes them out again.
        on = [] if merged else list(layer.active_adapters)
        acting = merged if layer.disable_adapters else on
        parts = {
            name: value
            for name, value in (vars(layer) | layer._modules).items()
            if isinstance(value, Mapping | nn.ModuleDict | nn.ParameterDict) or type(value).__name__ == "BufferDict"
        }
        acting = [name for name in acting if any(name in part for part in parts.values())]
        if not acting:
            return
        self.add(f"{path} adapted, {bool(merged)}:".encode())
        for number, adapter in enumerate(acting):  # by number: another name is the same adapter
            for name, part in sorted(parts.items()):
                if not _is_ignored(name) and adapter in part:
                    self.values.value(f"{path}.{name}.{number}", part[adapter])
        children = ((name, child) for name, child in layer.named_children() if name not in {*parts, "base_layer"})
        self.plain_module(path, layer, children, without=parts)

    def plain_module(
        self, path: str, module: nn.Module, children: Iterator[tuple[str, nn.Module]], without: Any = ()
    ) -> None:
        if self.values.met(path, module):
            return
        kinds = (kind for kind in type(module).__mro__ if not kind.__module__.startswith(SHARDING))
        self.add(f"{path} {self.values.class_name(next(kinds))};".encode())
        self.divided |= _yet_to_be_divided(module)
        changing = _set_by_forward(module)
        with _loaded(module):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and name not in changing:
                    self.held(f"{path}.{name}", module, name, tensor)
        for name, value in sorted(vars(module).items()):
            if not _is_ignored(name) and name not in changing and name not in without:
                self.values.value(f"{path}.{name}", _first_rows(module, name, value))
        for name, child in children:
            self.module(f"{path}.{name}", child)

    def held(self, path: str, module: nn.Module, name: str, tensor: Tensor) -> None:
        """Add a parameter or buffer, and what a quantised one has beside its codes."""
        if name == "weight" and id(module) in self.divided and tensor.is_floating_point():
            tensor = tensor.detach() / self.divided[id(module)]
        tensor = _first_rows(module, name, tensor)
        self.values.tensor(path, tensor)
        if issubclass(type(tensor), nn.Parameter) and type(tensor) is not nn.Parameter:
            scales: Any = getattr(tensor, "SCB", None)
            if scales is None:  # bitsandbytes moves them there at the first forward
                scales = getattr(getattr(module, "state", None), "SCB", None)
            beside = {key: value for key, value in vars(tensor).items() if key not in ("CB", "SCB", "module")}
            for key, value in sorted(beside.items()):
                if "grad" not in key and (isinstance(value, Tensor) or type(value).__name__ == "QuantState"):
                    self.values.value(f"{path}.{key}", value)
            if scales is not None:
                self.values.value(f"{path}.SCB", scales)


def _in_use(wrapper: Any) -> nn.Module:
    """What PEFT's wrapper of a whole module runs: the original, a trained copy or trained tokens of it."""
    module: nn.Module = wrapper.original_module
    if wrapper.disable_adapters or not wrapper.active_adapters:
        return module
    if hasattr(wrapper, "token_adapter"):
        module = wrapper.token_adapter
        return module
    copies = getattr(wrapper, "modules_to_save", {})
    return next((copies[name] for name in wrapper.active_adapters if name in copies), module)


def _is_ignored(attribute: str) -> bool:
    return attribute.startswith("_") or attribute in NOT_READ or "cache" in attribute or is_dropout(attribute)


def _set_by_forward(module: Any) -> set[str]:
    """Return names of attributes that say nothing: a forward sets them anew, or they follow from the configuration."""
    names = set()
    if (isinstance(module, nn.Embedding) or hasattr(module, "get_input_embeddings")) and not _counts_padding(module):
        names.add("padding_idx")  # only gradients depend on it; models hand it on to their embeddings
    if hasattr(module, "compute_type_is_set"):  # bitsandbytes sets them by the configuration or by the first input
        names |= {"compute_type_is_set", "compute_dtype"}
    # Some rotary embeddings change with the lengths that they meet. In code that comes with a model the name of the
    # class says which kind it is.
    types: Any = getattr(module, "rope_type", None)
    if types is None and ROPE_BY_LENGTH.search(type(module).__name__):
        types = "dynamic"
    named = types.items() if isinstance(types, Mapping) else [("", types)]
    prefixes = [f"{layer}_" if layer else "" for layer, kind in named if kind and ("dynamic" in kind or "long" in kind)]
    names |= {f"{prefix}{name}" for prefix in prefixes for name in ("inv_freq", "long_inv_freq", "attention_scaling")}
    return names | ({"attention_scaling", "cos_cached", "sin_cached"} if prefixes else set())


def _counts_padding(module: nn.Module) -> bool:
    """Say whether a forward reads the padding's id itself, as one that counts positions from it does."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return forward is not nn.Embedding.forward and (code is None or "padding_idx" in code.co_names)


def _first_rows(module: Any, name: str, value: Any) -> Any:
    """Return the first rows of a table of positions that a forward makes longer, and any other value as it is.

    A table of ``state_dict`` does not grow.
    """
    table = "cached" in name or (name == "weights" and "Sinusoidal" in type(module).__name__)
    kept = name in module._parameters or (name in module._buffers and name not in module._non_persistent_buffers_set)
    if not table or kept or not isinstance(value, Tensor) or value.dim() < 2:
        return value
    return value.detach().narrow(-2, 0, min(FIRST_ROWS, value.shape[-2]))


def _yet_to_be_divided(module: Any) -> dict[int, int]:
    """Return by how much RWKV will divide the weights of its layers, by id of the layer.

    In evaluation mode its first forward divides them in place.
    """
    every = getattr(getattr(module, "config", None), "rescale_every", 0)
    if getattr(module, "layers_are_rescaled", True) or every <= 0:
        return {}
    layers = [
        (layer, number)
        for number, block in enumerate(module.blocks)
        for layer in (block.attention.output, block.feed_forward.value)
    ]
    return {id(getattr(layer, "base_layer", layer)): 2 ** (number // every) for layer, number in layers}


@contextlib.contextmanager
def _loaded(module: nn.Module) -> Iterator[None]:
    """Bring the weights that accelerate has offloaded back while this context is open."""
    own = (*module._parameters.values(), *module._buffers.values())
    if not hasattr(module, "_hf_hook") or all(tensor is None or tensor.device.type != "meta" for tensor in own):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module, torch.device("cpu")):
        yield
