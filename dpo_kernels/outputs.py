"""What the public functions return."""

from typing import NamedTuple

from torch import Tensor


class DPOLossOutput(NamedTuple):
    """What ``fused_dpo_loss`` returns; every field but ``loss`` is detached.

    ``loss`` is a scalar, or ``(P,)`` with ``reduction="none"``. The six log-prob and reward fields are
    ``(P,)``, by pair. ``stats`` maps each requested statistic, and always ``"tokens"``, to an ``(S,)``
    float32 tensor in the order of the input sequences; ``"token_logps"``, where requested, has the shape of the labels.
    All are float32, or float64 for float64 inputs.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    stats: dict[str, Tensor]

    def metrics(self, pairs: str = "stacked") -> dict[str, Tensor]:
        """What training code logs, by TRL's names where TRL has them: 0-d tensors, detached, without a host sync.

        ``rewards/*``, ``logps/*`` are means over pairs, ``rewards/accuracies`` the share of pairs whose chosen reward
        is the higher. Of the statistics that were asked for: ``logits/*``, ``entropy`` and ``mean_token_accuracy`` (top
        1, of the chosen) are means over scored tokens. ``scored_tokens`` are those of this batch (TRL's ``num_tokens``
        counts prompts too, and adds up over steps). ``pairs`` as in the call, for the order of ``stats``.
        """
        if pairs not in ("stacked", "interleaved"):
            raise ValueError(f"unknown pairs {pairs!r}; known: stacked, interleaved")
        margins = self.chosen_rewards - self.rejected_rewards
        found = {
            "rewards/chosen": self.chosen_rewards.mean(),
            "rewards/rejected": self.rejected_rewards.mean(),
            "rewards/accuracies": (margins > 0).to(margins.dtype).mean(),
            "rewards/margins": margins.mean(),
            "logps/chosen": self.chosen_logps.mean(),
            "logps/rejected": self.rejected_logps.mean(),
            "scored_tokens": self.stats["tokens"].sum(),
        }
        half = self.chosen_logps.shape[0]
        sides = [slice(0, half), slice(half, None)] if pairs == "stacked" else [slice(0, None, 2), slice(1, None, 2)]
        everywhere = slice(None)
        for name, stat, places in (
            ("logits/chosen", "mean_logits", sides[0]),
            ("logits/rejected", "mean_logits", sides[1]),
            ("mean_token_accuracy", "top1", sides[0]),
            ("entropy", "entropy", everywhere),
        ):
            if stat in self.stats:
                tokens = self.stats["tokens"][places]
                found[name] = (self.stats[stat][places] * tokens).sum() / tokens.sum().clamp(min=1)
        return found


class SequenceLossOutput(NamedTuple):
    """What ``fused_kto_loss`` and ``fused_group_loss`` return; every field but ``loss`` is detached.

    ``loss`` is a scalar, or by unit with ``reduction="none"``: ``(S,)`` for KTO, ``(G,)`` for groups. ``rewards``
    (``beta * (logps - ref_logps)``), ``logps`` and ``ref_logps`` are ``(S,)`` in the order of the input. ``stats`` are
    those of ``DPOLossOutput``.
    """

    loss: Tensor
    rewards: Tensor
    logps: Tensor
    ref_logps: Tensor
    stats: dict[str, Tensor]
