"""Fused preference-optimisation losses: DPO and its family without vocabulary-sized logits."""

from dpo_kernels.api.from_logps import dpo_loss
from dpo_kernels.api.logps import fused_sequence_logps, fused_token_logps
from dpo_kernels.api.module import FusedDPOLoss
from dpo_kernels.api.pairs import explain, fused_dpo_loss
from dpo_kernels.api.sequences import fused_group_loss, fused_kto_loss
from dpo_kernels.api.warm_up import warm_up
from dpo_kernels.kernels.extension import empty_cache
from dpo_kernels.loss_interface import LossInputs
from dpo_kernels.losses import LOSSES
from dpo_kernels.losses.bradley_terry import bradley_terry_loss, bradley_terry_strengths
from dpo_kernels.losses.estimates import RunningDelta, kto_kl
from dpo_kernels.losses.weights import ld_token_weights, wpo_pair_weights
from dpo_kernels.outputs import DPOLossOutput, SequenceLossOutput
from dpo_kernels.tiled_weight import TiledWeight

__version__ = "0.1.0"

__all__ = [
    "LOSSES",
    "DPOLossOutput",
    "FusedDPOLoss",
    "LossInputs",
    "RunningDelta",
    "SequenceLossOutput",
    "TiledWeight",
    "__version__",
    "bradley_terry_loss",
    "bradley_terry_strengths",
    "dpo_loss",
    "empty_cache",
    "explain",
    "fused_dpo_loss",
    "fused_group_loss",
    "fused_kto_loss",
    "fused_sequence_logps",
    "fused_token_logps",
    "kto_kl",
    "ld_token_weights",
    "warm_up",
    "wpo_pair_weights",
]
