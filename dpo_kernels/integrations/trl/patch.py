"""An opt-in patch of the chunked log-prob function of TRL.

TRL 1.15 and later put this function under the LM head of every trainer: DPO, KTO, SFT, GRPO, RLOO. Nothing else of TRL
is touched. Others patch the same place, unsloth among them. So taking the patch off never takes off theirs.
"""

import inspect
import sys
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.distributed.sharded_heads import ZERO3
from dpo_kernels.integrations.token_logps import token_logps
from dpo_kernels.integrations.trl.gathered_logps import gathered_token_logps

# The function's name in ``trl.trainer.utils``, and the arguments of its forward as TRL 1.15 and 1.16 have them.
NAME = "_ChunkedLogProbFunction"
ARGUMENTS = (
    *("hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)
_patches: list["FusedLogProbFunction"] = []  # those that are on, the oldest first


class FusedLogProbFunction:
    """An object that stands in the place of TRL's autograd function. TRL calls its ``apply`` only.

    What it has not itself it has from the function that it replaced. Other patches mark functions that they know.

    Args:
        replaced: TRL's function, or what another patch had put in its place.

    Attributes:
        replaced: the same.
        on: whether ``apply`` computes here. If false, ``replaced`` does.

    Example:
        >>> import torch
        >>> hidden, weight = torch.zeros(2, 4), torch.zeros(3, 4)
        >>> function = FusedLogProbFunction(replaced=None)
        >>> logps, *_ = function.apply(hidden, weight, None, torch.tensor([0, 2]), 1.0, 256)
        >>> logps
        tensor([-1.0986, -1.0986])

    """

    def __init__(self, replaced: Any) -> None:
        self.replaced = replaced
        self.on = True

    def __getattr__(self, name: str) -> Any:
        if name == "replaced":  # a copy asks for it before it has it
            raise AttributeError(name)
        return getattr(self.replaced, name)

    def apply(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """Compute per-token log-probs and statistics with TRL's arguments.

        Args:
            *args, **kwargs: as for ``trl_token_logps``, or as for the replaced function once the patch is off.

        Returns:
            As ``trl_token_logps``.

        Raises:
            ValueError, TypeError: as in ``trl_token_logps``.

        """
        if self.on:
            return trl_token_logps(*args, **kwargs)
        values: tuple[Tensor | None, ...] = self.replaced.apply(*args, **kwargs)
        return values


def trl_token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
) -> tuple[Tensor | None, ...]:
    """Compute per-token log-probs and statistics with TRL's arguments.

    Args:
        hidden: floating point ``(N, H)``.
        weight: floating point ``(V, H)``.
        bias: ``(V,)`` or None.
        targets: int64 ``(N,)``.
        temperature: what logits are divided by, > 0.
        chunk_size: not used; the fused loss chooses its own chunks.
        final_logit_softcapping: soft cap of the logits, or None.
        logit_scale: factor on the logits.
        outputs: names of the statistics that are wanted.

    Returns:
        Log-probs, entropy, log_sum_sq_probs, mean_logits and is_top1, each ``(N,)`` or None.

    Raises:
        ValueError: as in ``token_logps``.
        TypeError: as in ``token_logps``.

    Example:
        >>> logps, *_ = trl_token_logps(torch.zeros(1, 4), torch.zeros(3, 4), None, torch.tensor([2]), 1.0, 256)
        >>> logps
        tensor([-1.0986])

    """
    given = (hidden, weight, bias, targets, temperature, final_logit_softcapping, logit_scale, outputs)
    # TRL gathers the weights of ZeRO-3 for this call only, not for its backward.
    if torch.is_grad_enabled() and any(hasattr(tensor, ZERO3) for tensor in (weight, bias)):
        return gathered_token_logps(*given)
    return token_logps(*given)


class Patch:
    """The result of ``patch_trl()``. As a context manager it undoes at its end what that call did.

    Args:
        function: what that call has put into TRL, or None where it had nothing to do.

    Attributes:
        patched: whether that call has put the patch on.

    Example:
        >>> with Patch(None) as patch:
        ...     patch.patched
        False

    """

    def __init__(self, function: FusedLogProbFunction | None) -> None:
        self._function = function
        self.patched = function is not None

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._function is not None:
            _take_off(self._function)


def patch_trl() -> Patch:
    """Make TRL's fused LM head use this package's kernels, for every trainer.

    A second call changes nothing, unless another patch was put on meanwhile: the last one that is put on computes.
    ``with patch_trl():`` removes the patch at its end, unless it was on before.

    Returns:
        A context manager, which may be ignored.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: TRL is older than 1.15 or calls the function differently.

    Example::

        with patch_trl():
            trainer.train()

    """
    from trl.trainer import utils

    current = getattr(utils, NAME, None)
    while isinstance(current, FusedLogProbFunction):
        if current.on:
            return Patch(None)
        current = current.replaced  # another patch has put back what it found, and meanwhile that was taken off
    if reason := why_not_patchable(current):
        raise RuntimeError(f"{reason}; FusedDPOTrainer does not need it")
    function = FusedLogProbFunction(current)
    _patches.append(function)
    setattr(utils, NAME, function)
    return Patch(function)


def why_not_patchable(function: Any) -> str:
    """Say why a function is not the one that this patch can replace.

    Args:
        function: what TRL has under the name ``NAME``, or None.

    Returns:
        The reason in words, or an empty string.

    Example:
        >>> why_not_patchable(None)
        'patch_trl() knows the fused LM head of TRL 1.15 and 1.16, and trl ... has none'

    """
    import trl

    names = _arguments(function)
    if names == ARGUMENTS:
        return ""
    if function is None:
        found = "none"
    elif names is None:
        found = "one whose arguments are not known"
    else:
        extra = [name for name in names if name not in ARGUMENTS]
        lacking = [name for name in ARGUMENTS if name not in names]
        told = [f"with {', '.join(extra)}"] * bool(extra) + [f"without {', '.join(lacking)}"] * bool(lacking)
        found = f"another one, {' and '.join(told) or 'with its arguments in another order'}"
    return f"patch_trl() knows the fused LM head of TRL 1.15 and 1.16, and trl {trl.__version__} has {found}"


def _arguments(function: Any) -> tuple[str, ...] | None:
    """Return the names of the arguments that TRL calls a function with, or None where they are not to be had.

    Another patch may have put a function without a ``forward`` there. TRL's own then says what its callers give.
    """
    if function is None:
        return None
    forward: Any = getattr(function, "forward", None)
    if forward is None:
        own = getattr(sys.modules.get("trl.kernels"), NAME.lstrip("_"), None)
        forward = getattr(own, "forward", None)
    try:
        names = tuple(inspect.signature(forward).parameters)
    except (TypeError, ValueError):
        return None
    return names[1:] if names[:1] == ("ctx",) else names


def unpatch_trl() -> None:
    """Remove the patch of ``patch_trl()``. Without a patch this does nothing.

    What was there before is there again. If another patch was put on since, it stays, and what it has kept of this
    one computes as TRL does.

    Example:
        >>> unpatch_trl()

    """
    while _patches:
        _take_off(_patches[-1])


def _take_off(function: FusedLogProbFunction) -> None:
    from trl.trainer import utils

    function.on = False
    if function in _patches:
        _patches.remove(function)
    if getattr(utils, NAME, None) is function:
        setattr(utils, NAME, function.replaced)
