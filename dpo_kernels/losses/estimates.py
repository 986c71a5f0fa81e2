"""Estimates that some losses need beside the batch: BCO's running reward shift and KTO's KL divergence."""

import torch
from torch import Tensor

from dpo_kernels.checks import check_device, check_floating, check_number


class RunningDelta:
    """Keep the reward shift of BCO, an exponential running mean of rewards (Jung et al., arXiv 2404.04656).

    The shift of one step is ``(mean of chosen rewards + mean of rejected rewards) / 2``. It has no gradient, and
    updating it needs no host sync.

    Args:
        decay: weight of the old mean at an update, in [0, 1). The first update replaces the initial 0.

    Attributes:
        value: the shift, 0-d float64, for the option ``delta``. It is 0 before the first update.
        updates: number of updates so far.

    Raises:
        TypeError: ``decay`` is not a real number.
        ValueError: ``decay`` does not lie in [0, 1).

    Example:
        >>> import torch
        >>> from dpo_kernels import RunningDelta, dpo_loss
        >>> chosen, rejected, reference = torch.tensor([-3.0]), torch.tensor([-6.0]), torch.tensor([-4.0])
        >>> delta = RunningDelta(decay=0.75)
        >>> for _ in range(2):
        ...     loss, chosen_rewards, rejected_rewards = dpo_loss(
        ...         chosen, rejected, reference, reference, loss_type="bco_pair", beta=1.0, delta=delta.value
        ...     )
        ...     shift = delta.update(chosen_rewards, rejected_rewards)  # rewards 1 and -2
        >>> shift, delta.updates
        (tensor(-0.5000, dtype=torch.float64), 2)

    """

    def __init__(self, decay: float = 0.9) -> None:
        if not 0.0 <= check_number("decay", decay) < 1.0:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.value = torch.zeros((), dtype=torch.float64, device="cpu")
        self.updates = 0

    def update(self, chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
        """Fold in the rewards of a step.

        A side without rewards is left out. If neither side has any, the value stays what it is.

        Args:
            chosen_rewards: ``(n,)`` floating point.
            rejected_rewards: ``(m,)`` floating point, on the same device.

        Returns:
            The new value, 0-d float64 on the device of the rewards.

        Raises:
            TypeError: a side is not a floating-point tensor.
            ValueError: the sides are on different devices.

        """
        check_floating("chosen_rewards", chosen_rewards)
        check_floating("rejected_rewards", rejected_rewards)
        check_device("rejected_rewards", rejected_rewards, "chosen_rewards", chosen_rewards)
        sides = [side.detach().double() for side in (chosen_rewards, rejected_rewards) if side.numel()]
        if not sides:
            return self.value
        mean = torch.stack([side.mean() for side in sides]).mean()
        kept = self.value.to(mean.device)
        self.value = mean if self.updates == 0 else self.decay * kept + (1.0 - self.decay) * mean
        self.updates += 1
        return self.value

    def state_dict(self) -> dict[str, float]:
        """Return the state as plain numbers, for a checkpoint."""
        return {"decay": self.decay, "value": float(self.value), "updates": self.updates}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what ``state_dict`` returned; the value is then on the CPU."""
        self.decay, self.updates = float(state["decay"]), int(state["updates"])
        self.value = torch.tensor(float(state["value"]), dtype=torch.float64, device="cpu")


def kto_kl(policy_logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Return KTO's estimate of the policy's KL divergence from the reference.

    It is the mean log-ratio of completions to prompts that they do not belong to, or 0 if that is negative. The source
    is Ethayarajh et al., arXiv 2402.01306, section 4.2. ``fused_sequence_logps`` computes the log-probs of a batch
    whose completions are shifted by one prompt.

    Args:
        policy_logps: ``(n,)`` floating point, log-probs of the mismatched completions under the policy.
        ref_logps: ``(n,)`` floating point, the same under the reference, on the same device.

    Returns:
        The estimate in nats, 0-d float64, at least 0, without gradient. It is the argument ``kl`` of
        ``fused_kto_loss``.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes or devices differ, or there are no log-probs.

    Example:
        >>> import torch
        >>> from dpo_kernels import kto_kl
        >>> kto_kl(torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -2.5]))  # log-ratios 1 and 1/2
        tensor(0.7500, dtype=torch.float64)
        >>> kto_kl(torch.tensor([-3.0]), torch.tensor([-1.0]))
        tensor(0., dtype=torch.float64)

    """
    check_floating("policy_logps", policy_logps)
    check_floating("ref_logps", ref_logps)
    check_device("ref_logps", ref_logps, "policy_logps", policy_logps)
    if policy_logps.shape != ref_logps.shape:
        raise ValueError(f"policy_logps {tuple(policy_logps.shape)} and ref_logps {tuple(ref_logps.shape)} differ")
    if not policy_logps.numel():
        raise ValueError("policy_logps holds no log-probs: the mean of none is undefined; keep the last step's kl")
    return (policy_logps.detach().double() - ref_logps.detach().double()).mean().clamp(min=0)
