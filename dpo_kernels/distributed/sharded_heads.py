"""A head whose weights an engine shards over the ranks: FSDP1, FSDP2 (``fully_shard``) or ZeRO-3."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Where each engine can be told. FSDP1 keeps the module in a wrapper, which must be called. FSDP2 makes the module's
# class a subclass of this one. ZeRO-3 gives its parameters this attribute.
FSDP1 = "_fsdp_wrapped_module"
FSDP2 = "FSDPModule"
ZERO3 = "ds_tensor"
# ``mark_gathered`` gives the parameters that FSDP2 has gathered this attribute. They look like any others otherwise.
GATHERED_BY = "gathered_by"


def engine_of(module: nn.Module) -> str | None:
    """Say which engine gathers weights around a module's own forward.

    Args:
        module: any module.

    Returns:
        "FSDP1", "FSDP2", "ZeRO-3", or None. For a module inside a larger unit of FSDP it is None.

    Example:
        >>> from torch import nn
        >>> engine_of(nn.Linear(4, 8)) is None
        True
    """
    if FSDP1 in module._modules:
        return "FSDP1"
    if any(base.__name__ == FSDP2 for base in type(module).__mro__):
        return "FSDP2"
    if any(hasattr(parameter, ZERO3) for parameter in module.parameters(recurse=False)):
        return "ZeRO-3"
    return None


def gathers(module: nn.Module) -> bool:
    """Say whether an engine gathers weights around the forward of a module, or of any module inside it.

    All ranks must then run the same modules in the same order.

    Args:
        module: any module.

    Returns:
        False without an engine, and for modules whose weights a larger unit of FSDP holds.

    Example:
        >>> from torch import nn
        >>> gathers(nn.Sequential(nn.Linear(4, 8)))
        False
    """
    return any(engine_of(part) is not None for part in module.modules())


def return_unrounded(module: nn.Module | None, result: Any) -> None:
    """Let the call of a module that is running return a result as it is, and not in the unit's ``output_dtype``.

    accelerate sets this dtype to that of the training. In 16 bits a log-prob of -300 would be off by one.

    Args:
        module: a module whose forward is running. Unless it is a unit of FSDP2 with an ``output_dtype``, nothing is
            done.
        result: what its forward is about to return.

    Example:
        >>> from torch import nn
        >>> return_unrounded(nn.Linear(4, 8), None)
    """
    if module is None or torch.compiler.is_compiling() or engine_of(module) != "FSDP2":
        return
    from torch.distributed.fsdp import fully_shard

    state: Any = fully_shard.state(module)  # type: ignore[attr-defined]
    if state._mp_policy.output_dtype is None or state._training_state.name != "FORWARD":
        return

    # It is the last of the module's hooks. What FSDP2 hooks for the backward is on the tensors of the result.
    def instead(module: nn.Module, args: Any, rounded: Any) -> Any:
        handle.remove()
        return result

    handle = module.register_forward_hook(instead)


def mark_gathered(module: nn.Module, unit: nn.Module | None = None) -> None:
    """Let the parameters of a module say that FSDP2 has gathered them, if it has.

    A gradient of such a parameter is reduced over the ranks as a dense tensor.

    Args:
        module: a module whose unit is gathered.
        unit: the module that ``fully_shard`` was called with. None stands for ``module``.

    Example:
        >>> from torch import nn
        >>> mark_gathered(nn.Linear(4, 8))
    """
    if torch.compiler.is_compiling() or engine_of(module if unit is None else unit) != "FSDP2":
        return
    for parameter in module.parameters():
        if type(parameter).__name__ != "DTensor":
            setattr(parameter, GATHERED_BY, "FSDP2")


@contextmanager
def unsharded(module: nn.Module) -> Iterator[nn.Module]:
    """Gather the weights of a module of one's own loop, so that they can be read outside of its forward.

    Their gradients are reduced and sharded by the engine, as those of any other module. Enter it on every rank::

        with unsharded(model.lm_head) as head:
            out = fused_dpo_loss(hidden, head.weight, labels, ref_logps=ref_logps)
            out.loss.backward()

    FSDP2 frees the weights at the end of the backward pass, so that it may also come after the context. Without
    gradients they are freed when the context ends. ZeRO-3 frees them when the context ends, so that the backward pass
    (``engine.backward(out.loss)``) must come before. A module that no engine shards passes through.

    Args:
        module: the module that ``fully_shard`` was called with (the model, where the head belongs to its unit), or a
            module under ZeRO-3.

    Yields:
        The module. Its parameters are plain tensors.

    Raises:
        TypeError: ``module`` is no module, but its weight, say.
        ValueError: the module belongs to FSDP1, which does not reduce gradients of weights that were gathered outside
            of a forward. Or a larger unit of FSDP2 holds its weights. Or they are split in another way.

    Example:
        >>> from torch import nn
        >>> with unsharded(nn.Linear(4, 8)) as head:
        ...     head.weight.shape
        torch.Size([8, 4])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"unsharded takes a torch.nn.Module, got {type(module).__name__}: pass the head, or the module of its unit"
        )
    engine = engine_of(module)
    if engine == "FSDP2":
        with _fsdp2(module):
            yield module
    elif engine == "ZeRO-3":
        import deepspeed

        with deepspeed.zero.GatheredParameters([p for p in module.parameters() if hasattr(p, ZERO3)]):
            yield module
    else:
        _refuse(module, engine)
        yield module


def _refuse(module: nn.Module, engine: str | None) -> None:
    """Raise where weights are sharded, but not by an engine that can gather them here."""
    weights = list(module.parameters(recurse=False))
    if engine == "FSDP1" or (isinstance(module, nn.Linear) and module.weight.dim() != 2):  # it keeps flat pieces
        raise ValueError(
            "FSDP1 does not reduce gradients of weights that are gathered outside of a forward: call "
            "fused_lm_head(model).attach() before wrapping, and wrapped(**inputs, fused_call=work)"
        )
    if any(type(p).__name__ == "DTensor" for p in weights):
        raise ValueError(
            f"{type(module).__name__} has DTensor weights, but fully_shard was not called with it: pass the module of "
            "its unit, as in unsharded(model). Rows that tensor parallelism has split are for VocabParallel.of"
        )


@contextmanager
def _fsdp2(module: Any) -> Iterator[None]:
    """Unshard a unit of FSDP2, and let the first gradient of its weights tell the engine that a backward pass runs.

    In a forward of the unit its outputs would tell. At the end of the backward pass the engine reduces the gradients of
    every unit that has some, and reshards it.
    """
    from torch.distributed.fsdp import fully_shard

    state: Any = fully_shard.state(module)  # type: ignore[attr-defined]
    if state._is_root is None:
        state._lazy_init()  # as its first forward does
    module.unshard()
    handles: list[Any] = []

    def begin(grad: Tensor) -> Tensor:
        while handles:
            handles.pop().remove()
        state._pre_backward(grad)
        return grad

    if torch.is_grad_enabled():
        gathered = (p for p in module.parameters() if type(p).__name__ != "DTensor")
        handles += [p.register_hook(begin) for p in gathered if p.requires_grad]
    mark_gathered(module)
    try:
        yield
    except BaseException:
        module.reshard()
        raise
    if not torch.is_grad_enabled():
        module.reshard()
