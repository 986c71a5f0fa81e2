"""A comparison of precomputed reference log-probs with those of a reference that is at hand."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpo_kernels.integrations.trl.batch import REFERENCE

# At most this many pairs are compared, so that the reference's extra forward is a small one.
CHECKED_PAIRS = 2
# The allowed difference of a sequence's log-prob is REFERENCE_NATS plus REFERENCE_SHARE of the reference's value. In 16
# bits each token's log-prob changes by some 0.1 nats with padding and with the attention kernel. Over a long completion
# these changes add up to less than a hundredth of the sum.
REFERENCE_NATS, REFERENCE_SHARE = 1.0, 0.01
REMEDY = (
    "(other weights, token ids or max_length): leave the columns out to have them computed, or set "
    "trainer.check_reference = False if another reference is meant"
)
OTHERS_DIFFER = f"on another rank {' or '.join(REFERENCE)} is not what the reference gives {REMEDY}"


def pairs_to_check(inputs: dict[str, Any]) -> list[int]:
    """Choose the first pairs that have a scored token.

    Args:
        inputs: a batch of TRL's collator; only ``completion_mask`` ``(2B, T)`` is read, all chosen sequences first.

    Returns:
        Numbers of at most ``CHECKED_PAIRS`` pairs. The list is empty where no token is scored.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[0, 0, 0], [0, 1, 1], [0, 0, 0], [0, 0, 1]])
        >>> pairs_to_check({"completion_mask": mask})
        [1]

    """
    sides = inputs["completion_mask"][:, 1:].any(dim=1).view(2, -1)
    pairs: list[int] = sides.any(dim=0).nonzero()[:CHECKED_PAIRS, 0].tolist()
    return pairs


def check_reference(
    inputs: dict[str, Any],
    precomputed: Tensor,
    score: Callable[[dict[str, Any]], Tensor],
    gather: Callable[[Tensor], Tensor] = lambda mine: mine,
) -> bool:
    """Compare precomputed log-probs of a few pairs with what a reference gives for them now.

    All ranks score, or none does: an engine that shards the reference needs every rank. They also raise together.

    Args:
        inputs: a batch of TRL's collator, ``(2B, T)`` each, all chosen sequences first.
        precomputed: log-probs ``(2B,)`` in the same order.
        score: gives the reference's log-probs ``(2P,)`` of a batch that holds only P of the pairs.
        gather: puts the rows ``(1, 2)`` of all ranks one below the other. The default is for one process.

    Returns:
        False where a rank has no scored token. Any reference would agree there, so that a later batch must be compared.

    Raises:
        ValueError: a log-prob of any rank differs by more than rounding can explain. The message names the side and
            both values, or says that it was another rank.

    Example:
        >>> import torch
        >>> batch = {"completion_mask": torch.ones(2, 3)}
        >>> given = torch.tensor([-20.0, -21.0])
        >>> check_reference(batch, given, lambda few: torch.tensor([-20.5, -21.0]))
        True
        >>> check_reference(batch, given, lambda few: torch.tensor([-29.0, -21.0]))
        Traceback (most recent call last):
        ...
        ValueError: ref_chosen_logps is -20.00 for one of the first pairs, but the reference gives -29.00 ...

    """

    def of_all_ranks(value: bool) -> list[bool]:
        gathered: list[bool] = gather(torch.tensor([value], device=precomputed.device)).tolist()
        return gathered

    pairs = pairs_to_check(inputs)
    ready = of_all_ranks(bool(pairs))
    if not any(ready):
        return False
    difference = _difference(inputs, precomputed, pairs or [0], score)
    wrong = of_all_ranks(bool(pairs and difference))
    if any(wrong):
        raise ValueError(difference if pairs and difference else OTHERS_DIFFER)
    return all(ready)


def _difference(
    inputs: dict[str, Any], precomputed: Tensor, pairs: list[int], score: Callable[[dict[str, Any]], Tensor]
) -> str:
    """Say in words which log-prob of these pairs is clearly not the reference's, or nothing where all are."""
    few = [*pairs, *(pair + len(precomputed) // 2 for pair in pairs)]
    expected = score({name: value[few] for name, value in inputs.items() if name not in REFERENCE})
    given = precomputed[few].to(expected)
    excess = (given - expected).abs() - REFERENCE_SHARE * expected.abs() - REFERENCE_NATS
    if bool((excess <= 0).all()):
        return ""
    worst = int(excess.argmax())
    side = REFERENCE[worst // (len(few) // 2)]
    return (
        f"{side} is {given[worst]:.2f} for one of the first pairs, but the reference gives {expected[worst]:.2f} "
        f"{REMEDY}"
    )
