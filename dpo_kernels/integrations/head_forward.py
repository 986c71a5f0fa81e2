"""Work inside a module's own forward, where an engine that shards weights has gathered those of the module.

FSDP and ZeRO-3 gather a module's weights before its forward and free them afterwards. What the forward returns tells
them when its backward begins, and its first tensor argument when that ends. So whoever reads the weights must be the
forward.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dpo_kernels.distributed import sharded_heads

CALL = "fused_call"  # the keyword that ``FusedLMHead.attach`` gives the forward of a model and of its head


def attach(module: nn.Module) -> None:
    """Give the forward of a module the keyword ``fused_call``. Without the keyword it is what it was.

    With it ``module(hidden, fused_call=read)`` returns ``read(module, hidden)``. A second ``attach`` changes nothing. A
    deep copy of the module has the keyword too.

    Args:
        module: any module that is called with one tensor first.

    Example:
        >>> layer = nn.Linear(4, 8)
        >>> attach(layer)
        >>> layer(None, fused_call=lambda module, hidden: module.out_features)
        8

    """
    module = within_fsdp1(module)
    forward = getattr(module, "forward", None)
    if getattr(forward, CALL, None) is attach and getattr(forward, "__self__", module) is module:
        return
    original = unbound_forward(module)

    @functools.wraps(type(module).forward)
    def with_keyword(
        module: Any, *args: Any, fused_call: Callable[[Any, Any], Any] | None = None, **kwargs: Any
    ) -> Any:
        if fused_call is None:
            return original(module, *args, **kwargs)
        return fused_call(module, args[0])

    setattr(with_keyword, CALL, attach)
    module.forward = types.MethodType(with_keyword, module)


def call(module: Any, hidden: Tensor, read: Callable[[Any, Tensor], Any]) -> Any:
    """Call a module with ``read(module, hidden)`` for its forward, if an engine shards it. Otherwise only read.

    Without an engine no hook of the module is run: hooks of other people expect logits.

    Args:
        module: the module. It is attached if it was not and must be.
        hidden: floating point ``(..., H)``.
        read: what stands for the forward.

    Returns:
        What ``read`` returns.

    Example:
        >>> import torch
        >>> call(nn.Linear(4, 8), torch.zeros(2, 4), lambda module, hidden: hidden @ module.weight.t()).shape
        torch.Size([2, 8])

    """
    if sharded_heads.engine_of(module) is None:
        return read(module, hidden)
    attach(module)

    def unrounded(inner: Any, hidden: Tensor) -> Any:
        sharded_heads.mark_gathered(inner, module)
        result = read(inner, hidden)
        sharded_heads.return_unrounded(module, result)
        return result

    return module(hidden, **{CALL: unrounded})


def directly(module: Any, hidden: Tensor, read: Callable[[Any, Tensor], Any]) -> Any:
    """Do as ``call`` does, without calling the module. No hook is run.

    Args:
        module: the module.
        hidden: floating point ``(..., H)``.
        read: what is called.

    Returns:
        What ``read`` returns.

    Example:
        >>> import torch
        >>> directly(nn.Linear(4, 8), torch.zeros(2, 4), lambda module, hidden: module.out_features)
        8

    """
    return read(within_fsdp1(module), hidden)


def within_fsdp1(module: Any) -> Any:
    """Find the module inside FSDP1's wrappers.

    Args:
        module: any module.

    Returns:
        The innermost module that is no such wrapper.

    Example:
        >>> layer = nn.Linear(4, 8)
        >>> within_fsdp1(layer) is layer
        True

    """
    while isinstance(inner := getattr(module, sharded_heads.FSDP1, None), nn.Module):
        module = inner
    return module


def unbound_forward(model: Any) -> Callable[..., Any]:
    """Give a model's forward as a function whose first argument is the model.

    If the forward is a method, the function serves deep copies of the model too.

    Args:
        model: a model, whose forward may have been replaced.

    Returns:
        A function of the model and of what its forward takes. Called with a deep copy of the model, it raises
        ``RuntimeError`` where the forward is not a method: it would run the original.

    Example:
        >>> import torch
        >>> model = nn.Identity()
        >>> unbound_forward(model)(nn.Identity(), torch.ones(2))
        tensor([1., 1.])

    """
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
