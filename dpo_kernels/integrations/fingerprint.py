"""A fingerprint of everything that a model's log-probs depend on.

Weights and buffers, whether or not ``state_dict`` keeps them, the configuration, the numbers and functions that modules
hold beside their tensors (an attention scale, LoRA's scaling), and the adapters that are active, whatever they are
called. What does not compute is left out: training modes, dropout, adapters that are off, names and paths.

What code does that was put in place of a model's own at run time (forward hooks, a patched forward) is not seen.
"""

# Why not by the model's answers to a probe, which would show even that: no threshold serves. Bits differ between batch
# sizes, numbers of threads and machines, in 16 bits by some 0.1 nats for a token, and a small change of a model moves
# log-probs by less. And a probe would need a forward of the model where everything is on disk already.

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpo_kernels.integrations.transformers import FusedLMHead, fused_lm_head

# Keys of configurations that no forward of a causal model reads, or not in evaluation mode; loading, saving, trainers
# and tokenizers change them.
NOT_COMPUTED_WITH = {
    "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "output_router_logits", "router_aux_loss_coef", "id2label", "label2id",
    "bos_token_id", "eos_token_id", "pad_token_id", "gradient_checkpointing", "problem_type", "auto_map",
}  # fmt: skip
IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")
# Likewise attributes of modules; "forward" is replaced by FusedLMHead.attach and by accelerate.
NOT_READ = {
    "training", "forward", "config", "generation_config", "gradient_checkpointing", "is_gradient_checkpointing",
    "is_parallelizable", "model_parallel", "hf_device_map", "name_or_path", "warnings_issued", "model_tags",
    "loss_type", "kernel_config", "all_tied_weights_keys", "peft_config", "merged_adapters",
    "base_layer",
}  # fmt: skip
PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.Size, type(None))


def model_fingerprint(model: nn.Module, head: FusedLMHead | None = None) -> str:
    """Of the model, of the scale and softcap of its ``head`` (the one it has by default), and of autocast."""
    head = fused_lm_head(model) if head is None else head
    digest = hashlib.blake2b(digest_size=16)
    _Walk(digest.update).module("", head.model)
    config = head.model.config
    implementations = [getattr(c, name, None) for c in (config, config.get_text_config()) for name in IMPLEMENTATIONS]
    device = input_device(head.model).type
    autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "off"
    digest.update(json.dumps(_without(config.to_dict()), sort_keys=True, default=str).encode())
    digest.update(repr((head.logit_scale, head.softcap, implementations, autocast)).encode())
    return digest.hexdigest()


def input_device(model: Any) -> torch.device:
    """Where a model takes its token ids; an offloaded embedding has no weight there."""
    embedding = model.get_input_embeddings()
    device: torch.device = next(embedding.parameters()).device
    if device.type != "meta":
        return device
    hook = getattr(embedding, "_hf_hook", None)
    device = getattr(hook, "execution_device", None) or next(model.get_output_embeddings().parameters()).device
    return torch.device(device)


def _without(value: Any) -> Any:
    """A configuration without what no forward reads; the configurations inside it too."""
    if not isinstance(value, Mapping):
        return value
    return {
        str(name): _without(v) for name, v in value.items() if name not in NOT_COMPUTED_WITH and "drop" not in str(name)
    }


class _Walk:
    """Everything that modules compute with, in a fixed order, as bytes."""

    def __init__(self, add: Callable[[Any], None]) -> None:
        self.add = add

    def module(self, path: str, module: Any) -> None:
        if isinstance(compiled := getattr(module, "_orig_mod", None), nn.Module):
            self.module(path, compiled)
        elif hasattr(module, "original_module"):
            self.module(path, _in_use(module))
        elif hasattr(module, "base_layer"):
            self.adapted(path, module)
        elif not isinstance(module, nn.Dropout | nn.Identity):  # PEFT has nn.Identity for no dropout
            self.plain_module(path, module, module.named_children())

    def adapted(self, path: str, layer: Any) -> None:
        """A layer of PEFT as what it computes: where no adapter acts, that is the layer inside it and nothing else."""
        self.module(path, layer.base_layer)
        merged = list(getattr(layer, "merged_adapters", ()))
        # Merged they are in the weights already, and merged but off the next forward takes them out again.
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
                    self.value(f"{path}.{name}.{number}", part[adapter])
        children = ((name, child) for name, child in layer.named_children() if name not in {*parts, "base_layer"})
        self.plain_module(path, layer, children, without=parts)

    def plain_module(
        self, path: str, module: nn.Module, children: Iterator[tuple[str, nn.Module]], without: Any = ()
    ) -> None:
        self.add(f"{path} {type(module).__qualname__};".encode())
        changing = _set_by_forward(module)
        with _loaded(module):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and name not in changing:
                    self.tensor(f"{path}.{name}", tensor)
        for name, value in sorted(vars(module).items()):
            if not _is_ignored(name) and name not in changing and name not in without:
                self.value(f"{path}.{name}", value)
        for name, child in children:
            self.module(f"{path}.{name}", child)

    def value(self, path: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self.tensor(path, value)
        elif isinstance(value, nn.Module):
            self.module(path, value)
        elif isinstance(value, PLAIN):
            self.add(f"{path} {value!r};".encode())
        elif isinstance(value, Mapping):
            for name in sorted(value, key=str):
                self.value(f"{path}.{name}", value[name])
        elif isinstance(value, list | tuple):
            self.add(f"{path} {len(value)};".encode())
            for number, one in enumerate(value):
                self.value(f"{path}.{number}", one)
        else:  # a function by its name, any other object by its class
            self.add(f"{path} {getattr(value, '__qualname__', type(value).__qualname__)};".encode())

    def tensor(self, path: str, tensor: Tensor) -> None:
        if tensor.device.type == "meta":
            raise ValueError(
                f"model: {path.strip('.')} is on the meta device, so that its numbers cannot be told: load the model "
                "whole, or offload it with accelerate, from which they can be had"
            )
        tensor = tensor.detach()
        self.add(f"{path} {tensor.dtype} {tuple(tensor.shape)};".encode())
        self.add(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


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
    return attribute.startswith("_") or attribute in NOT_READ or "drop" in attribute or "cache" in attribute


def _set_by_forward(module: Any) -> set[str]:
    """What a rotary embedding sets anew for the lengths it meets; it follows from the configuration."""
    types = getattr(module, "rope_type", None)
    named = types.items() if isinstance(types, Mapping) else [("", types)]
    prefixes = [f"{layer}_" if layer else "" for layer, kind in named if kind and ("dynamic" in kind or "long" in kind)]
    names = ("inv_freq", "long_inv_freq", "attention_scaling")
    return {f"{prefix}{name}" for prefix in prefixes for name in names} | ({"attention_scaling"} if prefixes else set())


@contextlib.contextmanager
def _loaded(module: nn.Module) -> Iterator[None]:
    """With the weights that accelerate has offloaded brought back."""
    own = (*module._parameters.values(), *module._buffers.values())
    if not hasattr(module, "_hf_hook") or all(tensor is None or tensor.device.type != "meta" for tensor in own):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module, torch.device("cpu")):
        yield
