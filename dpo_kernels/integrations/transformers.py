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
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_kernels.integrations import heads

# What the configurations call them. The self-check tells whether a name still means what it did.
MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVIDER = "logits_scaling"
MULTIPLIES_BY_DIVIDER = ("hyperclovax",)
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# The self-check: this many positions and columns of the vocabulary, natural and stretched to this largest logit, at
# which a soft cap of any model shows.
POSITIONS, COLUMNS, STRETCHED = 8, 1024, 100.0
# Largest difference at a position by its largest logit: float32 with TF32 off and on loses 1e-6 to 1e-3, 16-bit logits
# 2^-8. Logits all below 1 are compared as if one were 1.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
LEAST_LARGEST = 1.0

CALL = "fused_call"
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
        ValueError: no linear head: a transform before it, a quantised head, none at all. The message says which.

    """
    return FusedLMHead(model, check=check)


class FusedLMHead:
    """See ``fused_lm_head``. Weights are looked up at every call, since PEFT and others replace them.

    Attributes:
        model: the innermost causal model.
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
        outer: Any = model
        inner = outer.get_base_model() if hasattr(outer, "get_base_model") else outer
        if not hasattr(inner, "get_output_embeddings") or not hasattr(inner, "config"):
            raise TypeError(f"model must be a transformers model with an LM head, got {type(model).__name__}")
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError("prompt-learning adapters put virtual tokens before the labels' positions: not supported")
        self.model: Any = inner
        if reason := heads.why_not_linear(inner.get_output_embeddings()) or _why_not_direct(inner):
            raise ValueError(f"{type(inner).__name__}: {reason}")
        self.logit_scale, self.softcap = _scaling(inner.config.get_text_config())
        self.checked = not check
        # The forward before attach(), a function of the model first. What wraps the model later is not entered twice:
        # accelerate's is one autocast object, which, entered inside itself, would never switch autocast off again.
        self._forward: Callable[..., Any] = nn.Module.__call__

    @property
    def output_embedding(self) -> nn.Module:
        """The head's module, PEFT's wrapper included."""
        return self.model.get_output_embeddings()

    @property
    def options(self) -> dict[str, Any]:
        """``logit_scale`` and ``softcap``, as the fused functions take them."""
        return {"logit_scale": self.logit_scale, "softcap": self.softcap}

    def __call__(self, **inputs: Any) -> HeadInputs:
        """The model's last hidden states and its head, from the model's own inputs (no labels)."""
        return self.run(inputs)[1]

    def run(self, inputs: dict[str, Any]) -> tuple[Any, HeadInputs]:
        """The backbone's outputs (router logits, say), and its hidden states with the head."""
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if not self.checked:
            self.check(**inputs)
        outputs = backbone(self.model)(**inputs | {"use_cache": False})
        return outputs, self.operands(outputs[0])

    def operands(self, hidden: Tensor) -> HeadInputs:
        """The head as applied to hidden states ``(..., H)``: LoRA makes H larger."""
        hidden, weight, bias = heads.operands(self.output_embedding, hidden)
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
        self._forward = original = _unbound(self.model)

        @functools.wraps(type(self.model).forward)  # generate() reads the signature
        def forward(model: Any, *args: Any, fused_call: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
            if fused_call is None:
                return original(model, *args, **kwargs)
            if args:
                kwargs |= dict(zip(_parameters(type(model).forward), args, strict=False))
            head = self.of(model)
            outputs, given = head.run(kwargs)
            self.checked = head.checked  # a copy has the same class and configuration
            return fused_call(outputs, *given)

        setattr(forward, CALL, self)
        self.model.forward = types.MethodType(forward, self.model)
        return self

    def of(self, model: nn.Module) -> "FusedLMHead":
        """This head for its own model; for a deep copy of it, one like this."""
        if model is self.model:
            return self
        head = copy.copy(self)
        head.model = model
        return head

    @torch.no_grad()
    def check(self, **inputs: Any) -> None:
        """Compare logits at a few positions of these inputs with the model's own, as they are and stretched.

        One forward of at most two sequences. Raises ``RuntimeError`` with the size of the mismatch.
        """
        few = {name: _first_rows(value) for name, value in inputs.items() if name != "labels"}
        few["use_cache"] = False
        parameters = _parameters(type(self.model).forward)
        if "logits_to_keep" in parameters:
            few["logits_to_keep"] = POSITIONS
        with evaluating(self.model), _stretching(self) as seen:
            logits = self._forward(self.model, **few).logits
            if "hidden" not in seen:  # TRL's wrapper of a forward, deep-copied, still runs the model it was made for
                logits = type(self.model).forward(self.model, **few).logits
        if "hidden" not in seen:
            raise RuntimeError(f"{type(self.model).__name__} computes logits without calling its backbone")
        kept = min(logits.shape[1], POSITIONS)
        hidden, weight, options = self.operands(seen["hidden"][:, -kept:])
        last = logits.shape[-1] - 1
        columns = torch.linspace(0, last, min(COLUMNS, last + 1), dtype=torch.float64, device="cpu").round().long()
        columns = columns.to(weight.device)
        ours = self._logits(hidden, weight, options["bias"], columns)
        model = logits[:, -kept:].to(ours.device).index_select(-1, columns).to(ours.dtype)
        largest = model.abs().amax(dim=-1, keepdim=True).clamp(min=LEAST_LARGEST)
        error = float(((ours - model).abs() / largest).amax())
        tolerance = max(TOLERANCE[dtype] for dtype in (logits.dtype, _operand_dtype(weight)))
        if not error <= tolerance:
            raise RuntimeError(
                f"the fused head does not reproduce the logits of {type(self.model).__name__}: with "
                f"logit_scale={self.logit_scale}, softcap={self.softcap} and "
                f"{'a' if options['bias'] is not None else 'no'} bias they differ by {error:.1e} of the largest logit "
                f"at a position (allowed: {tolerance:.0e}). The model does something between its hidden states and its "
                "logits that this version does not know; set head.logit_scale and head.softcap, or use the model's own "
                "logits."
            )
        self.checked = True

    def _logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor) -> Tensor:
        # Rounded as the model rounds them: where a cap squeezes large logits, their errors show beside small ones.
        narrow, wide = _operand_dtype(weight), torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            logits = hidden.to(narrow).to(wide) @ weight[columns].to(narrow).to(wide).t()
            if bias is not None:
                logits = logits + bias[columns].to(wide)
            logits = logits * self.logit_scale
            return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def backbone(model: Any) -> nn.Module:
    """The part of a causal model that returns hidden states."""
    for candidate in (model.base_model, getattr(model, "model", None)):
        if isinstance(candidate, nn.Module) and candidate is not model:
            return candidate
    raise ValueError(f"{type(model).__name__} has no backbone apart from itself")


# --- what a configuration and a model say about their head ------------------------------------------------------------


def _scaling(config: Any) -> tuple[float, float | None]:
    scale = next((getattr(config, name) for name in MULTIPLIERS if getattr(config, name, None) is not None), None)
    if scale is None and (divider := getattr(config, DIVIDER, None)) is not None:
        scale = divider if config.model_type in MULTIPLIES_BY_DIVIDER else 1.0 / divider
    softcap = next((getattr(config, name) for name in SOFTCAPS if getattr(config, name, None) is not None), None)
    return 1.0 if scale is None else float(scale), None if softcap is None else float(softcap)


def _why_not_direct(model: Any) -> str:
    """Whether layers of their own stand between the backbone and the output embedding."""
    embedding, body = model.get_output_embeddings(), backbone(model)
    for name, child in model.named_children():
        if child is body or child is embedding:
            continue
        others = {id(p) for p in child.parameters()} - {id(p) for p in (*embedding.parameters(), *body.parameters())}
        holds = any(module is embedding for module in child.modules())
        if others and (holds or "Head" in type(child).__name__):
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


# --- the self-check ---------------------------------------------------------------------------------------------------


def _operand_dtype(weight: Tensor) -> torch.dtype:
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _first_rows(value: Any) -> Any:
    return value[:2] if isinstance(value, Tensor) and value.dim() >= 2 else value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, no checkpointing, and afterwards every module as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _stretching(head: FusedLMHead) -> Iterator[dict[str, Tensor]]:
    """Stretch the hidden states at every other position on their way to the head; yields what the head then got."""
    seen: dict[str, Tensor] = {}

    def hook(module: nn.Module, args: Any, outputs: Any) -> Any:
        hidden = outputs[0]
        given, weight, _ = head.operands(hidden[:, -POSITIONS:])
        columns = torch.arange(min(COLUMNS, weight.shape[0]), device=weight.device)
        plain = (given.float() @ weight[columns].float().t()).abs().amax() * abs(head.logit_scale)
        # Hidden states of 16 bits must stay in their range.
        factor = float((STRETCHED / plain.clamp(min=1e-6)).clamp(max=1e4 / float(hidden.abs().amax().clamp(min=1e-6))))
        odd = torch.arange(hidden.shape[1], device=hidden.device) % 2 == 1
        seen["hidden"] = torch.where(odd[:, None], hidden * factor, hidden)
        if isinstance(outputs, tuple):
            return (seen["hidden"], *outputs[1:])
        outputs["last_hidden_state"] = seen["hidden"]
        return outputs

    handle = backbone(head.model).register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()
