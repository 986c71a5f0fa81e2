"""A patch that puts the fused trainers in the place of LLaMA-Factory's."""

import inspect
from types import TracebackType
from typing import Any

from dpo_kernels.integrations.requirements import LLAMAFACTORY, require

# The methods that the fused trainers call or replace, with their arguments in LLaMA-Factory 0.9.5.
METHODS = {
    "CustomDPOTrainer": {
        "compute_preference_loss": (
            *("policy_chosen_logps", "policy_rejected_logps"),
            *("reference_chosen_logps", "reference_rejected_logps"),
        ),
        "concatenated_forward": ("model", "batch", "is_ref_model"),
        "compute_reference_log_probs": ("model", "batch"),
        "get_batch_loss_metrics": ("model", "batch", "train_eval"),
    },
    "CustomKTOTrainer": {
        "forward": ("model", "batch", "prefix"),
        "compute_reference_log_probs": ("model", "batch"),
        "get_batch_loss_metrics": ("model", "batch"),
    },
}
_replaced: list[tuple[Any, str, Any]] = []  # module, name, and what stood there before the patch


class Patch:
    """The result of ``patch_llamafactory()``. As a context manager it undoes at its end what that call did.

    Args:
        patched: whether that call has put the patch on.

    Attributes:
        patched: the same.

    Example:
        >>> with Patch(False) as patch:
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
            unpatch_llamafactory()


def patch_llamafactory() -> Patch:
    """Let LLaMA-Factory train DPO, ORPO, SimPO and KTO with one pass over the LM head.

    A second call changes nothing. The patch must be on before a trainer is made.

    Returns:
        A context manager, which may be ignored. At its end it takes the patch off, unless that was on before.

    Raises:
        ImportError: LLaMA-Factory is not installed, or too old.
        RuntimeError: a method of its trainers has other arguments than in 0.9.5. The message names it.

    Example::

        with patch_llamafactory():
            llamafactory.train.tuner.run_exp(arguments)

    """
    require("llamafactory", LLAMAFACTORY, "patch_llamafactory")
    if _replaced:
        return Patch(False)
    places = _places()
    for module, name in places:
        if reason := why_not_known(getattr(module, name)):
            raise RuntimeError(f"patch_llamafactory() knows LLaMA-Factory 0.9.5: {reason}")
    from dpo_kernels.integrations.llamafactory.dpo import FusedCustomDPOTrainer
    from dpo_kernels.integrations.llamafactory.kto import FusedCustomKTOTrainer

    fused = {"CustomDPOTrainer": FusedCustomDPOTrainer, "CustomKTOTrainer": FusedCustomKTOTrainer}
    for module, name in places:
        _replaced.append((module, name, getattr(module, name)))
        setattr(module, name, fused[name])
    return Patch(True)


def unpatch_llamafactory() -> bool:
    """Put back what stood where the patch is. Trainers that were made meanwhile stay as they are.

    Returns:
        Whether the patch was on.

    Example:
        >>> unpatch_llamafactory()
        False

    """
    was_on = bool(_replaced)
    for module, name, trainer in _replaced:
        setattr(module, name, trainer)
    _replaced.clear()
    return was_on


def _places() -> tuple[tuple[Any, str], ...]:
    """Give the modules where LLaMA-Factory looks its trainers up, and their names there."""
    from llamafactory.train.dpo import trainer as dpo
    from llamafactory.train.kto import trainer as kto
    from llamafactory.train.kto import workflow

    return (dpo, "CustomDPOTrainer"), (kto, "CustomKTOTrainer"), (workflow, "CustomKTOTrainer")


def why_not_known(trainer: Any) -> str:
    """Say which method of a trainer is not as in LLaMA-Factory 0.9.5.

    Args:
        trainer: its class ``CustomDPOTrainer`` or ``CustomKTOTrainer``.

    Returns:
        The reason in words, or an empty string.

    Example:
        >>> why_not_known(type("CustomKTOTrainer", (), {}))
        'CustomKTOTrainer.forward takes other arguments (none)'

    """
    for name, wanted in METHODS[trainer.__name__].items():
        method = getattr(trainer, name, None)
        found = () if method is None else tuple(inspect.signature(method).parameters)[1:]
        if found != wanted:
            return f"{trainer.__name__}.{name} takes other arguments ({', '.join(found) or 'none'})"
    return ""
