"""An opt-in patch of the chunked log-prob function that TRL 1.15 and later put under every trainer's LM head.

    with patch_trl():
        trainer.train()      # DPO, KTO, SFT, GRPO, RLOO

or ``patch_trl()`` once, and ``unpatch_trl()`` to undo it. Nothing else of TRL is touched.
"""

from types import TracebackType
from typing import Any

from torch import Tensor

from dpo_kernels.integrations.token_logps import token_logps

NAME = "_ChunkedLogProbFunction"
ARGUMENTS = (
    *("hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)
_original: list[Any] = []


class FusedLogProbFunction:
    """Stands where TRL has an autograd function; only its ``apply`` is called."""

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
        """(log-probs, entropy, log_sum_sq_probs, mean_logits, is_top1), each ``(N,)`` or None."""
        from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

        if is_deepspeed_zero3_enabled():  # the weight is gathered around this call only, not around its backward
            return _original[0].apply(
                *(hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)
            )
        return token_logps(hidden, weight, bias, targets, temperature, final_logit_softcapping, logit_scale, outputs)


class Patch:
    """What ``patch_trl()`` returns: as a context manager it undoes at its end what that call did."""

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
    """Make TRL's fused LM head use this package's kernels, for every trainer. Repeating it changes nothing.

    ``with patch_trl():`` undoes it at its end, unless it was there before. Raises ``RuntimeError`` for a TRL that
    has no such function (before 1.15) or calls it differently.
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
    """Why the function under TRL's name is not the one that this patch knows, or an empty string."""
    import trl

    forward: Any = getattr(function, "forward", None)
    names = forward.__code__.co_varnames[1:10] if hasattr(forward, "__code__") else ()
    if names == ARGUMENTS:
        return ""
    found = "none" if function is None else "another one"
    return f"patch_trl() knows the fused LM head of TRL 1.15 and 1.16, and trl {trl.__version__} has {found}"


def unpatch_trl() -> None:
    """Undo ``patch_trl()``; without one it does nothing."""
    if _original:
        from trl.trainer import utils

        setattr(utils, NAME, _original.pop())
