"""What TRL's collator hands over, as the fused functions take it: padded, or packed without padding."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import ld_token_weights
from dpo_kernels.integrations.head_check import evaluating
from dpo_kernels.integrations.transformers import FusedLMHead

IGNORED = -100
PACKING_TOLERANCE = 5e-2  # hidden states with and without padding, in 16 bits by different attention kernels
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
COLLATED = ("input_ids", "attention_mask", "completion_mask")
NOT_FOR_THE_MODEL = ("completion_mask", *REFERENCE)


@dataclass(frozen=True)
class PairBatch:
    """A batch of pairs, all chosen sequences first.

    Attributes:
        inputs: what the model takes: ``(2B, T)`` padded, ``(1, N)`` packed.
        labels: ``(2B, T)`` or ``(N,)``, not shifted, -100 where not scored.
        token_weights: like ``labels``, or None.
        cu_seqlens: ``(2B + 1,)`` where packed, else None.
        tokens: ``()``, real tokens, the prompts' included.

    """

    inputs: dict[str, Any]
    labels: Tensor
    token_weights: Tensor | None
    cu_seqlens: Tensor | None
    tokens: Tensor

    def arguments(self, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The hidden states in the layout of the labels, and the keyword arguments of that layout."""
        if self.cu_seqlens is not None:
            hidden = hidden.squeeze(0)
            return hidden, {"cu_seqlens": self.cu_seqlens.to(hidden.device), "shift": True}
        return hidden, {"shift": True}

    def weights(self, device: torch.device) -> dict[str, Any]:
        """``token_weights`` as a keyword argument, where there are any."""
        return {} if self.token_weights is None else {"token_weights": self.token_weights.to(device)}


def pair_batch(inputs: dict[str, Any], ld_alpha: float | None, padding_free: bool) -> PairBatch:
    """The batch of TRL's collator: ``input_ids``, ``attention_mask`` and ``completion_mask``, ``(2B, T)`` each.

    ``ld_alpha`` weighs the tokens of the longer completion beyond the length of the shorter one (LD-DPO, Liu et al.,
    arXiv 2409.06411); with ``padding_free`` the sequences stand end to end, their positions counted from 0 each.
    """
    if missing := [name for name in COLLATED if name not in inputs]:
        raise ValueError(
            f"the data collator gives no {', '.join(missing)}: the fused loss takes batches as those of TRL's "
            "DataCollatorForPreference, all chosen sequences first"
        )
    model_inputs = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
    weights = None if ld_alpha is None else ld_token_weights(labels, ld_alpha, shift=True)
    mask = inputs["attention_mask"]
    if not padding_free:
        return PairBatch(model_inputs, labels, weights, None, mask.sum())
    model_inputs, cu_seqlens = packed(model_inputs)
    kept = mask.bool()
    return PairBatch(
        model_inputs, labels[kept], None if weights is None else weights[kept], cu_seqlens, cu_seqlens[-1].long()
    )


def packed(inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """Model inputs without padding, ``(1, N)``, and their ``cu_seqlens``.

    Attention keeps sequences apart by ``position_ids``, which start again at 0, as transformers has it wherever no
    ``attention_mask`` is given. Raises ``ValueError`` for inputs that cannot be laid end to end.
    """
    unknown = set(inputs) - {"input_ids", "attention_mask", "use_cache", "output_router_logits"}
    if unknown:
        raise ValueError(f"padding_free=True cannot pack the model inputs {', '.join(sorted(unknown))}")
    kept = inputs["attention_mask"].bool()
    lengths = kept.sum(dim=1)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    positions = kept.long().cumsum(dim=1) - 1
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    return {"input_ids": inputs["input_ids"][kept][None], "position_ids": positions[kept][None], **rest}, cu_seqlens


@torch.no_grad()
def check_packing(head: FusedLMHead, inputs: dict[str, Tensor]) -> None:
    """Raise ``RuntimeError`` for a model that lets packed sequences see each other.

    ``inputs`` are ``input_ids`` and ``attention_mask`` of two sequences, ``(2, T)``. Packed, the second's hidden states
    must not change with the first's tokens, and they must be what they are with padding.
    """
    config, second = head.model.config.get_text_config(), int(inputs["attention_mask"][0].sum())
    others = inputs["input_ids"].clone()
    others[0] = (others[0] + 1) % config.vocab_size
    with evaluating(head.model):
        padded = head(**inputs).hidden[inputs["attention_mask"].bool()]
        plain, changed = (
            head(**packed({**inputs, "input_ids": ids})[0]).hidden[0] for ids in (inputs["input_ids"], others)
        )
    largest = padded.abs().amax().clamp(min=1e-6)
    leak = float((plain - changed)[second:].abs().amax() / largest)
    error = float((plain - padded).abs().amax() / largest)
    # Experts are computed together, so that other tokens may change the last digits.
    if leak <= (2e-2 if hasattr(config, "num_experts_per_tok") else 1e-6) and error <= PACKING_TOLERANCE:
        return
    raise RuntimeError(
        f"padding_free=True: {type(head.model).__name__} does not keep packed sequences apart (one changes the other's "
        f"hidden states by {leak:.1e}; they differ from those with padding by {error:.1e}): use padding_free=False"
    )
