"""A preference loss for torchtitan: an object with ``set_lm_head``, in the place of ``ChunkedLossWrapper``.

torchtitan recognises such a loss by the class ``ChunkedLossWrapper``. It then skips the LM head in the model's forward,
and gives the loss the hidden states.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dpo_kernels import fused_dpo_loss
from dpo_kernels.integrations import head_operands
from dpo_kernels.integrations.requirements import require

require("torchtitan", "0.3", "dpo_kernels.integrations.torchtitan")

from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper  # noqa: E402


class FusedPreferenceLoss(ChunkedLossWrapper):
    """DPO or another loss of its family on torchtitan's hidden states. It works under FSDP2.

    The head's weight is read inside the head's own forward, where FSDP2 has gathered it.

    Args:
        config: a ``FusedPreferenceLoss.Config``.
        compile_config: torchtitan's. The loss runs eagerly whatever it says.

    Example::

        loss = FusedPreferenceLoss(FusedPreferenceLoss.Config(beta=0.1, pairs="stacked"))
        loss.set_lm_head(model.lm_head)
        value, metrics = loss(hidden, labels, ref_logps=ref_logps)

    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """What the loss is.

        Attributes:
            loss_type: a name of ``dpo_kernels.LOSSES``.
            beta: inverse temperature.
            label_smoothing: for the losses that have it.
            pairs: "stacked" or "interleaved".

        """

        loss_type: str = "sigmoid"
        beta: float = 0.1
        label_smoothing: float = 0.0
        pairs: str = "stacked"

    def __init__(self, config: Any, *, compile_config: Any = None) -> None:
        self.config = config
        self.lm_head: nn.Module | None = None

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of this rank's pairs.

        Args:
            pred: hidden states ``(2B, L, H)``.
            labels: int64 ``(2B, L)``, the token after each position, -100 where not scored.
            global_valid_tokens: the chosen tokens of all ranks and micro-batches, which losses by token are divided by.
            **loss_inputs: ``ref_logps`` ``(2B,)``. ``global_valid_pairs``, the pairs of all ranks and micro-batches,
                which the sum is divided by; without it this batch's own. ``positions`` are not read.

        Returns:
            The loss ``()``, and what is logged, each a mean ``()`` over this batch's pairs.

        Raises:
            ValueError: the head was not set, or as in ``fused_dpo_loss``.
            TypeError: an input is not known, or the head is split by tensor parallelism.

        """
        if self.lm_head is None:
            raise ValueError("set_lm_head(model.lm_head) must come before the first call")
        ref_logps, pairs = loss_inputs.pop("ref_logps", None), loss_inputs.pop("global_valid_pairs", None)
        loss_inputs.pop("positions", None)
        if loss_inputs:
            raise TypeError(f"FusedPreferenceLoss knows ref_logps and global_valid_pairs, not {', '.join(loss_inputs)}")
        config = self.config
        options: dict[str, Any] = {"ref_logps": ref_logps} if ref_logps is not None else {"reference_free": True}
        if config.label_smoothing:
            options["label_smoothing"] = config.label_smoothing

        def work(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            return fused_dpo_loss(
                hidden,
                weight,
                labels,
                bias=bias,
                loss_type=config.loss_type,
                beta=config.beta,
                pairs=config.pairs,
                denominator=pairs,
                token_denominator=global_valid_tokens,
                **options,
            )

        out = head_operands.inside(self.lm_head, pred, work)
        return out.loss, out.metrics(config.pairs)
