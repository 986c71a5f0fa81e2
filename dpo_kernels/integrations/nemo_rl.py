"""NeMo-RL's log-probs of a split head and its DPO loss without logits. Nothing of NeMo-RL is imported.

NeMo-RL's batches alternate chosen and rejected sequences, and hold a reference log-prob of each token. Its losses are
divided by the sequences of all ranks and micro-batches.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import DPOLossOutput, LossInputs, fused_dpo_loss
from dpo_kernels.distributed import VocabParallel
from dpo_kernels.distributed.group import Ranks
from dpo_kernels.integrations.logps import head_logps

IGNORED = -100
LOGIT_BYTES = 4  # of a float32 logit
EPSILON = 1e-8  # what NeMo-RL adds to a divisor, so that a batch without a valid sequence has loss 0


def from_parallel_hidden_states_to_logprobs(
    tensor_parallel_hidden_states: Tensor,
    output_weight_layer: Tensor,
    runtime_gather_output: bool | None,
    target: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
    tp_group: Any,
    inference_only: bool = False,
    cp_group: Any = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Compute what NeMo-RL's function of this name computes, with its arguments.

    Args:
        tensor_parallel_hidden_states: floating point ``(T / ranks, B, H)``, split over ``tp_group`` along the tokens.
            The call gathers them. Each rank gets the added-up gradient of its own tokens.
        output_weight_layer: this rank's rows ``(V / ranks, H)`` of the head.
        runtime_gather_output: not read, here or in NeMo-RL.
        target: the sequences' own ids, int64 ``(B, T)``, the same on every rank. They are shifted here. Ids of -100 are
            not scored.
        vocab_start_index: the id of the first of these rows.
        vocab_end_index: the id after the last one.
        tp_group: the process group that holds the head, or None for a head that is whole.
        inference_only: whether the result carries no gradient.
        cp_group: a process group of one rank, or None. NeMo-RL takes no other either.
        chunk_size: at how many positions of each sequence logits are held at a time. It becomes a cap on the scratch,
            which must be the same on every rank. None takes this package's own.

    Returns:
        ``(B, T - 1)``: at t the log-prob of the id at t + 1, 0 where not scored. float32, or float64 for float64 hidden
        states.

    Raises:
        ValueError: sequences are split over ranks, the bounds are not those of the rows, or as in ``head_logps``.
        TypeError: as in ``head_logps``.

    Source:
        NeMo-RL at 7ea279a, ``nemo_rl/distributed/model_utils.py``.

    Example:
        >>> hidden, weight = torch.ones(3, 1, 8), torch.zeros(4, 8)  # three positions of one sequence
        >>> from_parallel_hidden_states_to_logprobs(hidden, weight, None, torch.tensor([[1, 3, 2]]), 0, 4, None)
        tensor([[-1.3863, -1.3863]])

    """
    if cp_group is not None and Ranks(cp_group).ranks > 1:
        raise ValueError("cp_group has several ranks: this rank has a part of each sequence, which cannot be shifted")
    parallel = None
    if tp_group is not None:
        parallel = VocabParallel(tp_group, start=vocab_start_index, stop=vocab_end_index, sequence_sharded_hidden=True)
    elif (vocab_start_index, vocab_end_index) != (0, output_weight_layer.shape[0]):
        raise ValueError(
            f"a head that is whole has rows 0 to {output_weight_layer.shape[0]}, but the bounds are "
            f"{vocab_start_index} and {vocab_end_index}: pass tp_group"
        )
    scratch = None
    if chunk_size is not None:
        scratch = chunk_size * target.shape[0] * (vocab_end_index - vocab_start_index) * LOGIT_BYTES
    with torch.set_grad_enabled(torch.is_grad_enabled() and not inference_only):
        logps = head_logps(
            tensor_parallel_hidden_states,
            output_weight_layer,
            target,
            layout="sequence_first",
            shift=True,
            group=parallel,
            sequence_sharded_hidden=parallel is not None,
            scratch_bytes=scratch,
        )
    return logps[:, 1:]


@dataclass(frozen=True)
class PairLoss:
    """NeMo-RL's loss of a pair: a preference term and a term of supervised fine-tuning (SFT), each with a weight.

    Attributes:
        preference_weight: the weight of ``-log sigmoid(beta * (chosen reward - rejected reward))``.
        sft_weight: the weight of the chosen sequence's negative log-prob.
        average_rewards: whether a reward is an average over the scored tokens. Else it is a sum.
        average_sft: whether the negative log-prob is such an average.

    Example:
        >>> one, two = torch.tensor([-1.0]), torch.tensor([-2.0])
        >>> x = LossInputs(one, two, one, one, torch.tensor([4]), torch.tensor([2]), beta=1.0)
        >>> loss = PairLoss(1.0, 0.5, average_rewards=True, average_sft=True)
        >>> loss.rewards(x), loss.preference(x), loss.sft(x)
        ((tensor([0.]), tensor([-0.5000])), tensor([0.4741]), tensor([0.2500]))

    """

    preference_weight: float
    sft_weight: float
    average_rewards: bool
    average_sft: bool

    separable = True  # a pair's loss depends on that pair alone

    @property
    def plain(self) -> bool:
        """Whether this is DPO itself, for which a backend has a kernel."""
        return self.preference_weight == 1 and self.sft_weight == 0 and not self.average_rewards

    def __call__(self, x: LossInputs) -> Tensor:
        """Compute the losses ``(P,)``."""
        loss = self.preference_weight * self.preference(x)
        return loss + self.sft_weight * self.sft(x) if self.sft_weight else loss

    def rewards(self, x: LossInputs) -> tuple[Tensor, Tensor]:
        """Compute the rewards of chosen and of rejected sequences, ``(P,)`` each, without the factor beta."""
        chosen = x.policy_chosen_logps - x.ref_chosen_logps
        rejected = x.policy_rejected_logps - x.ref_rejected_logps
        if not self.average_rewards:
            return chosen, rejected
        return chosen / x.chosen_tokens.clamp(min=1), rejected / x.rejected_tokens.clamp(min=1)

    def preference(self, x: LossInputs) -> Tensor:
        """Compute the preference terms ``(P,)`` without their weight."""
        chosen, rejected = self.rewards(x)
        return -torch.nn.functional.logsigmoid(x.beta * (chosen - rejected))

    def sft(self, x: LossInputs) -> Tensor:
        """Compute the terms of supervised fine-tuning ``(P,)`` without their weight."""
        surprise = -x.policy_chosen_logps
        return surprise / x.chosen_tokens.clamp(min=1) if self.average_sft else surprise


def preference_loss(
    hidden: Tensor,
    weight: Tensor,
    data: Mapping[str, Tensor],
    global_valid_seqs: float | Tensor,
    *,
    reference_policy_kl_penalty: float = 0.05,
    preference_loss_weight: float = 1.0,
    sft_loss_weight: float = 0.0,
    preference_average_log_probs: bool = False,
    sft_average_log_probs: bool = False,
    **options: Any,
) -> tuple[Tensor, dict[str, float]]:
    """Compute the loss of NeMo-RL's ``DPOLossFn`` in one pass over the head.

    The options are those of NeMo-RL's ``DPOLossConfig``, with its defaults.

    Args:
        hidden: floating point ``(2B, T, H)``. Chosen and rejected sequences alternate.
        weight: floating point ``(V, H)``.
        data: NeMo-RL's batch. ``input_ids``, int64 ``(2B, T)``. ``token_mask`` ``(2B, T)``, 0 or 1, tells which ids are
            scored. ``sample_mask`` ``(2B,)``, 0 or 1, tells which sequences count. Both of a pair have the same one,
            and pairs with 0 cost nothing. ``reference_policy_logprobs`` ``(2B, T)`` is at t the reference's log-prob of
            the id at t + 1.
        global_valid_seqs: the number of sequences that count, of all ranks and micro-batches. Half of it divides the
            sum over pairs.
        reference_policy_kl_penalty: beta, >= 0.
        preference_loss_weight: the weight of the preference term, >= 0.
        sft_loss_weight: the weight of the SFT term of the chosen sequences, >= 0.
        preference_average_log_probs: whether rewards are averages over tokens. Else they are sums.
        sft_average_log_probs: whether the SFT term has averages over tokens. Else it has sums.
        **options: of ``fused_dpo_loss``, such as ``bias``, ``vocab_parallel`` and ``scratch_bytes``.

    Returns:
        The loss ``()``, differentiable, and NeMo-RL's metrics, Python numbers: ``loss``, ``sft_loss``,
        ``preference_loss``, ``accuracy``, ``rewards_chosen_mean``, ``rewards_rejected_mean`` and ``num_valid_samples``.
        They are divided as the loss is, so they add up over micro-batches.

    Raises:
        ValueError: a shape or a weight is wrong, or as in ``fused_dpo_loss``.
        TypeError: as in ``fused_dpo_loss``.

    Source:
        NeMo-RL at 7ea279a, ``nemo_rl/algorithms/loss/loss_functions.py``.

    Example:
        >>> data = {
        ...     "input_ids": torch.tensor([[0, 1, 2], [0, 3, 0]]), "token_mask": torch.tensor([[0, 1, 1], [0, 1, 0]]),
        ...     "sample_mask": torch.ones(2), "reference_policy_logprobs": torch.full((2, 3), -1.0),
        ... }
        >>> loss, metrics = preference_loss(torch.ones(2, 3, 8), torch.zeros(4, 8), data, global_valid_seqs=2)
        >>> round(loss.item(), 4), round(metrics["rewards_chosen_mean"], 4)  # 2 (1 - log 4)
        (0.7029, -0.7726)

    """
    for name, value in (("preference_loss_weight", preference_loss_weight), ("sft_loss_weight", sft_loss_weight)):
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    loss = PairLoss(preference_loss_weight, sft_loss_weight, preference_average_log_probs, sft_average_log_probs)
    labels, counts = _scored(data)
    pairs = global_valid_seqs / 2 + EPSILON
    out = fused_dpo_loss(
        hidden,
        weight,
        labels,
        ref_token_logps=data["reference_policy_logprobs"],
        loss_type="sigmoid" if loss.plain else loss,
        beta=reference_policy_kl_penalty,
        pairs="interleaved",
        pair_weights=counts,
        denominator=pairs,
        **options,
    )
    return out.loss, _metrics(loss, out, reference_policy_kl_penalty, counts, pairs)


def _metrics(
    loss: PairLoss, out: DPOLossOutput, beta: float, counts: Tensor, pairs: float | Tensor
) -> dict[str, float]:
    """Return NeMo-RL's metrics. They reach the host together."""
    tokens = out.stats["tokens"]
    x = LossInputs(
        out.chosen_logps,
        out.rejected_logps,
        out.ref_chosen_logps,
        out.ref_rejected_logps,
        chosen_tokens=tokens[::2],
        rejected_tokens=tokens[1::2],
        beta=beta,
    )
    chosen, rejected = loss.rewards(x)
    by_pair = {
        "sft_loss": loss.sft(x) if loss.sft_weight else torch.zeros_like(chosen),
        "preference_loss": loss.preference(x),
        "accuracy": (chosen > rejected).to(chosen.dtype),
        "rewards_chosen_mean": chosen,
        "rewards_rejected_mean": rejected,
    }
    means = (torch.stack(list(by_pair.values())) * counts).sum(dim=1) / pairs
    others = torch.stack([out.loss.detach().to(means), counts.sum().to(means)])
    value, num_pairs, *numbers = torch.cat([others, means]).tolist()
    return {"loss": value, **dict(zip(by_pair, numbers, strict=True)), "num_valid_samples": num_pairs}


def _scored(data: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the labels ``(2B, T)``, the id after each position, and which pairs count, float32 ``(P,)``, 0 or 1."""
    ids = data["input_ids"]
    if ids.dim() != 2 or ids.shape[0] % 2:
        raise ValueError(f"data['input_ids'] must be (2B, T), alternately chosen and rejected, got {tuple(ids.shape)}")
    shapes = {"token_mask": ids.shape, "sample_mask": ids.shape[:1], "reference_policy_logprobs": ids.shape}
    for name, shape in shapes.items():
        if data[name].shape != shape:
            raise ValueError(
                f"data[{name!r}] must be {tuple(shape)} beside input_ids {tuple(ids.shape)}, got "
                f"{tuple(data[name].shape)}"
            )
    counts = data["sample_mask"][::2] != 0
    scored = (data["token_mask"][:, 1:] != 0) & counts.repeat_interleave(2)[:, None]
    labels = torch.nn.functional.pad(ids[:, 1:].masked_fill(~scored, IGNORED), (0, 1), value=IGNORED)
    return labels, counts.to(torch.float32)
