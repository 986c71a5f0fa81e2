"""Fused preference-optimisation losses: DPO and its family without vocabulary-sized logits."""

from dpo_kernels.api import (
    FusedDPOLoss,
    dpo_loss,
    explain,
    fused_dpo_loss,
    fused_sequence_logps,
    fused_token_logps,
)
from dpo_kernels.losses import LOSSES
from dpo_kernels.types import DPOLossOutput, LossInputs

__version__ = "0.1.0"

__all__ = [
    "LOSSES",
    "DPOLossOutput",
    "FusedDPOLoss",
    "LossInputs",
    "__version__",
    "dpo_loss",
    "explain",
    "fused_dpo_loss",
    "fused_sequence_logps",
    "fused_token_logps",
]
