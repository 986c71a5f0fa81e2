"""What some losses keep between steps or need estimated beside the batch."""

import torch
from torch import Tensor

from dpo_kernels.checks import check_device, check_floating, check_number


class RunningDelta:
    """The reward shift of BCO, an exponential running mean of rewards. Jung et al., arXiv 2404.04656.

    ``delta = (mean of chosen rewards + mean of rejected rewards) / 2``, kept without gradient or host sync::

        delta = RunningDelta()
        out = fused_dpo_loss(..., loss_type="bco_pair", delta=delta.value)
        delta.update(out.chosen_rewards, out.rejected_rewards)

    Args:
        decay: what is kept of the old mean at an update, in [0, 1). The first update takes the rewards as they are.

    """

    def __init__(self, decay: float = 0.9) -> None:
        if not 0.0 <= check_number("decay", decay) < 1.0:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.value = torch.zeros((), dtype=torch.float64, device="cpu")
        self.updates = 0

    def update(self, chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
        """Fold in the rewards of a step, ``(n,)`` each (not necessarily as many); returns the new value, 0-d.

        A side without rewards is left out; with none on either side the value stays what it is.
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
        """Plain numbers, for checkpoints."""
        return {"decay": self.decay, "value": float(self.value), "updates": self.updates}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """The inverse of ``state_dict``."""
        self.decay, self.updates = float(state["decay"]), int(state["updates"])
        self.value = torch.tensor(float(state["value"]), dtype=torch.float64, device="cpu")


def kto_kl(policy_logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KTO's estimate of the KL to the reference, 0-d, at least 0, without gradient.

    The mean log-ratio of completions ``(n,)`` that belong to other prompts of the batch (Ethayarajh et al.,
    arXiv 2402.01306, section 4.2): score the shifted batch with ``fused_sequence_logps``.
    """
    check_floating("policy_logps", policy_logps)
    check_floating("ref_logps", ref_logps)
    check_device("ref_logps", ref_logps, "policy_logps", policy_logps)
    if policy_logps.shape != ref_logps.shape:
        raise ValueError(f"policy_logps {tuple(policy_logps.shape)} and ref_logps {tuple(ref_logps.shape)} differ")
    if not policy_logps.numel():
        raise ValueError("policy_logps holds no log-probs: the mean of none is undefined; keep the last step's kl")
    return (policy_logps.detach().double() - ref_logps.detach().double()).mean().clamp(min=0)
