"""Drop-ins for TRL: the DPO trainer on the fused loss, and a patch that serves the LM head of TRL's other trainers.

    from dpo_kernels.integrations.trl import FusedDPOTrainer as DPOTrainer

Importing this package imports TRL.
"""

from dpo_kernels.integrations.requirements import TRL, require

require("trl", TRL, "dpo_kernels.integrations.trl")

from dpo_kernels.integrations.trl.patch import patch_trl, unpatch_trl  # noqa: E402
from dpo_kernels.integrations.trl.trainer import FusedDPOTrainer  # noqa: E402

__all__ = ["FusedDPOTrainer", "patch_trl", "unpatch_trl"]
