"""The vocabulary split over ranks: a row's state of one shard becomes that of all, before its log-prob is taken."""

import torch

from dpo_kernels.kernel_interface import RowState
from dpo_kernels.problem import VocabShard


def complete(state: RowState, shard: VocabShard | None) -> None:
    """Merge the states of all ranks into this one, in place. Afterwards every rank holds the same bits.

    Maxima, sums and targets travel, not log-sum-exps. So a shard that dominates costs no digit, and one whose logits
    are all -inf adds nothing. The largest logit is the first of its value, as without shards.
    """
    if shard is None:
        return
    optional = [name for name in ("entropy", "logit_sum", "square_sum") if getattr(state, name) is not None]
    rows = [state.max, state.others, state.target, *(getattr(state, name) for name in optional)]
    max_RC, others_RC, target_RC, *sums = shard.all_gather(torch.stack(rows)).unbind(1)
    highest = max_RC.amax(dim=0)
    shift = highest.masked_fill(highest == -torch.inf, 0.0)
    factor_RC = torch.where(max_RC == highest, torch.ones_like(max_RC), (max_RC - shift).exp())
    if state.argmax is not None:
        first_RC = shard.all_gather(state.argmax + shard.start)
        winner = (max_RC == highest).to(torch.int8).argmax(dim=0)
        state.argmax = first_RC.gather(0, winner[None])[0] - shard.start
    for name, sum_RC in zip(optional, sums, strict=True):
        if name == "entropy":  # a shift by d adds d * exp to every -e * log e
            sum_RC = sum_RC + torch.where(others_RC > 0, (highest - max_RC) * others_RC, torch.zeros_like(others_RC))
        factor = {"entropy": factor_RC, "square_sum": factor_RC.square()}.get(name)
        setattr(state, name, (sum_RC if factor is None else sum_RC * factor).sum(dim=0))
    state.others = (others_RC * factor_RC).sum(dim=0)
    state.target = target_RC.amax(dim=0)
    state.max = highest
