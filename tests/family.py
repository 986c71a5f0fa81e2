"""The rows of the family of losses as cases of the whole step, and two callables."""

import torch

from tests.cases import Case
from tests.hand_worked import OPTIONS, parts_of, referenced

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def coupled(x):
    """Depends on the mean margin of the batch, so no pair stands alone."""
    margin = x.beta * ((x.policy_chosen_logps - x.ref_chosen_logps) - (x.policy_rejected_logps - x.ref_rejected_logps))
    return -torch.nn.functional.logsigmoid(margin - margin.mean() + margin.tanh())


def one_sided(x):
    """Has different coefficients on the two sides."""
    chosen, rejected = (
        x.policy_chosen_logps - x.ref_chosen_logps,
        x.policy_rejected_logps - x.ref_rejected_logps,
    )
    return -torch.nn.functional.logsigmoid(x.beta * chosen) + 0.25 * (x.beta * rejected).square()


one_sided.separable = True  # type: ignore[attr-defined]

LOSSES = {
    "sigmoid": {},
    "cdpo": {"label_smoothing": 0.2},
    "ipo": {"loss_type": "ipo", "beta": 0.5},
    "hinge": {"loss_type": "hinge"},
    "separable callable": {"loss_type": one_sided},
}


# The rest of the family, as its rows have it, and what differs by pair.
ROWS = {name: options for name, options in OPTIONS.items() if name not in LOSSES}
FAMILY = {name: options for name, options in ROWS.items() if all(spec.separable for spec in parts_of(name))}
COUPLED = {name: options for name, options in ROWS.items() if name not in FAMILY}
FAMILY |= {
    "odpo, by pair": {"loss_type": "odpo", "margin": torch.tensor([0.5, -1.0, 2.0])},
    "rebel, by pair": {"loss_type": "rebel", "reward_gap": torch.tensor([0.5, 1.0, 2.0])},
    "weighted pairs": {"pair_weights": torch.tensor([0.5, 0.0, 2.0])},
    "token denominators": {"nll_weight": 0.2, "denominator": 5.0, "token_denominator": 40.0},
    "weighted mix": {
        "loss_type": ("sigmoid", "bco_pair", "sft"),
        "loss_weights": (0.8, 0.2, 1.0),
        "pair_weights": torch.tensor([1.0, 3.0, 0.1]),
    },
}


def case_of(loss, dtype, **facts):
    """A case for a row of the family; losses without a reference get none."""
    reference = "cached" if loss not in ROWS or referenced(loss) else "none"
    return Case(dtype, options={**LOSSES, **FAMILY, **COUPLED}[loss], reference=reference, weights=True, **facts)
