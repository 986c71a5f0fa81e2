"""TRL's CPO trainer, which also does SimPO and AlphaPO, on one pass over the LM head. For TRL 0.29 to 1.16."""

from typing import Any

import torch
from torch import Tensor
from trl.experimental.cpo import CPOTrainer

from dpo_kernels import LossInputs, fused_dpo_loss
from dpo_kernels.integrations.fused_step import separable
from dpo_kernels.integrations.trl.one_pass import IGNORED, OnePass, Scored

AVERAGED = ("ipo", "simpo")  # the losses that TRL gives averages over tokens


class FusedCPOTrainer(OnePass, CPOTrainer):
    """``trl.experimental.cpo.CPOTrainer`` without full logits: the same constructor, configuration and logs.

    It differs from TRL 1.16 where a completion has no token: its average log-prob is 0, where TRL's is NaN.

    Args:
        *args, **kwargs: as for ``trl.experimental.cpo.CPOTrainer``.

    Attributes:
        fallback_reason: why TRL's own step is used, or an empty string.
        check_head: whether the fused head is compared with the model's own logits at the first batch.

    Example::

        from dpo_kernels.integrations.trl import FusedCPOTrainer as CPOTrainer

        args = CPOConfig(loss_type="simpo", cpo_alpha=0.0)
        trainer = CPOTrainer(model, args=args, train_dataset=pairs, processing_class=tokenizer)
        trainer.train()

    """

    _padding_from = "pad_token_id"
    _left_out = 0

    def _score(self, rows: dict[str, Tensor], hidden: Tensor, weight: Tensor, options: dict[str, Any]) -> Scored:
        labels, averaged = rows["concatenated_labels"], self.loss_type in AVERAGED
        pairs = len(labels) // 2
        tokens = (labels[:pairs, 1:] != IGNORED).sum().clamp(min=1)

        def taken(logps: Tensor, counts: Tensor) -> Tensor:
            return logps / counts.clamp(min=1) if averaged else logps

        @separable
        def loss(x: LossInputs) -> Tensor:
            chosen = taken(x.policy_chosen_logps, x.chosen_tokens)
            of_pairs = self.cpo_loss(chosen, taken(x.policy_rejected_logps, x.rejected_tokens))[0]
            return of_pairs / pairs - self.cpo_alpha * x.policy_chosen_logps / tokens

        out = fused_dpo_loss(
            hidden, weight, labels, shift=True, reference_free=True, loss_type=loss, reduction="sum", **options
        )
        counts = out.stats["tokens"].to(out.chosen_logps).chunk(2)
        nll = -out.chosen_logps.sum() / tokens if self.cpo_alpha != 0 else torch.zeros_like(out.loss)
        return Scored(out.loss, taken(out.chosen_logps, counts[0]), taken(out.rejected_logps, counts[1]), nll)
