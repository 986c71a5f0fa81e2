"""The Bradley-Terry model of comparisons: the loss of reward models, and strengths from counts of wins."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels.checks import check_device, check_floating, check_number, check_real, check_tensor

# The iteration ends when no log-strength moves by more than this. A log-strength of order 1 then has about 12 digits.
LARGEST_STEP = 1e-12
# The iteration ends after this many steps at the latest. Its rate of convergence depends on the counts.
MOST_STEPS = 100_000


def bradley_terry_loss(
    chosen_rewards: Tensor, rejected_rewards: Tensor, margin: Tensor | float = 0.0, reduction: str = "mean"
) -> Tensor:
    """Return the loss of reward-model training, ``-log sigmoid(r_w - r_l - margin)``.

    ``r_w`` and ``r_l`` are the rewards of the chosen and the rejected completion of a pair. The model of comparisons is
    Bradley and Terry's (Biometrika 39, 1952). The loss with margins is Touvron et al., arXiv 2307.09288, eq. 2.

    Args:
        chosen_rewards: ``(P,)`` floating point, differentiable.
        rejected_rewards: ``(P,)`` floating point, on the same device, differentiable.
        margin: a number, or a tensor ``()`` or ``(P,)`` of real numbers.
        reduction: "mean", "sum" or "none".

    Returns:
        A 0-d tensor, or ``(P,)`` with ``reduction="none"``, in the dtype that torch gives the difference of the rewards
        and the margin.

    Raises:
        TypeError: the rewards are not floating-point tensors, or ``margin`` is neither a number nor a tensor of real
            numbers.
        ValueError: shapes or devices do not fit, ``margin`` is not finite, ``reduction`` is unknown, or the mean of no
            pairs is asked for.

    Example:
        The reward model prefers the chosen completion with probability 3/4 in the first pair, and 1/2 in the second.

        >>> import torch
        >>> from dpo_kernels import bradley_terry_loss
        >>> chosen = torch.tensor([3.0, 1.0]).log()
        >>> rejected = torch.zeros(2)
        >>> bradley_terry_loss(chosen, rejected, reduction="none")  # log(4/3) and log(2)
        tensor([0.2877, 0.6931])
        >>> bradley_terry_loss(chosen, rejected)
        tensor(0.4904)

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
    """Return the maximum-likelihood log-strengths of K contestants from counts of wins.

    In the Bradley-Terry model ``P(i beats j) = sigmoid(s_i - s_j)`` with the log-strengths ``s``. They are found by
    Hunter's minorisation-maximisation (Annals of Statistics 32, 2004, eq. 3), whose likelihood rises at every step.

    Args:
        wins: ``(K, K)`` of real numbers or bool, finite and not negative. ``wins[i, j]`` is how often i beat j. The
            diagonal is ignored.

    Returns:
        ``(K,)`` float64 on the CPU, with mean 0.

    Raises:
        TypeError: ``wins`` is not a tensor of real numbers or bool.
        ValueError: the shape or a count is wrong, or no maximum exists. None exists if the contestants fall into two
            sets of which one never beat the other.

    Example:
        A beats B in 8 of 12 comparisons, and C beats A in 5 of 8. The odds of A against B are 2, those of C against A
        are 5/3, so those of C against B are 10/3.

        >>> import torch
        >>> from dpo_kernels import bradley_terry_strengths
        >>> wins = torch.tensor([[0, 8, 3], [4, 0, 0], [5, 0, 0]])  # rows and columns are A, B, C
        >>> a, b, c = bradley_terry_strengths(wins)
        >>> round(float(torch.sigmoid(b - c)), 4)  # B beats C with probability 3/13
        0.2308

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
    for beats in (beat, beat.t()):
        reached = {0}
        todo = [0]
        while todo:
            for other in beats[todo.pop()].nonzero().flatten().tolist():
                if other not in reached:
                    reached.add(other)
                    todo.append(other)
        if len(reached) < counts.shape[0]:
            left = sorted(set(range(counts.shape[0])) - reached)
            raise ValueError(
                f"no maximum exists: of {left} and the rest, one side never beat the other, whose strength would grow "
                "without bound"
            )
