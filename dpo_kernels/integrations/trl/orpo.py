"""TRL's ORPO trainer on one pass over the LM head. For TRL 0.29 to 1.16."""

from typing import Any

import torch
from torch import Tensor
from trl.experimental.orpo import ORPOTrainer

from dpo_kernels import LossInputs, fused_dpo_loss
from dpo_kernels.integrations.fused_step import separable
from dpo_kernels.integrations.trl.one_pass import IGNORED, OnePass, Scored


class FusedORPOTrainer(OnePass, ORPOTrainer):
    """``trl.experimental.orpo.ORPOTrainer`` without full logits: the same constructor, configuration and logs.

    As in TRL, the NLL is the mean over the tokens of prompts and chosen completions. It differs from TRL 1.16 where a
    completion of a pair has no token: the pair has no odds ratio and adds 0, where TRL's loss is NaN.

    Args:
        *args, **kwargs: as for ``trl.experimental.orpo.ORPOTrainer``.

    Attributes:
        fallback_reason: why TRL's own step is used, or an empty string.
        check_head: whether the fused head is compared with the model's own logits at the first batch.

    Example::

        from dpo_kernels.integrations.trl import FusedORPOTrainer as ORPOTrainer

        trainer = ORPOTrainer(model, args=ORPOConfig(...), train_dataset=pairs, processing_class=tokenizer)
        trainer.train()

    """

    _padding_from = "padding_value"
    _left_out = 1

    def _score(self, rows: dict[str, Tensor], hidden: Tensor, weight: Tensor, options: dict[str, Any]) -> Scored:
        order, labels, cu_seqlens = sequences(rows)
        pairs = len(rows["concatenated_labels"]) // 2
        tokens = rows["concatenated_attention_mask"][:pairs, 1:].sum().clamp(min=1)

        @separable
        def loss(x: LossInputs) -> Tensor:
            both = (x.chosen_tokens > 0) & (x.rejected_tokens > 0)  # a prompt stands alone, and has no odds
            chosen, rejected = (
                torch.where(both, logps, -1.0) / torch.where(both, counts, 1.0)
                for logps, counts in (
                    (x.policy_chosen_logps, x.chosen_tokens),
                    (x.policy_rejected_logps, x.rejected_tokens),
                )
            )
            odds = torch.where(both, self.odds_ratio_loss(chosen, rejected)[0].to(chosen.dtype), 0.0)
            return -x.policy_chosen_logps / tokens - odds / pairs

        packed = hidden[:, :-1].reshape(-1, hidden.shape[-1])[order]
        out = fused_dpo_loss(
            packed,
            weight,
            labels,
            cu_seqlens=cu_seqlens,
            pairs="interleaved",
            reference_free=True,
            loss_type=loss,
            reduction="sum",
            **options,
        )
        counts = out.stats["tokens"].to(out.chosen_logps).clamp(min=1)
        chosen, rejected = out.chosen_logps[0::2] / counts[0::4], out.rejected_logps[0::2] / counts[1::4]
        return Scored(out.loss, chosen, rejected, -out.chosen_logps.sum() / tokens)


def sequences(rows: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the scored positions of ORPO into sequences: completions and prompts apart, each token once.

    Each pair of rows becomes four sequences: the chosen completion, the rejected one, the chosen prompt, and an empty
    one. Taken two by two they are a pair with an odds ratio, and a prompt alone.

    Args:
        rows: ``concatenated_input_ids``, ``concatenated_attention_mask`` and ``concatenated_labels``, int64 ``(2B, T)``
            each, all chosen rows first.

    Returns:
        Where the N scored positions lie in ``(2B, T - 1)`` hidden states, int64 ``(N,)``; the token that each predicts,
        int64 ``(N,)``; and ``cu_seqlens``, int64 ``(4B + 1,)``.

    Example:
        >>> ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0]])
        >>> mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
        >>> labels = torch.tensor([[-100, -100, 7, 8], [-100, -100, 9, -100]])
        >>> sequences({
        ...     "concatenated_input_ids": ids, "concatenated_attention_mask": mask, "concatenated_labels": labels
        ... })
        (tensor([1, 2, 4, 0]), tensor([7, 8, 9, 6]), tensor([0, 2, 3, 4, 4]))

    """
    ids, mask, labels = (rows[f"concatenated_{name}"][:, 1:] for name in ("input_ids", "attention_mask", "labels"))
    pairs = len(labels) // 2
    first = 4 * torch.arange(pairs, device=labels.device)[:, None].repeat(2, 1)
    completion, rejected = labels != IGNORED, torch.arange(2 * pairs, device=labels.device)[:, None] >= pairs
    prompt = ~completion & (mask == 1) & ~rejected
    sequence = (first + torch.where(completion, rejected.long(), 2)).masked_fill(~(completion | prompt), 4 * pairs)
    counts = torch.bincount(sequence.flatten(), minlength=4 * pairs + 1)[: 4 * pairs]
    cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    order = sequence.flatten().argsort(stable=True)[: int(cu_seqlens[-1])]
    return order, torch.where(completion, labels, ids).flatten()[order], cu_seqlens
