"""Batches of TRL's collator as the fused functions take them: padded, or packed without padding."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_kernels import ld_token_weights
from dpo_kernels.integrations.head_check import evaluating

IGNORED = -100  # TRL's label of positions that are not scored
# The largest difference between hidden states with and without padding, relative to the largest hidden state. Different
# attention kernels compute the two, in 16 bits where the model has 16 bits.
PACKING_TOLERANCE = 5e-2
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
COLLATED = ("input_ids", "attention_mask", "completion_mask")
NOT_FOR_THE_MODEL = ("completion_mask", *REFERENCE)


@dataclass(frozen=True)
class PairBatch:
    """A batch of pairs, all chosen sequences first.

    Attributes:
        inputs: what the model takes, ``(2B, T)`` if padded and ``(1, N)`` if packed.
        labels: int64 ``(2B, T)`` or ``(N,)``, not shifted, -100 where not scored.
        token_weights: float32 in the shape of ``labels``, or None.
        cu_seqlens: int32 ``(2B + 1,)`` if packed, else None.
        tokens: int64 ``()``, the number of tokens without padding. Those of the prompts count.

    Example:
        >>> labels = torch.tensor([[-100, 6, 7], [-100, 8, -100]])
        >>> batch = PairBatch({"input_ids": labels.clamp(min=0)}, labels, None, None, torch.tensor(5))
        >>> batch.arguments(torch.zeros(2, 3, 4))[1]
        {'shift': True}

    """

    inputs: dict[str, Any]
    labels: Tensor
    token_weights: Tensor | None
    cu_seqlens: Tensor | None
    tokens: Tensor

    def arguments(self, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Bring hidden states into the layout of the labels.

        Args:
            hidden: ``(2B, T, H)`` if padded, ``(1, N, H)`` if packed.

        Returns:
            The hidden states, ``(2B, T, H)`` or ``(N, H)``, and the keyword arguments that tell a fused function about
            the layout.

        Example:
            >>> batch = PairBatch({}, torch.zeros(6), None, torch.tensor([0, 2, 6]), torch.tensor(6))
            >>> hidden, layout = batch.arguments(torch.zeros(1, 6, 4))
            >>> hidden.shape, layout
            (torch.Size([6, 4]), {'cu_seqlens': tensor([0, 2, 6]), 'shift': True})

        """
        if self.cu_seqlens is not None:
            hidden = hidden.squeeze(0)
            return hidden, {"cu_seqlens": self.cu_seqlens.to(hidden.device), "shift": True}
        return hidden, {"shift": True}

    def weights(self, device: torch.device) -> dict[str, Any]:
        """Give ``token_weights`` as a keyword argument on a device.

        Args:
            device: where the hidden states are.

        Returns:
            ``{"token_weights": ...}`` in the shape of ``labels``, or an empty dictionary where there are none.

        Example:
            >>> PairBatch({}, torch.zeros(2, 3), None, None, torch.tensor(6)).weights(torch.device("cpu"))
            {}

        """
        return {} if self.token_weights is None else {"token_weights": self.token_weights.to(device)}


def pair_batch(inputs: dict[str, Any], ld_alpha: float | None, padding_free: bool) -> PairBatch:
    """Make a ``PairBatch`` of what TRL's collator gives.

    Args:
        inputs: ``input_ids``, ``attention_mask`` and ``completion_mask``, int64 ``(2B, T)`` each, all chosen sequences
            first. Other entries are handed on to the model, except reference log-probs.
        ld_alpha: weight in [0, 1] of the tokens by which a completion is longer than the other one of its pair (LD-DPO,
            Liu et al., arXiv 2409.06411), or None for no weights.
        padding_free: lay the sequences end to end, without padding. Positions then start at 0 in each sequence.

    Returns:
        The batch. Its tensors are on the device of ``inputs``.

    Raises:
        ValueError: an entry is missing, or ``padding_free`` meets model inputs that cannot be packed.

    Example:
        >>> ids = torch.tensor([[5, 6, 7], [5, 8, 0]])  # a chosen and a rejected sequence; 0 is padding
        >>> mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        >>> completion = torch.tensor([[0, 1, 1], [0, 1, 0]])
        >>> collated = {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}
        >>> pair_batch(collated, None, False).labels
        tensor([[-100,    6,    7],
                [-100,    8, -100]])
        >>> pair_batch(collated, 0.5, True).token_weights
        tensor([1.0000, 1.0000, 0.5000, 1.0000, 1.0000])

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
    """Lay the sequences of a batch end to end, without padding.

    The model gets no ``attention_mask`` then. transformers keeps sequences apart by ``position_ids``, which start again
    at 0 in each of them.

    Args:
        inputs: ``input_ids`` and ``attention_mask``, ``(S, T)`` each, and flags of the model's forward.

    Returns:
        The model inputs, ``input_ids`` and ``position_ids`` ``(1, N)``, and ``cu_seqlens``, int32 ``(S + 1,)``.

    Raises:
        ValueError: there is an input that cannot be laid end to end.

    Example:
        >>> inputs, cu_seqlens = packed({
        ...     "input_ids": torch.tensor([[5, 6, 7], [5, 8, 0]]),
        ...     "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        ... })
        >>> inputs["input_ids"], inputs["position_ids"]
        (tensor([[5, 6, 7, 5, 8]]), tensor([[0, 1, 2, 0, 1]]))
        >>> cu_seqlens
        tensor([0, 3, 5], dtype=torch.int32)

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
def check_packing(
    model: Any,
    inputs: dict[str, Tensor],
    hidden_states: Callable[[dict[str, Any]], Tensor],
    gather: Callable[[Tensor], Tensor] = lambda mine: mine,
) -> None:
    """Check that a model keeps packed sequences apart.

    If it does, the hidden states of the second sequence do not change with the tokens of the first. They also are
    what they are with padding. All ranks must call this together, and they raise together.

    Args:
        model: the causal model. It is put into evaluation mode meanwhile.
        inputs: ``input_ids`` and ``attention_mask`` of two sequences, int64 ``(2, T)`` each.
        hidden_states: gives the model's hidden states ``(B, T, H)`` for its inputs.
        gather: puts the numbers ``(2,)`` of all ranks one after the other. The default is for one process.

    Raises:
        RuntimeError: the model lets packed sequences see each other. The message says by how much.

    Example::

        head = fused_lm_head(model)
        check_packing(model, {"input_ids": ids[:2], "attention_mask": mask[:2]}, lambda few: head(**few).hidden)

    """
    config, second = model.config.get_text_config(), int(inputs["attention_mask"][0].sum())
    others = inputs["input_ids"].clone()
    others[0] = (others[0] + 1) % config.vocab_size
    with evaluating(model):
        padded = hidden_states(inputs)[inputs["attention_mask"].bool()]
        plain, changed = (
            hidden_states(packed({**inputs, "input_ids": ids})[0])[0] for ids in (inputs["input_ids"], others)
        )
    largest = padded.abs().amax().clamp(min=1e-6)
    differences = torch.stack([(plain - changed)[second:].abs().amax(), (plain - padded).abs().amax()]) / largest
    leak, error = gather(differences).view(-1, 2).amax(dim=0).tolist()
    # Experts compute the tokens of all sequences together, so that other tokens may change the last digits.
    if leak <= (2e-2 if hasattr(config, "num_experts_per_tok") else 1e-6) and error <= PACKING_TOLERANCE:
        return
    raise RuntimeError(
        f"padding_free=True: {type(model).__name__} does not keep packed sequences apart (one changes the other's "
        f"hidden states by {leak:.1e}; they differ from those with padding by {error:.1e}): use padding_free=False"
    )
