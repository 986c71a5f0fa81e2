"""The LM head of a Hugging Face causal model, as the fused functions take it.

    head = fused_lm_head(model)
    hidden, weight, options = head(input_ids=..., attention_mask=...)
    out = fused_dpo_loss(hidden, weight, labels, shift=True, ref_logps=..., **options)

Where a wrapper must see the call (DistributedDataParallel, accelerate's autocast), the work is handed to the model's
own forward instead: ``head.attach()`` once before wrapping, then ``wrapped(**inputs, fused_call=work)`` returns
``work(outputs, hidden, weight, options)``.
"""

import copy
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from dpo_kernels.integrations import head_check, lm_head

# What the configurations call them. The self-check tells whether a name still means what it did.
MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVIDERS = ("logits_scaling", "logits_mup_width_multiplier")
MULTIPLIES_BY_DIVIDER = ("hyperclovax",)
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Layers beside backbone and output embedding that are named so stand between the two. What is named otherwise (a vision
# tower, a value head) may stand anywhere, and the self-check tells.
BEFORE_THE_HEAD = re.compile("Head|Prediction|Transform")

CALL = "fused_call"
FOR_PEFTS_FORWARD = ("adapter_names", "alora_offsets", "task_ids")  # inputs that only PEFT's own forward reads
WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")


class HeadInputs(NamedTuple):
    """What the fused functions take: ``fn(hidden, weight, labels, shift=True, **options)``."""

    hidden: Tensor  # (B, T, H)
    weight: Tensor  # (V, H)
    options: dict[str, Any]  # bias, logit_scale, softcap


def fused_lm_head(model: nn.Module, *, check: bool = True) -> "FusedLMHead":
    """The head of a causal model of transformers, PEFT around it or not.

    Args:
        model: a ``PreTrainedModel`` with a language modelling head, or a ``PeftModel`` of one.
        check: compare a few positions of the first batch with the model's own logits.

    Raises:
        TypeError: no transformers model, or one inside a wrapper whose ``forward`` must be called (see ``attach``).
        ValueError: no linear head: a transform before it, a quantised head, none at all; an active adapter that acts in
            PEFT's own forward (aLoRA, X-LoRA), which is not called. The message says which.

    """
    return FusedLMHead(model, check=check)


class FusedLMHead:
    """See ``fused_lm_head``. Weights are looked up at every call, since PEFT and others replace them.

    Attributes:
        model: the innermost causal model.
        peft_model: PEFT's model around it, or None.
        logit_scale: factor on the logits.
        softcap: soft cap of the logits after scaling, or None.

    """

    def __init__(self, model: nn.Module, *, check: bool = True) -> None:
        if type(model).__name__ in WRAPPERS:
            raise TypeError(
                f"model is wrapped in {type(model).__name__}, whose forward must be called for gradients to be "
                "synchronised: call fused_lm_head(model).attach() before wrapping, then "
                f"wrapped(**inputs, {CALL}=...)"
            )
        inner = innermost(model)
        if not hasattr(inner, "get_output_embeddings") or not hasattr(inner, "config"):
            raise TypeError(f"model must be a transformers model with an LM head, got {type(model).__name__}")
        if any(_learns_a_prompt(layer) for layer in _layers(model)):
            raise ValueError("prompt-learning adapters put virtual tokens before the labels' positions: not supported")
        self.model: Any = inner
        self.peft_model: Any = next((layer for layer in _layers(model) if hasattr(layer, "get_base_model")), None)
        if reason := lm_head.left_out(inner, self.peft_model):
            raise ValueError(reason)
        if reason := lm_head.why_not_linear(inner.get_output_embeddings()) or _why_not_direct(inner):
            raise ValueError(f"{type(inner).__name__}: {reason}")
        self.logit_scale, self.softcap = _scaling(inner.config.get_text_config())
        self.checking = check
        self._found_right: set[Any] = set()  # states of the head that were compared; deep copies share it
        # The forward before attach(), a function of the model first. What wraps the model later is not entered twice:
        # accelerate's is one autocast object, which, entered inside itself, would never switch autocast off again.
        self.model_forward: Callable[..., Any] = nn.Module.__call__

    @property
    def output_embedding(self) -> nn.Module:
        """The head's module, PEFT's wrapper included."""
        return self.model.get_output_embeddings()

    @property
    def backbone(self) -> nn.Module:
        """The part of the model that returns hidden states."""
        return backbone(self.model)

    @property
    def options(self) -> dict[str, Any]:
        """``logit_scale`` and ``softcap``, as the fused functions take them."""
        return {"logit_scale": self.logit_scale, "softcap": self.softcap}

    @property
    def checked(self) -> bool:
        """Whether nothing is left to compare: with each state of the adapters on it a head computes something else."""
        return not self.checking or self._state() in self._found_right

    def _state(self) -> tuple[Any, ...]:
        return (self.logit_scale, self.softcap, *lm_head.state(self.output_embedding))

    def __call__(self, **inputs: Any) -> HeadInputs:
        """The model's last hidden states and its head, from the model's own inputs (no labels)."""
        return self.run(inputs)[1]

    def run(self, inputs: dict[str, Any]) -> tuple[Any, HeadInputs]:
        """The backbone's outputs (router logits, say), and its hidden states with the head."""
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if unread := [name for name in FOR_PEFTS_FORWARD if name in inputs]:
            raise ValueError(
                f"{', '.join(unread)}: only PEFT's own forward reads this, and it is not called; leave it out"
            )
        self._settle(inputs, self._called)
        outputs = self.hidden_states(inputs)
        return outputs, self.operands(outputs[0])

    @property
    def _called(self) -> Any:
        return self.model if self.peft_model is None else self.peft_model

    def _settle(self, inputs: dict[str, Any], called: Any) -> None:
        """Raise where the backbone or the head would give something else than ``called``, the model or PEFT's."""
        if reason := lm_head.left_out(self.model, self.peft_model):
            raise ValueError(reason)
        if not self.checked:
            self._check(inputs, called)

    def hidden_states(self, inputs: dict[str, Any]) -> Any:
        """The backbone's outputs, the last hidden states first."""
        return self.backbone(**inputs | {"use_cache": False})

    def operands(self, hidden: Tensor) -> HeadInputs:
        """The head as applied to hidden states ``(..., H)``: LoRA makes H larger."""
        hidden, weight, bias = lm_head.operands(self.output_embedding, hidden)
        return HeadInputs(hidden, weight, {"bias": bias, **self.options})

    def attach(self) -> "FusedLMHead":
        """Give the model's ``forward`` the keyword ``fused_call``; without it, ``forward`` is what it was.

        ``model(**inputs, fused_call=work)`` returns ``work(outputs, hidden, weight, options)``. So whatever wraps the
        model afterwards sees one ordinary call of it. Repeating it changes nothing. A deep copy of the model has the
        keyword too, and computes with its own weights.
        """
        attached = getattr(self.model.forward, CALL, None)
        if attached is not None and attached.model is self.model:
            return self
        self.model_forward = original = _unbound(self.model)

        @functools.wraps(type(self.model).forward)  # generate() reads the signature
        def forward(model: Any, *args: Any, fused_call: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
            if fused_call is None:
                return original(model, *args, **kwargs)
            if args:
                kwargs |= dict(zip(_parameters(type(model).forward), args, strict=False))
            kwargs = {name: value for name, value in kwargs.items() if value is not None}
            head = self.of(model)
            head._settle(kwargs, model)  # first: where a graph breaks, torch warns of tensors with a history
            outputs = head.hidden_states(kwargs)
            return fused_call(outputs, *head.operands(outputs[0]))

        setattr(forward, CALL, self)
        self.model.forward = types.MethodType(forward, self.model)
        return self

    def of(self, model: nn.Module) -> "FusedLMHead":
        """This head for its own model; for a deep copy of it, one like this."""
        if model is self.model:
            return self
        head = copy.copy(self)
        head.model = model
        head.peft_model = None  # that of the copy is not known
        return head

    def check(self, **inputs: Any) -> None:
        """Compare hidden states and logits of these inputs with the model's own, as they are and stretched.

        One forward of two sequences, or of all where not every input has a row for each sequence (images, say); two
        where the model calls a part of its backbone, or with other inputs. Raises ``RuntimeError`` with the size of
        the mismatch.
        """
        self._check(inputs, self._called)

    def _check(self, inputs: dict[str, Any], called: Any) -> None:
        state = self._state()
        if head_check.check(self, inputs, called):
            self._found_right.add(state)


def innermost(model: Any) -> Any:
    """The causal model inside what PEFT and ``torch.compile`` have put around it, in whatever order."""
    return list(_layers(model))[-1]


def _layers(model: Any) -> Iterator[Any]:
    yield model
    while True:
        if isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return
        yield model


def _learns_a_prompt(model: Any) -> bool:
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def backbone(model: Any) -> nn.Module:
    """The part of a causal model that returns hidden states."""
    for candidate in (model.base_model, getattr(model, "model", None)):
        if isinstance(candidate, nn.Module) and candidate is not model:
            return candidate
    raise ValueError(f"{type(model).__name__} has no backbone apart from itself")


# --- what a configuration and a model say about their head ------------------------------------------------------------


def _scaling(config: Any) -> tuple[float, float | None]:
    def first(names: tuple[str, ...]) -> Any:
        return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)

    scale, softcap = first(MULTIPLIERS), first(SOFTCAPS)
    if scale is None and (divider := first(DIVIDERS)) is not None:
        scale = divider if config.model_type in MULTIPLIES_BY_DIVIDER else 1.0 / divider
    return 1.0 if scale is None else float(scale), None if softcap is None else float(softcap)


def _why_not_direct(model: Any) -> str:
    """Whether layers of their own stand between the backbone and the output embedding."""
    embedding, body = model.get_output_embeddings(), backbone(model)
    width = getattr(model.config.get_text_config(), "hidden_size", None)
    linear: Any = lm_head.unwrapped(embedding)
    narrower = width is not None and linear.weight.shape[1] != width
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


def _unbound(model: Any) -> Callable[..., Any]:
    """A model's forward as a function of the model first; a method serves the deep copies of its model too."""
    forward: Callable[..., Any] = model.forward
    if isinstance(forward, types.MethodType) and forward.__self__ is model:
        return forward.__func__

    def alone(other: Any, *args: Any, **kwargs: Any) -> Any:
        if other is not model:
            raise RuntimeError(
                f"a deep copy of this {type(model).__name__} would run the original: when it got {CALL}, something "
                "that is not a method stood for its forward; deep-copy the model before that"
            )
        return forward(*args, **kwargs)

    return alone


def _parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]
