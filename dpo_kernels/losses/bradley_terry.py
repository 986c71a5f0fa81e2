"""Bradley and Terry's model of comparisons: the loss of reward models, and strengths from counts of wins."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels.checks import check_device, check_floating, check_number, check_real, check_tensor

LARGEST_STEP = 1e-12
MOST_STEPS = 100_000


def bradley_terry_loss(
    chosen_rewards: Tensor, rejected_rewards: Tensor, margin: Tensor | float = 0.0, reduction: str = "mean"
) -> Tensor:
    """``-log sigmoid(r_w - r_l - margin)``, the loss of reward-model training.

    Bradley and Terry, Biometrika 39 (1952); with margins Touvron et al., arXiv 2307.09288, eq. 2.

    Args:
        chosen_rewards: ``(P,)``, differentiable.
        rejected_rewards: ``(P,)``, differentiable.
        margin: a number, or ``(P,)``.
        reduction: "mean", "sum" or "none".

    """
    check_floating("chosen_rewards", chosen_rewards)
    check_floating("rejected_rewards", rejected_rewards)
    check_device("rejected_rewards", rejected_rewards, "chosen_rewards", chosen_rewards)
    if chosen_rewards.shape != rejected_rewards.shape or chosen_rewards.dim() != 1:
        raise ValueError(
            f"chosen_rewards {tuple(chosen_rewards.shape)} and rejected_rewards {tuple(rejected_rewards.shape)} must "
            "both have the shape (P,)"
        )
    if not isinstance(margin, Tensor):
        margin = check_number("margin", margin)
    else:
        check_real("margin", margin)
        if margin.shape not in ((), chosen_rewards.shape):
            raise ValueError(f"margin has shape {tuple(margin.shape)}, expected () or {tuple(chosen_rewards.shape)}")
        if margin.dim() or margin.device.type != "cpu":
            check_device("margin", margin, "chosen_rewards", chosen_rewards)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards - margin)
    if reduction == "none":
        return losses
    if reduction not in ("mean", "sum"):
        raise ValueError(f"unknown reduction {reduction!r}; known: mean, sum, none")
    if reduction == "mean" and not losses.numel():
        raise ValueError("empty batch: reduction='mean' of no pairs is undefined")
    return losses.mean() if reduction == "mean" else losses.sum()


def bradley_terry_strengths(wins: Tensor) -> Tensor:
    """Maximum-likelihood log-strengths from counts: ``wins[i, j]`` is how often i beat j.

    ``P(i beats j) = sigmoid(s_i - s_j)``. Found by Hunter's minorisation (Annals of Statistics 32, 2004, eq. 3), which
    rises at every step. A beats B in 8 of 12 and C beats A in 5 of 8: P(B beats C) = 3/13.

    Args:
        wins: ``(K, K)``, not negative; the diagonal is ignored.

    Returns:
        ``(K,)`` float64 of mean 0.

    Raises:
        ValueError: where no maximum exists: the contestants fall into two sets of which one never beat the other.

    """
    check_tensor("wins", wins)
    if wins.dtype != torch.bool:
        check_real("wins", wins)
    if wins.is_meta:
        raise ValueError("wins is on meta and has no values, which must be looked at")
    if wins.dim() != 2 or wins.shape[0] != wins.shape[1] or not wins.shape[0]:
        raise ValueError(f"wins must have the shape (K, K), got {tuple(wins.shape)}")
    counts = wins.detach().double().cpu().clone()
    if not bool((counts >= 0).all()) or not bool(counts.isfinite().all()):
        raise ValueError("wins must be finite and not negative")
    counts.fill_diagonal_(0.0)
    _check_connected(counts)
    if counts.shape[0] == 1:
        return torch.zeros(1, dtype=torch.float64, device="cpu")
    games, won = counts + counts.t(), counts.sum(dim=1)
    strength = torch.ones(counts.shape[0], dtype=torch.float64, device="cpu")
    for _ in range(MOST_STEPS):
        before = strength
        strength = won / (games / (before[:, None] + before[None, :])).sum(dim=1)
        strength = strength / strength.log().mean().exp()
        if float((strength.log() - before.log()).abs().max()) < LARGEST_STEP:
            break
    return strength.log()


def _check_connected(counts: Tensor) -> None:
    beat = counts > 0
    for dlogp_dhidden in (beat, beat.t()):
        reached = {0}
        todo = [0]
        while todo:
            for other in dlogp_dhidden[todo.pop()].nonzero().flatten().tolist():
                if other not in reached:
                    reached.add(other)
                    todo.append(other)
        if len(reached) < counts.shape[0]:
            left = sorted(set(range(counts.shape[0])) - reached)
            raise ValueError(
                f"no maximum exists: of {left} and the rest, one side never beat the other, whose strength would grow "
                "without bound"
            )
