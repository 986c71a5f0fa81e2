"""The result of the public functions for pairs."""

from typing import NamedTuple

from torch import Tensor


class DPOLossOutput(NamedTuple):
    """What ``fused_dpo_loss`` returns.

    Only ``loss`` carries a gradient. The tensors are float32, or float64 for float64 inputs; the statistics are
    float32.

    Attributes:
        loss: The loss, a scalar, or ``(P,)`` with ``reduction="none"``.
        chosen_rewards: ``beta * (policy - reference)`` of each chosen sequence, ``(P,)``.
        rejected_rewards: ``beta * (policy - reference)`` of each rejected sequence, ``(P,)``.
        chosen_logps: The policy's log-prob of each chosen sequence, ``(P,)``.
        rejected_logps: The policy's log-prob of each rejected sequence, ``(P,)``.
        ref_chosen_logps: The reference's log-prob of each chosen sequence, ``(P,)``.
        ref_rejected_logps: The reference's log-prob of each rejected sequence, ``(P,)``.
        stats: Each requested statistic by name, and always "tokens", the number of scored tokens. Each is ``(S,)``, in
            the order of the input sequences. "token_logps" has the shape of the labels. It and "kl" have the dtype of
            the results.

    Example:
        >>> import torch
        >>> from dpo_kernels import fused_dpo_loss
        >>> hidden, weight, labels = torch.ones(2, 2, 8), torch.zeros(4, 8), torch.tensor([[-100, 1], [2, 3]])
        >>> out = fused_dpo_loss(hidden, weight, labels, reference_free=True, stats=("entropy",))
        >>> round(out.chosen_logps.item(), 3), round(out.rejected_logps.item(), 3), out.stats["tokens"].tolist()
        (-1.386, -2.773, [1.0, 2.0])
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
        """Return what training code logs, under TRL's names where TRL has them.

        The means over pairs are ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins``, ``logps/chosen`` and
        ``logps/rejected``. ``rewards/accuracies`` is the share of pairs whose chosen reward is the higher one.

        If the statistics were requested, the means over scored tokens are ``logits/chosen``, ``logits/rejected``,
        ``entropy`` and ``mean_token_accuracy``. The last one counts chosen tokens that are the head's first choice.

        ``scored_tokens`` is the number of scored tokens of this batch. TRL's ``num_tokens`` differs: it counts prompts
        too, and it adds up over steps.

        Args:
            pairs: Order of the sequences in the call, "stacked" or "interleaved", a str. It tells which ``stats`` are
                those of chosen sequences.

        Returns:
            Each metric by name, a 0-d tensor without gradient. No host sync is needed.

        Raises:
            ValueError: ``pairs`` is neither of the two names.

        Source:
            The names are those of TRL's ``DPOTrainer``.

        Example:
            >>> import torch
            >>> from dpo_kernels import fused_dpo_loss
            >>> hidden, weight, labels = torch.ones(2, 2, 8), torch.zeros(4, 8), torch.tensor([[-100, 1], [2, 3]])
            >>> out = fused_dpo_loss(hidden, weight, labels, reference_free=True, beta=1.0)
            >>> round(out.metrics()["rewards/margins"].item(), 3)  # -log 4 against -2 log 4
            1.386
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
    """What ``fused_kto_loss`` and ``fused_group_loss`` return.

    Only ``loss`` carries a gradient. The tensors are float32, or float64 for float64 inputs; the statistics are
    float32.

    Attributes:
        loss: The loss, a scalar. With ``reduction="none"`` it is ``(S,)`` for KTO and ``(G,)`` for G groups.
        rewards: ``beta * (logps - ref_logps)``, ``(S,)``, in the order of the input sequences.
        logps: The policy's log-prob of each sequence, ``(S,)``.
        ref_logps: The reference's log-prob of each sequence, ``(S,)``.
        stats: Each requested statistic by name, and always "tokens", the number of scored tokens. Each is ``(S,)``,
            in the order of the input sequences. "token_logps" has the shape of the labels. It and "kl" have the dtype
            of the results.

    Example:
        >>> import torch
        >>> from dpo_kernels import fused_kto_loss
        >>> hidden, weight, labels = torch.ones(2, 2, 8), torch.zeros(4, 8), torch.tensor([[-100, 1], [2, 3]])
        >>> out = fused_kto_loss(hidden, weight, labels, torch.tensor([True, False]), reference_free=True)
        >>> [round(logp, 3) for logp in out.logps.tolist()], out.stats["tokens"].tolist()
        ([-1.386, -2.773], [1.0, 2.0])
    """

    loss: Tensor
    rewards: Tensor
    logps: Tensor
    ref_logps: Tensor
    stats: dict[str, Tensor]
