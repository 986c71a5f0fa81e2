"""The LM head of a Hugging Face causal model, as the fused functions take it.

    head = fused_lm_head(model)
    hidden, weight, options = head(input_ids=..., attention_mask=...)
    out = fused_dpo_loss(hidden, weight, labels, shift=True, ref_logps=..., **options)

DistributedDataParallel and accelerate's autocast work only where the wrapped model itself is called. For them the work
is handed to the model's own forward: call ``head.attach()`` once before wrapping. Then
``wrapped(**inputs, fused_call=work)`` returns ``work(outputs, hidden, weight, options)``.
"""

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dpo_kernels.distributed import sharded_heads
from dpo_kernels.integrations import head_check, head_forward, head_operands, lm_head, model_parts
from dpo_kernels.integrations.head_forward import CALL
from dpo_kernels.integrations.head_operands import HeadInputs
from dpo_kernels.integrations.requirements import TRANSFORMERS, require

FOR_PEFTS_FORWARD = ("adapter_names", "alora_offsets", "task_ids")  # inputs that only PEFT's own forward reads
# Class names of wrappers that synchronise gradients in their own forward, which must therefore be called.
WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")


def fused_lm_head(model: nn.Module, *, check: bool = True) -> "FusedLMHead":
    """Give the head of a causal model in the form that the fused functions take.

    Args:
        model: a ``PreTrainedModel`` with a language modelling head, or a ``PeftModel`` of one.
        check: compare a few positions of the first batch with the model's own logits.

    Returns:
        A callable: ``head(**inputs)`` gives hidden states, the head's weight and its options.

    Raises:
        ImportError: transformers is older than 4.55.
        TypeError: the model is not one of transformers, or is inside a wrapper whose ``forward`` must be called (see
            ``attach``).
        ValueError: the head is missing, quantised, or not linear in the hidden states; or an active adapter acts in
            PEFT's own forward (aLoRA, X-LoRA), which is not called. The message says which.

    Example:
        >>> import torch
        >>> from dpo_kernels import fused_sequence_logps
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> ids = torch.tensor([[3, 4, 5], [3, 4, 6]])
        >>> hidden, weight, options = fused_lm_head(model)(input_ids=ids)
        >>> fused_sequence_logps(hidden, weight, ids, shift=True, **options).shape
        torch.Size([2])

    """
    return FusedLMHead(model, check=check)


class FusedLMHead:
    """The head of a causal model; make one with ``fused_lm_head``.

    Weights are looked up at every call, since PEFT and others replace them.

    Args:
        model: as for ``fused_lm_head``.
        check: as for ``fused_lm_head``.

    Attributes:
        model: the innermost causal model.
        peft_model: PEFT's model around it, or None.
        logit_scale: factor on the logits.
        softcap: soft cap of the logits after scaling, or None.
        checking: whether the self-check is wanted.

    Raises:
        ImportError, TypeError, ValueError: as in ``fused_lm_head``.

    Example::

        head = FusedLMHead(model, check=False)
        head.softcap = 30.0  # where the configuration does not say it

    """

    def __init__(self, model: nn.Module, *, check: bool = True) -> None:
        if type(model).__name__ in WRAPPERS:
            raise TypeError(
                f"model is wrapped in {type(model).__name__}, whose forward must be called for gradients to be "
                "synchronised: call fused_lm_head(model).attach() before wrapping, then "
                f"wrapped(**inputs, {CALL}=...)"
            )
        require("transformers", TRANSFORMERS, "fused_lm_head")
        inner = model_parts.innermost(model)
        if not hasattr(inner, "get_output_embeddings") or not hasattr(inner, "config"):
            raise TypeError(f"model must be a transformers model with an LM head, got {type(model).__name__}")
        if any(model_parts.learns_a_prompt(layer) for layer in model_parts.layers_around(model)):
            raise ValueError("prompt-learning adapters put virtual tokens before the labels' positions: not supported")
        self.model: Any = inner
        self.peft_model: Any = next(
            (layer for layer in model_parts.layers_around(model) if hasattr(layer, "get_base_model")), None
        )
        if reason := lm_head.left_out(inner, self.peft_model):
            raise ValueError(reason)
        if reason := lm_head.why_not_linear(inner.get_output_embeddings()) or model_parts.why_not_direct(inner):
            raise ValueError(f"{type(inner).__name__}: {reason}")
        self.logit_scale, self.softcap = model_parts.logit_scaling(inner.config.get_text_config())
        self.checking = check
        self._found_right: set[Any] = set()  # the states of the head that were compared; deep copies share them
        # The forward before attach(), as a function of the model first. The self-check calls it, so that it does not
        # enter a second time what wraps the model later. accelerate's wrapper is one autocast object. Entered inside
        # itself, it would never switch autocast off again.
        self.model_forward: Callable[..., Any] = nn.Module.__call__

    @property
    def output_embedding(self) -> nn.Module:
        """The head's module, with PEFT's wrapper and FSDP's around it."""
        return self.model.get_output_embeddings()

    @property
    def backbone(self) -> nn.Module:
        """The part of the model that returns hidden states."""
        return model_parts.backbone(self.model)

    @property
    def options(self) -> dict[str, Any]:
        """``logit_scale`` and ``softcap``, as the fused functions take them."""
        return {"logit_scale": self.logit_scale, "softcap": self.softcap}

    @property
    def checked(self) -> bool:
        """Whether the head was compared as it is now. It must be compared again where its adapters have changed."""
        return not self.checking or self._state() in self._found_right

    def _state(self) -> tuple[Any, ...]:
        return (self.logit_scale, self.softcap, *lm_head.state(self.output_embedding))

    def __call__(self, **inputs: Any) -> HeadInputs:
        """Compute hidden states, and give them with the head.

        Args:
            **inputs: the model's own inputs, without labels.

        Returns:
            ``(hidden, weight, options)`` for the fused functions.

        Raises:
            ValueError: an input is read only by PEFT's own forward, which is not called.
            RuntimeError: the self-check fails.

        """
        return self.run(inputs)[1]

    def run(self, inputs: dict[str, Any]) -> tuple[Any, HeadInputs]:
        """Do as a call does, and give the backbone's outputs too.

        Args:
            inputs: the model's own inputs by name, without labels.

        Returns:
            The backbone's outputs, among them router logits if there are any, and ``(hidden, weight, options)``.

        Raises:
            ValueError, RuntimeError: as in a call.

        """
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if unread := [name for name in FOR_PEFTS_FORWARD if name in inputs]:
            raise ValueError(
                f"{', '.join(unread)}: only PEFT's own forward reads this, and it is not called; leave it out"
            )
        if sharded_heads.gathers(self.output_embedding):
            raise ValueError(
                "an engine shards the head, and its weight is whole in the head's own forward only: use attach(), and "
                f"wrapped(**inputs, {CALL}=work)"
            )
        self._settle(inputs, self._called)
        outputs = self.hidden_states(inputs)
        return outputs, self.operands(outputs[0])

    @property
    def _called(self) -> Any:
        return self.model if self.peft_model is None else self.peft_model

    def _settle(self, inputs: dict[str, Any], called: Any) -> None:
        """Raise where the backbone or the head would not give what ``called`` gives, which is the model or PEFT's."""
        if reason := lm_head.left_out(self.model, self.peft_model):
            raise ValueError(reason)
        if not self.checked:
            self._check(inputs, called)

    def hidden_states(self, inputs: dict[str, Any]) -> Any:
        """Call the backbone.

        Args:
            inputs: the model's own inputs by name, without labels.

        Returns:
            Its outputs, with the last hidden states ``(B, T, H)`` first.

        """
        return self.backbone(**inputs | {"use_cache": False})

    def operands(self, hidden: Tensor) -> HeadInputs:
        """Give the head as it is applied to hidden states.

        Args:
            hidden: floating point ``(..., H)``.

        Returns:
            ``(hidden, weight, options)``. A LoRA adapter on the head makes the last dimension of both tensors larger.

        Raises:
            ValueError: as in ``head_operands.operands``.

        """
        hidden, weight, bias = head_operands.operands(self.output_embedding, hidden)
        return HeadInputs(hidden, weight, {"bias": bias, **self.options})

    def inside(self, hidden: Tensor, work: Callable[[Tensor, Tensor, dict[str, Any]], Any]) -> Any:
        """Run work in the head's own forward, where an engine that shards the head has gathered it.

        Args:
            hidden: floating point ``(..., H)``.
            work: it is called with ``(hidden, weight, options)`` as ``operands`` gives them.

        Returns:
            What ``work`` returns.

        Raises:
            ValueError: as in ``head_operands.inside``.

        """

        def read(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            return work(hidden, weight, {"bias": bias, **self.options})

        return head_operands.inside(self.output_embedding, hidden, read)

    def attach(self) -> "FusedLMHead":
        """Give the model's ``forward`` the keyword ``fused_call``.

        ``model(**inputs, fused_call=work)`` returns ``work(outputs, hidden, weight, options)``. A wrapper of the model
        sees one ordinary call of it. Without the keyword ``forward`` is what it was. A second ``attach`` changes
        nothing. A deep copy of the model has the keyword too, and computes with its own weights.

        Returns:
            The head itself.

        """
        attached = getattr(self.model.forward, CALL, None)
        if attached is not None and attached.model is self.model:
            return self
        self.model_forward = original = head_forward.unbound_forward(self.model)

        @functools.wraps(type(self.model).forward)  # generate() reads the signature
        def forward(model: Any, *args: Any, fused_call: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
            if fused_call is None:
                return original(model, *args, **kwargs)
            if args:
                kwargs |= dict(zip(model_parts.forward_parameters(model), args, strict=False))
            kwargs = {name: value for name, value in kwargs.items() if value is not None}
            head = self.of(model)
            head._settle(kwargs, model)  # first: where a graph breaks, torch warns of tensors with a history
            outputs = head.hidden_states(kwargs)
            if sharded_heads.gathers(head.output_embedding):
                result = head.inside(outputs[0], functools.partial(fused_call, outputs))
            else:  # in this frame: where a graph breaks, few are compiled
                sharded_heads.mark_gathered(head.output_embedding, model)
                result = fused_call(outputs, *head.operands(outputs[0]))
            for unit in (head.peft_model, model):
                sharded_heads.return_unrounded(unit, result)
            return result

        setattr(forward, CALL, self)
        head_forward.attach(self.output_embedding)
        self.model.forward = types.MethodType(forward, self.model)
        return self

    def of(self, model: nn.Module) -> "FusedLMHead":
        """Give the head for a model or for a deep copy of it.

        Args:
            model: the head's own model, or a deep copy.

        Returns:
            The head itself, or a head like it for the copy.

        """
        if model is self.model:
            return self
        head = copy.copy(self)
        head.model = model
        head.peft_model = None  # PEFT's model around the copy is not known
        return head

    def check(self, **inputs: Any) -> None:
        """Compare hidden states and logits of these inputs with the model's own, as they are and stretched.

        This costs one forward of two sequences. It is one of all sequences if an input, such as images, has no row for
        each sequence. A model that calls only a part of its backbone is run twice.

        Args:
            **inputs: the model's own inputs, without labels.

        Raises:
            RuntimeError: they differ. The message says by how much.

        """
        self._check(inputs, self._called)

    def _check(self, inputs: dict[str, Any], called: Any) -> None:
        state = self._state()
        if head_check.check(self, inputs, called):
            self._found_right.add(state)
