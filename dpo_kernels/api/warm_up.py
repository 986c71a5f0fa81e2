"""What the first step of a training would do beside its work, done before it: ``warm_up``."""

from typing import Any

import torch
from torch import Tensor

from dpo_kernels import checks, losses
from dpo_kernels.api.pairs import explain, fused_dpo_loss
from dpo_kernels.distributed.group import Ranks, all_ranks
from dpo_kernels.inputs.tensors import check_float_tensor, check_weight
from dpo_kernels.planning.plan import Plan
from dpo_kernels.planning.tables import BACKENDS
from dpo_kernels.shapes import KL

LENGTH = 128  # tokens of each sequence of the call: short, so that no pair is longer than a chunk
# A warm-up runs on each rank by itself, and leaves nothing behind.
NOT_FOR_WARM_UP = ("vocab_parallel", "context_parallel", "main_grad", "main_grad_scale")
MADE_HERE = ("hidden", "labels")
TRAINED = ("weight", "bias")
BIASES = ("bias", "ref_bias")  # tensors that every batch has in common


def warm_up(
    weight: Tensor,
    rows: int = 4096,
    *,
    dtype: torch.dtype | None = None,
    ref_weight: Tensor | None = None,
    group: Any = None,
    **options: Any,
) -> Plan:
    """Compile kernels, check them and choose among their launches before the first step of a training.

    A step of ``fused_dpo_loss`` runs on random hidden states, forward and backward, and does what a process does once.
    Without a warm-up the first call of each kind does that. Under ``torch.distributed`` the first rank times the
    launches, and the others take its choices.

    Args:
        weight: Weight of the LM head, ``(V, H)``; float32, bfloat16, float16 or float64. It is not changed and gets no
            gradient. Whether it requires one decides what is run. Of a split head pass this rank's rows. Of a head that
            an engine shards pass an empty tensor with the shape of the whole.
        rows: Scored tokens of the call, an integer >= 1, rounded up to whole pairs of 256. The launches are timed at
            this size, for calls of any size. What an earlier call has timed with fewer than 512 rows is timed again. So
            give 512 or more, or the first call with as many times again.
        dtype: dtype of the hidden states. None means that of ``weight``. Under autocast they may differ.
        ref_weight: Weight of the reference's head, ``(V, H_ref)``, if the reference is scored in the call. None leaves
            that out. A loss that needs the KL divergence from the reference then takes ``weight`` for both.
        group: Process group, ``DeviceMesh`` of one dimension or ``(mesh, "name")`` whose ranks take one choice. Each
            of them must make this call. None means all ranks where ``torch.distributed`` is initialised, and otherwise
            this process. Where only some ranks have a head, as with pipelines, name their group.
        **options: Other keyword arguments of ``fused_dpo_loss``, as the training passes them. ``bias``, ``softcap``,
            ``stats``, ``shift``, ``loss_type``, ``strategy`` and ``backend`` decide about the kernels. Of tensors that
            belong to a batch, as ``cu_seqlens``, only the dtype counts: the call makes its own. ``rows`` of that
            function is not among them.

    Returns:
        The plan of the call, as ``explain`` returns it.

    Raises:
        ValueError: An option is wrong, or is none for a warm-up. A weight has another shape, or no values, as on the
            meta device, or requires a gradient but was made under ``torch.inference_mode``.
        TypeError: A dtype or a type is wrong. A module is no weight.
        RuntimeError: The first rank has raised an error. Or a frozen head was made under ``torch.inference_mode``, and
            the strategy that was asked for keeps it until the backward pass.

    Example:
        >>> import torch
        >>> from dpo_kernels import warm_up
        >>> head = torch.nn.Linear(8, 50, bias=False)
        >>> warm_up(head.weight, rows=300).strategy, head.weight.grad
        ('chunked', None)
    """
    if rows is None:
        raise TypeError("rows must be an integer, got None")
    checks.check_count("rows", rows, least=1)
    if refused := sorted(set(options) & set(NOT_FOR_WARM_UP)):
        raise ValueError(f"{', '.join(refused)}: not for a warm-up, which each rank runs by itself")
    if refused := sorted(set(options) & set(MADE_HERE)):
        raise ValueError(f"{', '.join(refused)}: not for a warm-up, which makes its own")
    ranks = all_ranks() if group is None else Ranks(group)
    if ranks is None:
        return _step(weight, rows, dtype, ref_weight, options)
    # What is wrong with a weight is said in the step, so that a first rank that raises still answers the others.
    device = weight.device if isinstance(weight, Tensor) and not weight.is_meta else None
    if ranks.first:
        choices = None
        try:
            plan = _step(weight, rows, dtype, ref_weight, options)
            kernels = BACKENDS[plan.backend].load()
            choices = (plan.backend, kernels.chosen_launches())
            kernels.take_launches(choices[1])  # as the others do: whatever comes later, all keep them
        finally:
            ranks.from_first(choices, device)
        return plan
    choices = ranks.from_first(None, device)
    if choices is None:
        raise RuntimeError("the first rank has raised an error in its warm-up")
    name, launches = choices
    BACKENDS[name].load().take_launches(launches)
    return _step(weight, rows, dtype, ref_weight, options)


@torch.inference_mode(mode=False)
def _step(
    weight: Tensor, rows: int, dtype: torch.dtype | None, ref_weight: Tensor | None, options: dict[str, Any]
) -> Plan:
    """Run a step with pairs of two sequences of ``LENGTH`` tokens, and return its plan."""
    _check_heads({"weight": weight, "ref_weight": ref_weight} | {name: options.get(name) for name in BIASES})
    if options.get("ref_hidden") is not None:
        check_float_tensor("ref_hidden", options["ref_hidden"])
    if dtype is not None and dtype not in checks.FLOAT_DTYPES:
        raise TypeError(f"dtype must be torch.float32, bfloat16, float16 or float64, got {dtype!r}")
    pairs, device = -(-rows // (2 * LENGTH)), weight.device
    tokens = (2 * pairs, LENGTH)
    generator = torch.Generator(device).manual_seed(0)  # of its own: that of the training stays as it is

    def states(width: int, of: torch.dtype) -> Tensor:
        return torch.empty(*tokens, width, dtype=of, device=device).normal_(generator=generator)

    def own(name: str, value: Any) -> Any:
        """The call's own tensor in the place of one of a batch."""
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if name in BIASES:
            return value.detach().requires_grad_(value.requires_grad and name == "bias")
        if name == "ref_hidden":
            return states(value.shape[-1], value.dtype)
        if name == "cu_seqlens":
            return torch.arange(2 * pairs + 1, dtype=value.dtype, device=device) * LENGTH
        size = {"token_weights": tokens, "ref_token_logps": tokens, "ref_logps": tokens[:1]}.get(name, (pairs,))
        return torch.ones(size, dtype=value.dtype, device=device)

    hidden = states(weight.shape[1], dtype or weight.dtype)
    labels = torch.randint(0, weight.shape[0], tokens, device=device, generator=generator)
    left_out = {name for name in ("ref_hidden", "ref_weight") if options.get(name) is None}
    given = {name: own(name, value) for name, value in options.items() if name not in left_out}
    if ref_weight is not None:
        given["ref_weight"] = ref_weight.detach()
        given.setdefault("ref_hidden", states(ref_weight.shape[1], ref_weight.dtype))
    elif KL in (given.get("stats") or ()) or losses.needs_kl(given.get("loss_type", "sigmoid")):
        given.setdefault("ref_weight", weight.detach())
        given.setdefault("ref_hidden", states(weight.shape[1], weight.dtype))
    if all(given.get(name) is None for name in ("ref_hidden", "ref_logps", "ref_token_logps")):
        given["reference_free"] = True
    if given.get("cu_seqlens") is not None:
        hidden, labels = hidden.flatten(0, 1), labels.flatten()
        for name in {"ref_hidden", "ref_token_logps", "token_weights"} & given.keys():
            given[name] = given[name].flatten(0, 1)
    head = weight.detach().requires_grad_(weight.requires_grad)
    with torch.enable_grad():
        plan = explain(hidden.requires_grad_(), head, labels, **given)
        fused_dpo_loss(hidden, head, labels, **given).loss.sum().backward()
    return plan


def _check_heads(tensors: dict[str, Any]) -> None:
    """Raise unless the tensors of the heads have values for a backward pass. All but ``weight`` may be None."""
    for name, value in tensors.items():
        if value is None and name != "weight":
            continue
        check_float_tensor(name, value)
        if not checks.has_values(value):
            raise ValueError(f"{name} has no values, as on the meta device or in a tracer: load the head first")
        if name in TRAINED and value.requires_grad and value.is_inference():
            raise ValueError(f"{name} requires a gradient but was made under torch.inference_mode(): give its clone()")
        if name not in BIASES:
            check_weight(name, value)
