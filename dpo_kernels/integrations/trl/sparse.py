"""Sparse gradients of a trainer: the arguments of each call, whose seed is another one each time."""

from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from dpo_kernels import FusedDPOLoss, checks

CALLS = 2**40  # of a run, for each of which there is a seed


@dataclass(frozen=True)
class SparseGradients:
    """How a trainer's gradients are sampled, if they are.

    Attributes:
        gradient: ``"dense"`` for exact gradients, or ``"sparse"`` for those of a sample.
        tau: threshold of the sample, a number in (0, 1].
        seed: the seed of the run, an int, or None for the seed of the trainer's configuration.

    Raises:
        ValueError: the gradient is unknown, or tau is out of range.
        TypeError: the seed is no int.

    Example:
        >>> SparseGradients("sparse", 2**-12, 3).arguments(0, call=5)["seed"] == 3 * CALLS + 5
        True

    """

    gradient: str = "dense"
    tau: float = 2.0**-12
    seed: int | None = None

    def __post_init__(self) -> None:
        FusedDPOLoss(gradient=self.gradient, tau=self.tau)  # which checks them
        if self.seed is not None:
            checks.check_integer("seed", self.seed)

    @property
    def sampled(self) -> bool:
        """Whether gradients are those of a sample."""
        return self.gradient != "dense"

    def arguments(self, seed: int, call: int) -> dict[str, Any]:
        """Return the arguments of ``fused_dpo_loss`` for a call.

        Args:
            seed: the seed of the trainer's configuration.
            call: number of the call in the whole run, on all ranks, less than ``CALLS``.

        Returns:
            ``gradient``, ``tau`` and ``seed``, or nothing for exact gradients. Seeds are taken modulo 2^64.

        """
        if not self.sampled:
            return {}
        number = (seed if self.seed is None else self.seed) * CALLS + call
        return {"gradient": self.gradient, "tau": self.tau, "seed": (number + 2**63) % 2**64 - 2**63}


@dataclass
class Calls(TrainerCallback):
    """Counts the calls of a training run, so that a run that is resumed after a step goes on with the same numbers.

    It is a callback of the trainer: training that begins again, as ``auto_find_batch_size`` does after an error for
    lack of memory, counts the calls of its first step anew.

    Example:
        >>> calls = Calls()
        >>> [calls.next(step, micro_batches=2, rank=0, ranks=1) for step in (5, 5, 6)]
        [10, 11, 12]

    """

    step: int = -1
    within: int = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Forget the calls of a step that was not finished."""
        self.step = -1

    def next(self, step: int, micro_batches: int, rank: int, ranks: int) -> int:
        """Return the number of a call, another one for each rank and micro-batch.

        Args:
            step: number of the optimizer's step.
            micro_batches: most calls of a step on one rank.
            rank: this rank, less than ``ranks``.
            ranks: number of ranks.

        Raises:
            RuntimeError: the step makes more calls than ``micro_batches``. The numbers of the next step would follow.

        """
        self.within = self.within + 1 if step == self.step else 0
        self.step = step
        if self.within >= micro_batches:
            raise RuntimeError(
                f"gradient='sparse' has seeds for {micro_batches} calls of the loss in each step, as many as "
                f"gradient_accumulation_steps, and step {step} makes another: compute the loss once for each "
                "micro-batch, or take gradient='dense'"
            )
        return (step * micro_batches + self.within) * ranks + rank
