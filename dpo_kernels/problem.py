"""What is to be computed: one frozen object, checked and packed, made in ``inputs/make_problem.py``."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_kernels.loss_interface import SequenceLoss
from dpo_kernels.shapes import Head, NeedsGrad, PackedTokens

TRACED_TENSORS = ("FakeTensor", "FunctionalTensor")
NO_GRADIENTS = NeedsGrad(hidden=False, weight=False, bias=False)


def traced(tensor: Tensor) -> bool:
    """Whether a tracer or fake tensors are at work, so that only operators of the dispatcher may run."""
    fake = tensor.is_meta or type(tensor).__name__ in TRACED_TENSORS
    return fake or torch.compiler.is_compiling()


@dataclass(frozen=True)
class CachedReference:
    """Log-probs of the reference that the caller has kept."""

    logps: Tensor  # (S,) in the order of the packed sequences


@dataclass(frozen=True)
class ScoredReference:
    """A reference model whose log-probs are computed in the call, without gradients."""

    hidden: Tensor  # (R, H_ref)
    head: Head
    compute_dtype: torch.dtype


@dataclass(frozen=True)
class MainGrad:
    """The buffer of the caller's that the gradient of the head is added to."""

    buffer: Tensor  # (V, H) in the dtype of accumulation
    scale: float  # the upstream gradient that the loss will get


@dataclass(frozen=True)
class Problem:
    """Log-probs of packed tokens under a head or, with a ``loss``, its value and gradients."""

    hidden: Tensor  # (R, H)
    head: Head
    packed: PackedTokens
    compute_dtype: torch.dtype  # of the GEMM operands
    needs_grad: NeedsGrad
    stats: tuple[str, ...] = ()
    loss: SequenceLoss | None = None  # None: the log-probs are the result
    reference: CachedReference | ScoredReference | None = None
    reduction: str = "mean"
    denominator: float | Tensor | None = None  # replaces the number of examples under "mean"
    main_grad: MainGrad | None = None
    per_token: bool = False  # log-probs by token instead of by sequence
    shift: bool = False  # labels[t + 1] is predicted by hidden[t]
    stacked: bool = False  # the input has all chosen sequences first; packed ones alternate
    static: bool = False  # the host never knows how many tokens are scored
    labels_shape: tuple[int, ...] = ()
    result_dtype: torch.dtype = torch.float32

    @property
    def workload(self) -> "Workload":
        """The facts that the plan is made from."""
        packed, tracing = self.packed, traced(self.hidden)
        reference = self.reference if isinstance(self.reference, ScoredReference) else None
        return Workload(
            num_tokens=packed.capacity if tracing else packed.used,
            num_sequences=packed.counts.shape[0],
            vocab=self.head.vocab,
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
            reference=None if reference is None else self.of_reference(reference).workload,
        )

    def of_reference(self, reference: ScoredReference) -> "Problem":
        """The log-probs of the same tokens under the reference."""
        return Problem(
            reference.hidden,
            reference.head,
            self.packed,
            reference.compute_dtype,
            NO_GRADIENTS,
            shift=self.shift,
            static=self.static,
        )


@dataclass(frozen=True)
class Workload:
    """What a plan depends on: numbers and flags of a problem, no tensor of its own."""

    num_tokens: int  # scored tokens, or the capacity where they are not known
    num_sequences: int
    vocab: int
    width: int  # H
    dtype: torch.dtype  # of the GEMM operands
    device: torch.device
    needs_grad: NeedsGrad
    loss: SequenceLoss | None = None  # None: log-probs are asked for, by sequence or token
    scalar: bool = True  # the upstream gradient is one number
    counts: Sequence[int] | None = None  # scored tokens by packed sequence; None where the host does not know them
    static: bool = False  # the host never knows them
    tracing: bool = False  # inside torch.compile or torch.export
    fills_main_grad: bool = False  # the head's gradient is added to a buffer of the caller's
    reference: "Workload | None" = None  # of a reference that is scored in the call

    @property
    def backward_gemms(self) -> int:
        """GEMM passes of the backward pass proper."""
        return int(self.needs_grad.hidden) + int(self.needs_grad.weight)
