"""TRL's options in the words of the fused loss, one by one: what a trainer passes on, and what it leaves alone."""

from types import SimpleNamespace

import pytest

pytest.importorskip("trl", reason="trl is not installed")

from dpo_kernels.integrations.trl import options


def trainer(**given):
    """As much of a ``DPOTrainer`` as its options are read from, with TRL's defaults."""
    facts = {
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "beta": 0.1,
        "label_smoothing": 0.0,
        "ld_alpha": None,
        "use_weighting": False,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "args": SimpleNamespace(discopop_tau=0.07),
    }
    return SimpleNamespace(**facts | given)


PLAIN = {"beta": 0.1, "loss_type": "sigmoid"}
WORDS = {
    "nothing": ({}, PLAIN),
    "beta": ({"beta": 0.3}, PLAIN | {"beta": 0.3}),
    "a weight": ({"loss_weights": [0.7]}, PLAIN | {"loss_type": ("sigmoid",), "loss_weights": [0.7]}),
    "a mix": (
        {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        PLAIN | {"loss_type": ("sigmoid", "sft"), "loss_weights": [1.0, 0.5]},
    ),
    "a name twice": (
        {"loss_types": ["hinge", "ipo", "hinge"], "loss_weights": [0.25, 2.0, 0.5]},
        PLAIN | {"loss_type": ("hinge", "ipo"), "loss_weights": [0.75, 2.0]},
    ),
    "label_smoothing": ({"label_smoothing": 0.2}, PLAIN | {"label_smoothing": 0.2}),
    "discopop_tau": ({"loss_types": ["discopop"]}, PLAIN | {"loss_type": "discopop", "discopop_tau": 0.07}),
    "js": ({"f_divergence_type": "js_divergence"}, PLAIN | {"f_divergence": "js"}),
    "forward_kl": ({"f_divergence_type": "forward_kl"}, PLAIN | {"f_divergence": "forward_kl"}),
    "alpha": (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        PLAIN | {"f_divergence": "alpha", "f_alpha": 0.3},
    ),
    "sft, which has nothing to diverge from": (
        {"loss_types": ["sft"], "f_divergence_type": "js_divergence"},
        PLAIN | {"loss_type": "sft"},
    ),
}


@pytest.mark.parametrize("name", WORDS)
def test_words_of_trl_and_ours(name):
    given, expected = WORDS[name]
    found = options.loss_options(trainer(**given))
    assert found.arguments == expected
    assert found.needs_reference == ("sft" not in expected["loss_type"] or len(expected["loss_type"]) == 2)
