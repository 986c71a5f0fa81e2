"""The self-check of a fused head: it must give the logits that the model itself gives.

Two things are compared. What the output embedding receives in the model's own forward must be what the backbone
returns, and the model's logits must be those of the fused head. A hook on the output embedding sees both, whatever part
of the backbone the model calls and whatever its inputs are.
"""

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_kernels.distributed import sharded_heads
from dpo_kernels.integrations import head_forward, lm_head, positions

# The logits of this many tokens of the vocabulary are compared. At every other position the hidden states are stretched
# until the largest logit is STRETCHED, at which a soft cap of any model shows.
COLUMNS, STRETCHED = 1024, 100.0
# The largest difference of logits at a position, relative to the largest logit there, by dtype. float32 loses 1e-6
# without and 1e-3 with TF32, bfloat16 loses 2^-8. Where all logits are below LEAST_LARGEST, it takes the place of the
# largest.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
LEAST_LARGEST = 1.0

# This stands in the error where the output embedding does not receive the backbone's hidden states.
BETWEEN = " (what its output embedding receives is not what its backbone returns)"
# The check leaves these inputs of the model out, since it wants no loss and the logits of every position.
NOT_FOR_THE_CHECK = ("labels", "output_router_logits", "logits_to_keep")
SWITCH_OFF = "check=False leaves this check out (check_head = False on FusedDPOTrainer)"


# The check is never traced. Its hooks and the numbers that it reads would break a graph, or the tracer.
@torch.compiler.disable(reason="a fused head is checked eagerly: call head.check(**inputs) before, or give check=False")
@torch.no_grad()
def check(head: Any, inputs: dict[str, Any], called: Any) -> bool:
    """Check that a ``FusedLMHead`` gives the logits of its model.

    Args:
        head: the ``FusedLMHead``.
        inputs: the model's own inputs by name.
        called: what is called with them, the model or PEFT's model around it.

    Returns:
        True where the logits agree. False where all positions are padding, so that nothing could be compared.

    Raises:
        RuntimeError: the logits differ, or the model does something between its backbone and its logits.

    Example::

        check(fused_lm_head(model), {"input_ids": ids, "attention_mask": mask}, model)

    """
    name, few = type(head.model).__name__, _few(inputs, sharded_heads.gathers(head.model))
    if few is None:
        return False
    with torch.compiler.set_stance("force_eager"), evaluating(head.model):
        ahead = _ahead(head, few) if sharded_heads.gathers(head.output_embedding) else None
        with _stretching(head, few.get("attention_mask"), ahead) as seen, _watching(head.backbone) as returned:
            run = functools.partial(head.model_forward, head.model) if called is head.model else called
            logits = _logits(run(**few))
            if not seen:  # TRL's wrapper of a forward, deep-copied, still runs the model it was made for
                logits = _logits(type(head.model).forward(head.model, **few))
        if not seen:
            raise RuntimeError(
                f"{name} computes logits without calling its output embedding, so that nothing tells whether they are "
                f"linear in its hidden states: use the model's own logits. {SWITCH_OFF}."
            )
        # Within PEFT's forward a backbone may return something else than when it is called by itself.
        hidden = ahead.hidden if ahead else _hidden_states(head, few, returned if called is head.model else {})
    received = seen["natural"]
    if hidden.shape != received.shape:
        raise RuntimeError(
            f"the backbone of {name} returns hidden states {tuple(hidden.shape)}, but its output embedding receives "
            f"{tuple(received.shape)}: the model does something between the two that the fused head does not know. Use "
            f"the model's own logits. {SWITCH_OFF}."
        )
    if not len(seen["places"][0]):
        return False
    hidden = positions.taken(hidden, seen["places"]).to(received.device)
    close = torch.allclose(hidden.to(received.dtype), positions.taken(received, seen["places"]), 1e-2, 1e-3)
    ours = ahead.ours if ahead else _fused_logits(head, *head.operands(positions.stretched(hidden, seen["factor"])))
    _compare(head, logits, ours, "" if close else BETWEEN)
    return True


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode while this context is open, and then every module back into its own mode.

    Args:
        model: the model. Without training mode it uses no dropout and no gradient checkpointing.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        >>> with evaluating(model):
        ...     model[1].training
        False
        >>> model[1].training
        True

    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _few(inputs: dict[str, Any], in_step: bool = False) -> dict[str, Any] | None:
    """Take a few sequences of the inputs; None if all is padding.

    All sequences are taken unless every input certainly has one row for each sequence. With ``in_step`` ranks must run
    the same forwards, so that a batch which is all padding is taken without its mask.
    """
    inputs = {n: value for n, value in inputs.items() if value is not None and n not in NOT_FOR_THE_CHECK}
    ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if not isinstance(ids, Tensor) or ids.dim() < 2:
        return inputs | {"use_cache": False}

    rows = positions.kept(inputs.get("attention_mask"), ids.shape[:2])[0]
    if not len(rows) and in_step and ids.shape[:2].numel():
        return _few(inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])})
    if not len(rows):
        return None
    # The first dimension of image patches, position ids (3, B, T) and the like is not the batch, or only by chance.
    by_row = {name for name, value in inputs.items() if isinstance(value, Tensor) and value.shape == ids.shape[:2]}
    by_row.add("input_ids" if "input_ids" in inputs else "inputs_embeds")
    rest = (value for name, value in inputs.items() if name not in by_row)
    if all(isinstance(value, bool | int | float | str) for value in rest):
        inputs |= {name: inputs[name][rows] for name in by_row}
    return inputs | {"use_cache": False}


class _Logits(NamedTuple):
    """Logits of the fused head ``(..., C)`` for some tokens of the vocabulary ``(C,)``, and of how many tokens."""

    logits: Tensor
    columns: Tensor
    vocab: int
    dtype: torch.dtype  # of its operands
    biased: bool


class _Ahead(NamedTuple):
    """Of a head that an engine shards: what is computed of it in its own forward, before the model runs."""

    hidden: Tensor
    factor: float
    ours: _Logits


def _ahead(head: Any, inputs: dict[str, Any]) -> _Ahead:
    """Run backbone and head once, as the model itself does, so that a unit which holds parts of both sees one pass."""
    hidden = _hidden_states(head, inputs, {})
    mask = inputs.get("attention_mask")
    natural = positions.taken(hidden, positions.kept(mask, hidden.shape[:2]))
    found = []

    def work(given: Tensor, weight: Tensor, options: dict[str, Any]) -> None:
        factor = _factor(head, natural, given, weight)
        found.append((factor, _fused_logits(head, positions.stretched(given, factor), weight, options)))

    head.inside(natural, work)
    return _Ahead(hidden, *found[0])


def _factor(head: Any, natural: Tensor, given: Tensor, weight: Tensor) -> float:
    """By how much hidden states are stretched; ``given`` is what the weight is multiplied with."""
    weight = lm_head.gathered(weight)
    columns = torch.arange(min(COLUMNS, weight.shape[0]), device=weight.device)
    plain = (given.float() @ weight[columns].float().t()).abs().amax() * abs(head.logit_scale)
    # This bound keeps hidden states of 16 bits in their range.
    most = 1e4 / float(natural.abs().amax().clamp(min=1e-6))
    return float((STRETCHED / plain.clamp(min=1e-6)).clamp(max=most))


@contextmanager
def _stretching(head: Any, mask: Any, ahead: _Ahead | None) -> Iterator[dict[str, Any]]:
    """Let the output embedding see a few positions only, and every other one of them stretched.

    The dictionary is filled once the model has run. ``natural`` is what the output embedding was to receive, ``places``
    says which positions are compared, and ``factor`` by how much they were stretched.
    """
    seen: dict[str, Any] = {}

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if seen or not args or not isinstance(args[0], Tensor):
            return None
        received = args[0]
        # Hidden states without a batch dimension are one sequence, or all sequences end to end.
        places = positions.kept(mask, received.shape[:2] if received.dim() > 2 else torch.Size([1, len(received)]))
        if not len(places[0]):
            seen.update(natural=received, places=places)
            return None
        hidden = positions.taken(received, places)
        if ahead is None:
            given, weight, _ = head.operands(hidden)
            factor = _factor(head, hidden, given, weight)
        else:
            factor = ahead.factor
        seen.update(natural=received, places=places, factor=factor)
        return (positions.stretched(hidden, factor), *args[1:])

    handle = head_forward.within_fsdp1(head.output_embedding).register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _watching(backbone: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield a dictionary that holds a backbone's ``inputs`` and ``hidden`` states once the model has run."""
    seen: dict[str, Any] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
        seen.update(inputs=kwargs | dict(zip(names, args, strict=False)), hidden=outputs[0])

    handle = backbone.register_forward_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _hidden_states(head: Any, inputs: dict[str, Any], seen: dict[str, Any]) -> Tensor:
    """Return the backbone's hidden states; call it again only if the model has called it with other inputs."""
    if seen and _same_tensors(seen["inputs"], inputs):
        hidden: Tensor = seen["hidden"]
        return hidden
    try:
        hidden = head.hidden_states(inputs)[0]
    except (TypeError, ValueError) as error:
        raise RuntimeError(
            f"the backbone of {type(head.model).__name__} does not take the model's inputs ({error}): use the model's "
            f"own logits. {SWITCH_OFF}."
        ) from error
    return hidden


def _same_tensors(some: dict[str, Any], others: dict[str, Any]) -> bool:
    first, second = ({name: v for name, v in inputs.items() if isinstance(v, Tensor)} for inputs in (some, others))
    if first.keys() != second.keys():
        return False
    return all(first[name] is second[name] or _equal(first[name], second[name]) for name in first)


def _equal(some: Tensor, other: Tensor) -> bool:
    return some.device == other.device and some.dtype == other.dtype and torch.equal(some, other)


def _logits(outputs: Any) -> Tensor:
    logits: Tensor = outputs.logits if hasattr(outputs, "logits") else outputs[0]
    return logits


def _compare(head: Any, logits: Tensor, ours: _Logits, between: str) -> None:
    error = float("inf")
    if logits.shape[-1] == ours.vocab:
        model = logits.to(ours.logits.device).index_select(-1, ours.columns).to(ours.logits.dtype)
        largest = model.abs().amax(dim=-1, keepdim=True).clamp(min=LEAST_LARGEST)
        error = float(((ours.logits - model).abs() / largest).amax())
    tolerance = max(TOLERANCE[dtype] for dtype in (logits.dtype, ours.dtype))
    if not error <= tolerance:
        raise RuntimeError(
            f"the fused head does not reproduce the logits of {type(head.model).__name__}: with "
            f"logit_scale={head.logit_scale}, softcap={head.softcap} and "
            f"{'a' if ours.biased else 'no'} bias they differ by {error:.1e} of the largest logit "
            f"at a position (allowed: {tolerance:.0e}). The model does something between its hidden states and its "
            f"logits that this version does not know{between}; set head.logit_scale and head.softcap, or use the "
            f"model's own logits. {SWITCH_OFF}."
        )


def _fused_logits(head: Any, hidden: Tensor, weight: Tensor, options: dict[str, Any]) -> _Logits:
    # Operands are rounded as the model rounds them. Where a cap squeezes large logits, their errors would otherwise
    # show beside small ones.
    weight, bias = lm_head.gathered(weight), lm_head.gathered(options["bias"])
    vocab = weight.shape[0]
    columns = torch.linspace(0, vocab - 1, min(COLUMNS, vocab), dtype=torch.float64, device="cpu").round().long()
    columns = columns.to(weight.device)
    narrow, wide = _operand_dtype(weight), torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(narrow).to(wide) @ weight[columns].to(narrow).to(wide).t()
        if bias is not None:
            logits = logits + bias[columns].to(wide)
        logits = logits * head.logit_scale
        logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
    return _Logits(logits, columns, vocab, narrow, bias is not None)


def _operand_dtype(weight: Tensor) -> torch.dtype:
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
