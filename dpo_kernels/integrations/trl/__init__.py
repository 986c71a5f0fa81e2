"""Drop-ins for TRL: trainers on the fused loss, and a patch that serves the LM head of TRL's other trainers.

    from dpo_kernels.integrations.trl import FusedDPOTrainer as DPOTrainer

Importing this package imports TRL. ``FusedORPOTrainer`` and ``FusedCPOTrainer`` are imported when they are asked for,
because ``trl.experimental`` warns when it is imported. So is ``FusedKTOTrainer``, which needs a later TRL.
"""

from typing import Any

from dpo_kernels.integrations.requirements import TRL, require

require("trl", TRL, "dpo_kernels.integrations.trl")

from dpo_kernels.integrations.trl.patch import patch_trl, unpatch_trl  # noqa: E402
from dpo_kernels.integrations.trl.trainer import FusedDPOTrainer  # noqa: E402

__all__ = ["FusedCPOTrainer", "FusedDPOTrainer", "FusedKTOTrainer", "FusedORPOTrainer", "patch_trl", "unpatch_trl"]


def __getattr__(name: str) -> Any:
    if name == "FusedORPOTrainer":
        from dpo_kernels.integrations.trl.orpo import FusedORPOTrainer

        return FusedORPOTrainer
    if name == "FusedCPOTrainer":
        from dpo_kernels.integrations.trl.cpo import FusedCPOTrainer

        return FusedCPOTrainer
    if name == "FusedKTOTrainer":
        from dpo_kernels.integrations.trl.kto import FusedKTOTrainer

        return FusedKTOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
