"""The problem: what a call asks for, as one frozen object. ``inputs/make_problem.py`` checks its parts and makes it."""

from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.checks import traced
from dpo_kernels.loss_interface import SequenceLoss
from dpo_kernels.records import dataclass
from dpo_kernels.shapes import Head, NeedsGrad, PackedTokens, Sampling, Schedule
from dpo_kernels.tiled_weight import TiledWeight

# A reference gets no gradients.
NO_GRADIENTS = NeedsGrad(hidden=False, weight=False, bias=False)


@dataclass(frozen=True)
class CachedReference:
    """Log-probs of the reference that the caller has computed before."""

    logps: Tensor  # (S,) float64 (float32 on MPS), in the order of the packed sequences


@dataclass(frozen=True)
class CachedTokenReference:
    """Log-probs of single tokens under the reference that the caller has computed before."""

    logps: Tensor  # (R,) floating point, at the places of their labels; anything where no label is scored


@dataclass(frozen=True)
class ScoredReference:
    """A reference model whose log-probs are computed in the call, without gradients."""

    hidden: Tensor  # (R, H_ref)
    head: Head
    compute_dtype: torch.dtype


@dataclass(frozen=True)
class MainGrad:
    """The caller's buffer, to which the gradient of the head's weight is added during the forward pass."""

    buffer: Tensor  # (V, H) float32, or float64 for float64 operands
    scale: float  # the upstream gradient that the caller promises


@dataclass(frozen=True)
class VocabShard:
    """This rank's rows of a head whose vocabulary is split over a group of ranks (``distributed.VocabParallel``)."""

    start: int  # the id of the first token
    total: int  # tokens of the whole vocabulary
    largest: int  # rows of the largest shard; every rank plans with them, so that all have the same chunks
    ranks: int
    all_gather: Callable[[Tensor], Tensor]  # stacks the tensors of all ranks, the same bits on every rank
    # This begins to add up over the ranks, in place, and returns what waits for the end. None: the caller adds up.
    reduce_hidden_grad: Callable[[Tensor], Callable[[], object]] | None


@dataclass(frozen=True)
class ContextShard:
    """This rank's tokens of sequences that are split over a group of ranks (``distributed.ContextParallel``)."""

    counts: Tensor  # (S,) int64, scored tokens of each packed sequence on all ranks together
    most: tuple[int, ...] | None  # the largest count of any rank; None where the host must not know
    capacity: int | None  # the static number of scored tokens, from which all ranks plan then
    ranks: int
    all_gather: Callable[[Tensor], Tensor]  # stacks the tensors of all ranks, the same bits on every rank
    grad_scale: float  # every gradient is multiplied by it

    def complete(self, sums: Tensor) -> Tensor:
        """Return the sums over the tokens of all ranks, the same bits on every rank."""
        return self.all_gather(sums).sum(dim=0)


@dataclass(frozen=True)
class Problem:
    """What a call asks for, checked: a loss with its gradients, or log-probs where ``loss`` is None."""

    hidden: Tensor  # (R, H)
    head: Head
    packed: PackedTokens
    compute_dtype: torch.dtype  # dtype of the GEMM operands
    needs_grad: NeedsGrad
    stats: tuple[str, ...] = ()
    loss: SequenceLoss | None = None  # None means that the log-probs are the result
    reference: CachedReference | CachedTokenReference | ScoredReference | None = None
    kl: bool = False  # the KL divergence from a scored reference is wanted: the logits of both heads lie side by side
    reduction: str = "mean"
    denominator: float | Tensor | None = None  # replaces the number of examples under "mean"
    token_denominator: float | Tensor | None = None  # replaces the number of chosen tokens in means over tokens
    main_grad: MainGrad | None = None
    sampling: Sampling | None = None  # gradients are those of a sample; None means the exact ones
    per_token: bool = False  # the log-probs are wanted by token and not by sequence
    shift: bool = False  # labels[t + 1] is predicted by hidden[t]
    stacked: bool = False  # all chosen sequences come first in the input; packed ones alternate
    static: bool = False  # the host never knows how many tokens are scored
    labels_shape: tuple[int, ...] = ()  # shape of the caller's labels
    shard: VocabShard | None = None  # the head is this rank's part of it; packed labels count from its first row
    context: ContextShard | None = None  # the tokens are this rank's part of the sequences
    gathered_bytes: tuple[int, int] = (0, 0)  # of this rank's part of hidden and ref_hidden that the call has gathered
    result_dtype: torch.dtype = torch.float32  # dtype of what the caller gets

    @property
    def known_divisor(self) -> float:
        """The number that the sum of the losses is divided by, or 1 where only a tensor holds it."""
        if self.reduction != "mean" or isinstance(self.denominator, Tensor):
            return 1.0
        assert self.loss is not None, "a mean is one over the examples of a loss"
        examples = len(self.loss.bounds(self.packed.counts.shape[0])) - 1
        return float(max(examples, 1) if self.denominator is None else self.denominator)

    @property
    def kl_grad(self) -> bool:
        """Whether the loss reads the KL divergence, which then gets a gradient."""
        return self.kl and self.loss is not None and self.loss.needs_kl

    @property
    def vocab_size(self) -> int:
        """The number of tokens of the whole vocabulary."""
        return self.head.vocab if self.shard is None else self.shard.total

    @property
    def total_counts(self) -> Tensor:
        """The scored tokens ``(S,)`` of each packed sequence, on all ranks that hold a part of it."""
        return self.packed.counts if self.context is None else self.context.counts

    @property
    def workload(self) -> "Workload":
        """The numbers and flags that the plan is made from."""
        packed, tracing = self.packed, traced(self.hidden)
        reference = self.reference if isinstance(self.reference, ScoredReference) else None
        return Workload(
            num_tokens=packed.capacity if tracing else packed.used,
            num_sequences=packed.counts.shape[0],
            vocab=self.head.vocab if self.shard is None else max(self.shard.largest, 1),
            width=self.hidden.shape[1],
            dtype=self.compute_dtype,
            device=self.hidden.device,
            needs_grad=self.needs_grad,
            loss=self.loss,
            scalar=self.reduction != "none",
            counts=None if tracing else packed.host_counts,
            static=self.static,
            tracing=tracing,
            fills_main_grad=self.main_grad is not None,
            sparse_weight_grad=self.sampling is not None and self.sampling.sparse_weight_grad,
            tau=None if self.sampling is None else self.sampling.tau,
            kl=self.kl,
            kl_grad=self.kl_grad,
            shard_ranks=0 if self.shard is None else self.shard.ranks,
            context_ranks=0 if self.context is None else self.context.ranks,
            most_counts=None if self.context is None else self.context.most,
            shared_capacity=None if self.context is None else self.context.capacity,
            stats=self.stats,
            reduces_hidden_grad=self.shard is not None and self.shard.reduce_hidden_grad is not None,
            per_token=self.per_token,
            gathered_bytes=self.gathered_bytes,
            reference=None if reference is None else self.of_reference(reference).workload,
            tiled=isinstance(self.head.weight, TiledWeight),
            sums_reference=isinstance(self.reference, CachedTokenReference),
        )

    def of_reference(self, reference: ScoredReference) -> "Problem":
        """Return the problem that asks for the log-probs of the same tokens under the reference."""
        return Problem(
            reference.hidden,
            reference.head,
            self.packed,
            reference.compute_dtype,
            NO_GRADIENTS,
            shift=self.shift,
            static=self.static,
            shard=self.shard,
            context=self.context,
        )


@dataclass(frozen=True)
class Workload:
    """The numbers and flags of a problem, without its tensors. A plan depends on nothing else."""

    num_tokens: int  # scored tokens, or the capacity where the host does not know how many are scored
    num_sequences: int
    vocab: int  # V
    width: int  # H
    dtype: torch.dtype  # dtype of the GEMM operands
    device: torch.device
    needs_grad: NeedsGrad
    loss: SequenceLoss | None = None  # None means that log-probs are the result, by sequence or by token
    scalar: bool = True  # the upstream gradient is one number
    counts: Sequence[int] | None = None  # scored tokens of each packed sequence; None where the host does not know them
    static: bool = False  # the host never learns the counts
    tracing: bool = False  # the call is inside torch.compile or torch.export
    fills_main_grad: bool = False  # the head's gradient is added to the caller's buffer
    sparse_weight_grad: bool = False  # that of the head's weight is a sparse tensor of the rows it reaches
    tau: float | None = None  # threshold of the sample that gradients are made of; None means exact ones
    kl: bool = False  # the logits of the reference lie beside those of the policy
    kl_grad: bool = False  # the KL divergence from the reference gets a gradient
    shard_ranks: int = (
        0  # ranks that the vocabulary is split over, 0 for a whole one; ``vocab`` is then the largest shard
    )
    context_ranks: int = 0  # ranks that the tokens of a sequence are split over, 0 for whole ones
    most_counts: Sequence[int] | None = None  # the largest counts of any of them, from which all make the same chunks
    shared_capacity: int | None = None  # the static number of tokens that all of them plan with, whatever their rows
    stats: tuple[str, ...] = ()
    reduces_hidden_grad: bool = False  # the shards' parts of the hidden states' gradient are added up in the call
    per_token: bool = False
    gathered_bytes: tuple[int, int] = (0, 0)
    schedules: dict[Any, Schedule] = field(init=False, default_factory=dict, compare=False, repr=False)  # by budget
    reference: "Workload | None" = None  # the workload of a reference that is scored in the call
    tiled: bool = False  # the head's weight comes in tiles
    sums_reference: bool = False  # log-probs of the reference's tokens are added up in the call

    @property
    def narrow(self) -> bool:
        """Whether tiles may hold logits in 16 bits.

        Divergences and the maxima of other shards need the logits, and a head in tiles has GEMMs of its own.
        """
        return not (self.kl or self.shard_ranks or self.tiled)

    @property
    def samples(self) -> bool:
        """Whether gradients are those of a sample of the logits' gradient."""
        return self.tau is not None

    @property
    def shared_counts(self) -> Sequence[int] | None:
        """The counts that chunks are made from, the same on every rank that sequences are split over."""
        return self.counts if self.most_counts is None else self.most_counts

    @property
    def shared_tokens(self) -> int:
        """The number of tokens that a schedule with a loss is made for, the same on those ranks."""
        if self.most_counts is not None:
            return sum(self.most_counts)
        return self.num_tokens if self.shared_capacity is None else self.shared_capacity

    @property
    def backward_gemms(self) -> int:
        """The number of GEMM passes that form gradients, of the hidden states and of the weight."""
        return int(self.needs_grad.hidden) + int(self.needs_grad.weight)
