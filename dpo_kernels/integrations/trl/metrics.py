"""TRL's logged values, computed from the statistics of the fused loss.

The keys are those of TRL, and the values are gathered over processes in the same way.
"""

from typing import Any

import torch
from torch import Tensor

from dpo_kernels import DPOLossOutput
from dpo_kernels.integrations.trl.batch import PairBatch

# The statistics that these values are computed from; a call of ``fused_dpo_loss`` must ask for them.
STATS = ("entropy", "mean_logits", "top1")


def record(
    trainer: Any, mode: str, out: DPOLossOutput, batch: PairBatch, reference: Tensor, aux_loss: Tensor | None
) -> None:
    """Append one batch's values to the trainer's metrics.

    Args:
        trainer: a ``DPOTrainer``, of which the metrics and the count of tokens are changed.
        mode: "train" or "eval".
        out: the result of ``fused_dpo_loss`` with ``stats=STATS``.
        batch: the batch that it was computed from.
        reference: the reference's log-probs ``(2B,)``, all chosen ones first.
        aux_loss: the router loss ``()``, or None.

    Example::

        out = fused_dpo_loss(hidden, weight, batch.labels, ref_logps=reference, stats=STATS, shift=True)
        record(trainer, "train", out, batch, reference, aux_loss=None)

    """
    accelerator, metrics = trainer.accelerator, trainer._metrics[mode]

    def total(value: Tensor) -> Tensor:
        return accelerator.gather_for_metrics(value).sum()

    def ratio(sums: Tensor, counts: Tensor) -> float:
        numerator, denominator = total(sums), total(counts)
        return (numerator / denominator).item() if denominator > 0 else 0.0

    def mean(values: Tensor) -> float:
        return accelerator.gather(values).mean().item()

    if aux_loss is not None:
        metrics["aux_loss"].append(accelerator.gather_for_metrics(aux_loss.detach()).mean().item())
    tokens = out.stats["tokens"]
    sums = {name: (out.stats[name] * tokens).view(2, -1).sum(dim=1) for name in STATS}
    sides = tokens.view(2, -1).sum(dim=1)
    metrics["entropy"].append(ratio(sums["entropy"].sum(), sides.sum()))
    if mode == "train":
        trainer._total_train_tokens += int(total(batch.tokens).item()) // getattr(trainer, "_tp_size", 1)
    metrics["num_tokens"] = [trainer._total_train_tokens]
    metrics["logits/chosen"].append(ratio(sums["mean_logits"][0], sides[0]))
    metrics["logits/rejected"].append(ratio(sums["mean_logits"][1], sides[1]))
    metrics["mean_token_accuracy"].append(ratio(sums["top1"][0], sides[0]))
    # Losses such as simpo do not read the reference, but TRL logs rewards against it for them too.
    logps = torch.stack([out.chosen_logps, out.rejected_logps])
    chosen, rejected = trainer.beta * (logps - reference.to(logps).view(2, -1))
    metrics["rewards/chosen"].append(mean(chosen))
    metrics["rewards/rejected"].append(mean(rejected))
    metrics["rewards/accuracies"].append(mean((chosen > rejected).float()))
    metrics["rewards/margins"].append(mean(chosen - rejected))
    metrics["logps/chosen"].append(mean(logps[0]))
    metrics["logps/rejected"].append(mean(logps[1]))
