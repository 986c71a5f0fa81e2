"""Which engine shards a module's weights over the ranks: FSDP1, FSDP2 (``fully_shard``) or ZeRO-3."""

from torch import nn

# Where each engine can be told. FSDP1 keeps the module in a wrapper, which must be called. FSDP2 makes the module's
# class a subclass of this one. ZeRO-3 gives its parameters this attribute.
FSDP1 = "_fsdp_wrapped_module"
FSDP2 = "FSDPModule"
ZERO3 = "ds_tensor"


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
