"""An opt-in patch of the chunked log-prob function of TRL.

TRL 1.15 and later put this function under the LM head of every trainer: DPO, KTO, SFT, GRPO, RLOO. Nothing else of TRL
is touched.
"""

from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.distributed.sharded_heads import ZERO3
from dpo_kernels.integrations.trl.gathered_logps import gathered_token_logps
from dpo_kernels.integrations.trl.token_logps import token_logps

# The function's name in ``trl.trainer.utils``, and the arguments of its forward as TRL 1.15 and 1.16 have them.
NAME = "_ChunkedLogProbFunction"
ARGUMENTS = (
    *("hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)
_original: list[Any] = []  # TRL's own function while the patch is on


class FusedLogProbFunction:
    """This class stands in the place of TRL's autograd function. TRL calls its ``apply`` only.

    Example:
        >>> import torch
        >>> hidden, weight = torch.zeros(2, 4), torch.zeros(3, 4)
        >>> logps, *_ = FusedLogProbFunction.apply(hidden, weight, None, torch.tensor([0, 2]), 1.0, 256)
        >>> logps
        tensor([-1.0986, -1.0986])

    """

    @staticmethod
    def apply(
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

        """
        given = (hidden, weight, bias, targets, temperature, final_logit_softcapping, logit_scale, outputs)
        # TRL gathers the weights of ZeRO-3 for this call only, not for its backward.
        if torch.is_grad_enabled() and any(hasattr(tensor, ZERO3) for tensor in (weight, bias)):
            return gathered_token_logps(*given)
        return token_logps(*given)


class Patch:
    """The result of ``patch_trl()``. As a context manager it undoes at its end what that call did.

    Args:
        patched: whether that call has put the patch on.

    Attributes:
        patched: the same.

    Example:
        >>> with Patch(patched=False) as patch:
        ...     patch.patched
        False

    """

    def __init__(self, patched: bool) -> None:
        self.patched = patched

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.patched:
            unpatch_trl()


def patch_trl() -> Patch:
    """Make TRL's fused LM head use this package's kernels, for every trainer.

    A second call changes nothing. ``with patch_trl():`` removes the patch at its end, unless it was on before.

    Returns:
        A context manager, which may be ignored.

    Raises:
        RuntimeError: TRL is older than 1.15 or calls the function differently.

    Example::

        with patch_trl():
            trainer.train()

    """
    from trl.trainer import utils

    current = getattr(utils, NAME, None)
    if current is FusedLogProbFunction:
        return Patch(patched=False)
    if reason := why_not_patchable(current):
        raise RuntimeError(f"{reason}; FusedDPOTrainer does not need it")
    _original[:] = [current]
    setattr(utils, NAME, FusedLogProbFunction)
    return Patch(patched=True)


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

    forward: Any = getattr(function, "forward", None)
    names = forward.__code__.co_varnames[1:10] if hasattr(forward, "__code__") else ()
    if names == ARGUMENTS:
        return ""
    found = "none" if function is None else "another one"
    return f"patch_trl() knows the fused LM head of TRL 1.15 and 1.16, and trl {trl.__version__} has {found}"


def unpatch_trl() -> None:
    """Remove the patch of ``patch_trl()``. Without a patch this does nothing.

    Example:
        >>> unpatch_trl()

    """
    if _original:
        from trl.trainer import utils

        setattr(utils, NAME, _original.pop())
