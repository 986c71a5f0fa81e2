"""``VocabParallel``: which group of ranks holds the head, and which rows of it are this rank's."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_kernels import checks
from dpo_kernels.distributed.group import Ranks, checks_always
from dpo_kernels.problem import VocabShard

# These stand for a size along the tokens: hidden states that are not split, that are not there, or that are no matrix.
WHOLE, MISSING, NO_HIDDEN = -1, -2, -3


class VocabParallel(Ranks):
    """The head is split along the vocabulary over a group of ranks, as in tensor parallelism.

    ``weight`` (and ``bias``) of the call is this rank's rows of the head, in the order of the ranks. The shards may
    have any sizes, and may be empty. Every rank passes the same hidden states and labels. It gets the same loss,
    log-probs and gradient of the hidden states, bit for bit. The gradient of the shard is this rank's own.

    Args:
        group: A ``ProcessGroup``, a ``DeviceMesh`` of one dimension, or ``(mesh, "name")``.
        start: The id of the shard's first token. Without it the shards follow each other in the order of the ranks.
        stop: The id after the shard's last token.
        vocab_size: The number of tokens. Rows beyond it are padding: they hold real weights in some models, and would
            otherwise enter the sum.
        reduce_hidden_grad: Whether the gradient of the hidden states is added up over the ranks, in float32, before it
            is rounded. With False the caller does it, as a layer that copies hidden states to its ranks does. Adding up
            in both places makes it too large by the number of ranks. Adding up in neither leaves a part of it.
        sequence_sharded_hidden: Whether ``hidden`` and ``ref_hidden`` arrive split over the group along the tokens, as
            in Megatron's sequence parallelism: ``(S, T_local, H)``, or ``(N_local, H)`` packed, in the order of the
            ranks. The call gathers them. Each rank gets the added-up gradient of its own tokens. Labels, ``cu_seqlens``
            and weights are those of all tokens.

    Raises:
        TypeError: ``group`` is of another kind, or a flag is no bool.
        ValueError: bounds that are no bounds, a mesh of several dimensions without a name, or no process group. Or
            hidden states are gathered in the call, but their gradient is not to be added up there.

    Example:
        >>> from dpo_kernels.distributed import VocabParallel
        >>> VocabParallel("tp")
        Traceback (most recent call last):
        ...
        TypeError: group must be a ProcessGroup, a DeviceMesh or (mesh, "name"), got str
    """

    argument = "vocab_parallel"

    def __init__(
        self,
        group: Any,
        *,
        start: int | None = None,
        stop: int | None = None,
        vocab_size: int | None = None,
        reduce_hidden_grad: bool = True,
        sequence_sharded_hidden: bool = False,
    ) -> None:
        super().__init__(group)
        if (start is None) != (stop is None):
            raise ValueError("start and stop go together: give both bounds of the shard, or neither")
        for name, value, least in (("start", start, 0), ("stop", stop, 0), ("vocab_size", vocab_size, 1)):
            checks.check_count(name, value, least)
        if start is not None and stop is not None and not 0 <= start <= stop:
            raise ValueError(f"start and stop must satisfy 0 <= start <= stop, got {start} and {stop}")
        checks.check_flag("reduce_hidden_grad", reduce_hidden_grad)
        checks.check_flag("sequence_sharded_hidden", sequence_sharded_hidden)
        if sequence_sharded_hidden and not reduce_hidden_grad:
            raise ValueError("sequence_sharded_hidden=True goes with reduce_hidden_grad=True: whoever gathers adds up")
        self.start, self.stop, self.vocab_size = start, stop, vocab_size
        self.reduce_hidden_grad, self.sequence_sharded_hidden = reduce_hidden_grad, sequence_sharded_hidden
        self._bounds: tuple[int, int, int, int] | None = None  # first id, rows that are tokens, all tokens, largest
        self._token_sizes: list[list[int]] = []  # of hidden and of ref_hidden: each rank's size along the tokens
        # Of calls that keep what they know: this rank's sizes, then the two above, by what is the same on every rank.
        self._kept: dict[Any, tuple[list[int], tuple[int, int, int, int], list[list[int]]]] = {}

    @classmethod
    def of(cls, weight: Tensor, *, mesh_dim: str | None = None, **options: Any) -> "tuple[Tensor, VocabParallel]":
        """Return this rank's rows of a head that is a ``DTensor``, and the ``VocabParallel`` of its mesh dimension.

        The rows are differentiable: the gradient of the head is a ``DTensor`` like the head. Bounds come from the
        ``DTensor``. A shard that FSDP has made has the very same placements, and is no shard of the vocabulary.

        Args:
            weight: ``(V, H)`` ``DTensor``, ``Shard(0)`` on one dimension of its mesh and replicated on the others.
            mesh_dim: The name of that dimension. It must be given where the mesh has several.
            **options: ``vocab_size``, ``reduce_hidden_grad`` and ``sequence_sharded_hidden`` of the constructor.

        Returns:
            The rows ``(V_local, H)`` and the value for ``vocab_parallel``.

        Raises:
            TypeError: ``weight`` is no ``DTensor``.
            ValueError: The placements are others. Redistribute the head, or pass rows and bounds yourself.

        """
        from torch.distributed.tensor import DTensor, Replicate, Shard
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        if not isinstance(weight, DTensor):
            raise TypeError(f"VocabParallel.of takes a DTensor, got {type(weight).__name__}: pass VocabParallel(group)")
        mesh, placements = weight.device_mesh, weight.placements
        names = mesh.mesh_dim_names or ()
        split = [place for place, placement in enumerate(placements) if not isinstance(placement, Replicate)]
        described = f"{placements} on a mesh of {names or mesh.shape}"
        if len(split) != 1 or type(placements[split[0]]) is not Shard or not placements[split[0]].is_shard(0):
            raise ValueError(
                f"weight has placements {described}; expected Shard(0) on one dimension and Replicate on the others: "
                "redistribute it, or gather what FSDP has sharded before the call"
            )
        if mesh_dim is None and mesh.ndim > 1:
            raise ValueError(f"weight has placements {described}: name the dimension of the vocabulary, mesh_dim=...")
        if mesh_dim is not None and (mesh_dim not in names or names.index(mesh_dim) != split[0]):
            raise ValueError(f"weight is not split along {mesh_dim!r}: it has placements {described}")
        shape, offset = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
        start = min(offset[0], weight.shape[0])
        group = mesh.get_group(split[0])
        return weight.to_local(), cls(group, start=start, stop=start + shape[0], **options)

    def begin(self, weight: Any, hiddens: tuple[Any, Any], labels: Any, *, keep: bool = False) -> None:
        """Exchange the sizes of the shards. Every call begins with it, on every rank.

        With ``keep`` sizes that are known are taken as they are, so that nothing is read back from a GPU. Those of
        hidden states that are split along the tokens are known for labels of the same shape.

        Args:
            weight: this rank's rows of the head.
            hiddens: the hidden states of policy and reference; the second may be None.
            labels: the labels of all tokens, the same on every rank.
            keep: whether the host must not wait for the device.

        Raises:
            ValueError: the ranks' sizes do not fit together. Or they are kept, and this rank's have changed.

        """
        rows = weight.shape[0] if isinstance(weight, Tensor) and weight.dim() else -1
        device = weight.device if isinstance(weight, Tensor) else torch.device("cpu")
        shapes = [self._shape_of(hidden) for hidden in hiddens]
        start, stop = -1 if self.start is None else self.start, -1 if self.stop is None else self.stop
        numbers = [rows, start, stop, self.vocab_size or -1, *shapes[0], *shapes[1]]
        whole = (getattr(labels, "shape", None), hiddens[1] is None) if self.sequence_sharded_hidden else None
        if keep and whole in self._kept and not checks_always():
            before, self._bounds, self._token_sizes = self._kept[whole]
            _check_kept(before, numbers)
            return
        mine = torch.tensor(numbers, dtype=torch.int64, device=device)
        all_sizes: list[list[int]] = self.all_gather(mine).tolist()
        self._token_sizes = [_token_sizes("hidden", [tuple(sizes[4:7]) for sizes in all_sizes])]
        self._token_sizes.append(_token_sizes("ref_hidden", [tuple(sizes[7:]) for sizes in all_sizes]))
        self._bounds = self._bounds_of([sizes[:4] for sizes in all_sizes])
        if keep or whole is None:
            self._kept[whole] = numbers, self._bounds, self._token_sizes

    def _shape_of(self, hidden: Any) -> tuple[int, int, int]:
        """Return the sizes of hidden states along the tokens, the sequences and H, or why there are none."""
        if not self.sequence_sharded_hidden:
            return WHOLE, 0, 0
        if hidden is None:
            return MISSING, 0, 0
        if not isinstance(hidden, Tensor) or type(hidden).__name__ == "DTensor" or hidden.dim() not in (2, 3):
            return NO_HIDDEN, 0, 0
        return hidden.shape[-2], hidden.shape[0] if hidden.dim() == 3 else -1, hidden.shape[-1]

    def gather_tokens(self, hidden: Any, place: int) -> Any:
        """Return the hidden states of all tokens, differentiably. Whole ones are returned as they are.

        ``place`` is 0 for the policy and 1 for the reference.
        """
        if hidden is None or not self.sequence_sharded_hidden:
            return hidden
        return _GatherTokens.apply(hidden, self, self._token_sizes[place])

    def shard_of(self, weight: Tensor) -> tuple[int, VocabShard]:
        """Return how many rows of ``weight`` are tokens, and where they stand in the vocabulary."""
        assert self._bounds is not None, "a call begins with begin()"
        start, kept, total, largest = self._bounds
        reduce = self.begin_all_reduce_ if self.reduce_hidden_grad else None
        return kept, VocabShard(start, total, largest, self.ranks, self.all_gather, reduce)

    def _bounds_of(self, all_sizes: list[list[int]]) -> tuple[int, int, int, int]:
        if any(num_rows < 0 for num_rows, *_ in all_sizes):
            raise ValueError("weight is no matrix on some rank")
        if len({size for *_, size in all_sizes}) > 1:
            raise ValueError(f"the ranks disagree about vocab_size: {[size for *_, size in all_sizes]}")
        bounds, following = [], 0
        for rank, (num_rows, first, end, _) in enumerate(all_sizes):
            first, end = (following, following + num_rows) if first < 0 else (first, end)
            if end - first != num_rows:
                raise ValueError(f"rank {rank} has {num_rows} rows of the head, but bounds {first} to {end}")
            if first != following:
                raise ValueError(f"the shard of rank {rank} begins at {first}, but those before it end at {following}")
            bounds.append((first, end))
            following = end
        total = following if self.vocab_size is None else self.vocab_size
        if total > following:
            raise ValueError(f"vocab_size={total} is more than the {following} rows that the ranks hold together")
        if total == 0:
            raise ValueError("the head has no rows on any rank")
        kept = [max(0, min(end, total) - min(first, total)) for first, end in bounds]
        rank = dist.get_rank(self.group)
        return min(bounds[rank][0], total), kept[rank], total, max(kept)


def _check_kept(before: list[int], now: list[int]) -> None:
    """Raise where this rank's sizes are others than those that an earlier call has exchanged."""
    if before == now:
        return
    sizes = ("tokens", "sequences", "width")
    of_hidden = [f"{size} of {name}" for name in ("hidden", "ref_hidden") for size in sizes]
    names = ["rows of weight", "start", "stop", "vocab_size", *of_hidden]
    changed = [f"{name} {old} to {new}" for name, old, new in zip(names, before, now, strict=True) if old != new]
    raise ValueError(
        "with max_scored_tokens the ranks exchange their sizes once for each shape of labels, and here they have "
        f"changed: {', '.join(changed)}; make another VocabParallel for another head or another split"
    )


def _token_sizes(name: str, shapes: list[tuple[int, ...]]) -> list[int]:
    """Return each rank's size of ``hidden`` or ``ref_hidden`` along the tokens. Raise where ranks do not fit."""
    sizes = [tokens for tokens, *_ in shapes]
    if NO_HIDDEN in sizes:
        raise ValueError(
            f"{name} must be a plain tensor (S, T_local, H) or (N_local, H) on every rank; of a DTensor pass to_local()"
        )
    if len({min(size, 0) for size in sizes}) > 1:
        raise ValueError(f"the ranks disagree about sequence_sharded_hidden, or some have no {name}")
    if len({tuple(others) for _, *others in shapes}) > 1:
        raise ValueError(f"the ranks have {name} of shapes that differ not only along the tokens")
    return sizes


class _GatherTokens(torch.autograd.Function):
    """Gather hidden states along the tokens. The loss adds up their gradient, of which each rank keeps its part."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, parallel: VocabParallel, sizes: list[int]) -> Tensor:
        rank = dist.get_rank(parallel.group)
        ctx.start, ctx.size = sum(sizes[:rank]), sizes[rank]
        largest = max(sizes)
        missing = largest - hidden.shape[-2]
        padded = torch.nn.functional.pad(hidden, (0, 0, 0, missing)) if missing else hidden
        parts = parallel.all_gather(padded)
        return torch.cat([part.narrow(-2, 0, size) for part, size in zip(parts, sizes, strict=True)], dim=-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.narrow(-2, ctx.start, ctx.size).contiguous(), None, None
