"""``ContextParallel``: which group of ranks holds the other tokens of the same sequences."""

from dataclasses import replace
from typing import Any

import torch

from dpo_kernels import checks
from dpo_kernels.distributed.group import Ranks
from dpo_kernels.problem import ContextShard
from dpo_kernels.shapes import PackedTokens


class ContextParallel(Ranks):
    """The tokens of every sequence are split over a group of ranks, as in context and sequence parallelism.

    Every rank passes the same number of sequences, in the same order, with its own tokens of them. They may be split in
    any way: contiguous, zig-zag, unevenly, and with no token at all on some rank. Sums and counts are completed over
    the group before the loss is taken. So every rank gets the same loss, log-probs, rewards and statistics, bit for
    bit.

    A rank's gradients are those of its own tokens. The gradient of ``hidden`` is then complete. The gradients of
    ``weight`` and ``bias`` are a part, which the caller adds up over the group as it does for all parameters. DDP and
    FSDP take the mean over their ranks instead. Use ``grad_scale`` with them.

    Labels must be shifted before the split, because the label of a rank's last position lies on the next rank.

    Args:
        group: A ``ProcessGroup``, a ``DeviceMesh`` of one dimension, or ``(mesh, "name")``.
        grad_scale: A number > 0 by which every gradient is multiplied. It is the size of the group where a wrapper
            averages gradients over the group, and 1 where they are added up.

    Raises:
        TypeError: ``group`` is of another kind, or ``grad_scale`` is no number.
        ValueError: a mesh of several dimensions without a name, no process group, or ``grad_scale`` is not > 0.

    Example:
        >>> from dpo_kernels.distributed import ContextParallel
        >>> ContextParallel("cp")
        Traceback (most recent call last):
        ...
        TypeError: group must be a ProcessGroup, a DeviceMesh or (mesh, "name"), got str
    """

    argument = "context_parallel"

    def __init__(self, group: Any, *, grad_scale: float = 1.0) -> None:
        super().__init__(group)
        if checks.check_number("grad_scale", grad_scale) <= 0:
            raise ValueError(f"grad_scale must be > 0, got {grad_scale}")
        self.grad_scale = float(grad_scale)

    def share(self, packed: PackedTokens, capacity: int | None) -> tuple[ContextShard, PackedTokens]:
        """Exchange how many tokens of each sequence are scored on each rank, and whether the input of some is invalid.

        Args:
            packed: this rank's tokens.
            capacity: the static number of scored tokens of a call whose host must not wait, and so learns no counts.

        Returns:
            What the ranks share, and the tokens, which know of an invalid input of any rank.

        """
        invalid = packed.nan_if_invalid.isnan().to(packed.counts.dtype)
        gathered = self.all_gather(torch.cat([packed.counts, invalid[None]]))
        counts, some_invalid = gathered[:, :-1], gathered[:, -1].any()
        most = None if capacity is not None else tuple(counts.amax(dim=0).tolist())
        context = ContextShard(counts.sum(dim=0), most, capacity, self.ranks, self.all_gather, self.grad_scale)
        nan = torch.full_like(packed.nan_if_invalid, torch.nan)
        return context, replace(packed, nan_if_invalid=torch.where(some_invalid, nan, packed.nan_if_invalid))
