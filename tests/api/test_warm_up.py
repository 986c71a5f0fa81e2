"""A warm-up runs what a training's step runs and leaves nothing behind; all ranks take the first one's launches."""

from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dpo_kernels as dk
from dpo_kernels.api import warm_up as module
from dpo_kernels.kernel_interface import RowKernels
from tests.distributed import gloo

V, H = 50, 8


def head(trainable=True, dtype=torch.float32):
    return torch.randn(V, H, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_(trainable)


@pytest.mark.parametrize(
    ("trainable", "options", "strategy", "gemms"),
    [
        (True, {}, "chunked", 3),
        (False, {}, "frozen_head", 2),
        (True, {"strategy": "streaming"}, "streaming", 4),
        (True, {"reduction": "none", "stats": ("entropy",), "shift": True, "bias": torch.zeros(V)}, "recompute", 4),
    ],
)
def test_a_warm_up_is_a_step(trainable, options, strategy, gemms):
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        plan = dk.warm_up(head(trainable), rows=300, backend="torch", **options)
    assert (plan.strategy, plan.backend, plan.gemms) == (strategy, "torch", gemms)
    rows = 4 * (module.LENGTH - 1 if options.get("shift") else module.LENGTH)  # whole pairs
    assert plan.workload.num_tokens == rows
    assert flops.get_total_flops() == gemms * 2 * rows * H * V


def test_a_reference_that_is_scored_is_warmed_up_too():
    with FlopCounterMode(display=False) as flops:
        plan = dk.warm_up(head(), rows=256, ref_weight=torch.randn(V, 2 * H), backend="torch")
    assert plan.reference_gemms == 1
    assert flops.get_total_flops() == (3 + 2) * 2 * 256 * H * V
    assert dk.warm_up(head(), rows=256).reference is None


@pytest.mark.parametrize("loss_type", dk.LOSSES)
def test_every_loss_can_be_warmed_up(loss_type):
    for none in ({}, {"ref_hidden": None, "ref_weight": None}):
        assert dk.warm_up(head(), rows=1, loss_type=loss_type, **none).workload.num_tokens == 2 * module.LENGTH


def test_a_warm_up_leaves_nothing_behind():
    weight, bias = head(), torch.zeros(V, requires_grad=True)
    before, state = weight.detach().clone(), torch.get_rng_state()
    dk.warm_up(weight, rows=256, bias=bias)
    assert weight.grad is None
    assert bias.grad is None
    assert weight._version == bias._version == 0
    assert torch.equal(weight, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_dtype_of_hidden_states_may_be_that_of_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        plan = dk.warm_up(head(), rows=256, dtype=torch.bfloat16)
    assert plan.workload.dtype == torch.bfloat16
    assert dk.warm_up(head(dtype=torch.float64), rows=256).workload.dtype == torch.float64


BATCH = {
    "cu_seqlens": torch.tensor([0, 3, 10], dtype=torch.int32),
    "token_weights": torch.rand(10, dtype=torch.float64),
    "ref_hidden": torch.randn(10, 2 * H),
    "pair_weights": torch.ones(1),
}


def test_tensors_of_a_batch_stand_for_those_of_the_call(monkeypatch):
    """Packed input and weights of tokens have kernels of their own, so the call is packed and weighted as the batch."""
    seen = {}
    real = module.fused_dpo_loss
    monkeypatch.setattr(
        module, "fused_dpo_loss", lambda *given, **options: seen.update(options) or real(*given, **options)
    )
    dk.warm_up(head(), rows=700, ref_weight=torch.randn(V, 2 * H), backend="torch", **BATCH)
    assert seen["cu_seqlens"].tolist() == list(range(0, 769, module.LENGTH))
    assert {name: seen[name].dtype for name in BATCH} == {name: value.dtype for name, value in BATCH.items()}
    assert seen["token_weights"].shape == (768,)
    assert seen["ref_hidden"].shape == (768, 2 * H)
    assert seen["pair_weights"].shape == (3,)
    seen.clear()
    dk.warm_up(
        head(),
        rows=256,
        ref_logps=torch.zeros(8),
        loss_type="odpo",
        margin=torch.zeros(4),
        beta=0.1,
    )
    assert (seen["ref_logps"].shape, seen["margin"].shape) == ((2,), (1,))
    assert "reference_free" not in seen
    for packed in ({}, {"cu_seqlens": torch.tensor([0, 4, 8])}):
        seen.clear()
        dk.warm_up(head(), rows=256, ref_token_logps=torch.zeros(8), **packed)
        assert seen["ref_token_logps"].shape == ((256,) if packed else (2, 128))
        assert "reference_free" not in seen


@pytest.mark.parametrize("name", module.NOT_FOR_WARM_UP)
def test_what_belongs_to_other_ranks_or_stays_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}: not for a warm-up"):
        dk.warm_up(head(), **{name: None})


@pytest.mark.parametrize("rows", [0, -1])
def test_rows_are_at_least_one(rows):
    with pytest.raises(ValueError, match="rows must be at least 1"):
        dk.warm_up(head(), rows=rows)


def inference(*size, trainable=True):
    with torch.inference_mode():
        return torch.ones(size, requires_grad=trainable)


WRONG = {
    "a module": (torch.nn.Linear(H, V), TypeError, "must be a tensor, got Linear"),
    "a string": ("lm_head", TypeError, "must be a tensor, got str"),
    "one dimension": (torch.zeros(4), ValueError, r"must have shape \(V, H\)"),
    "no rows": (torch.empty(0, H), ValueError, r"must have shape \(V, H\)"),
    "no columns": (torch.empty(V, 0), ValueError, r"must have shape \(V, H\)"),
    "integers": (torch.zeros(V, H, dtype=torch.int32), TypeError, "must be float32"),
    "meta": (torch.empty(V, H, device="meta"), ValueError, "has no values"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", ["weight", "ref_weight"])
def test_a_weight_that_is_none_is_named(kind, name):
    value, error, text = WRONG[kind]
    with pytest.raises(error, match=f"^{name} {text}"):
        dk.warm_up(**{"weight": head(), name: value}, rows=1)


OPTIONS = [
    ({"labels": torch.zeros(2)}, ValueError, "labels: not for a warm-up, which makes its own"),
    ({"hidden": None, "labels": None}, ValueError, "hidden, labels: not for a warm-up, which makes its own"),
    ({"bias": "x"}, TypeError, "bias must be a tensor, got str"),
    ({"bias": inference(V)}, ValueError, "bias requires a gradient but was made under torch.inference_mode"),
    ({"weight": inference(V, H)}, ValueError, "weight requires a gradient but was made under torch.inference_mode"),
    ({"ref_bias": torch.empty(V, device="meta")}, ValueError, "ref_bias has no values"),
    ({"ref_hidden": torch.zeros(2, 3, H, dtype=torch.int64)}, TypeError, "ref_hidden must be float32"),
    ({"dtype": torch.int32}, TypeError, "dtype must be torch.float32"),
    ({"dtype": "bfloat16"}, TypeError, "dtype must be torch.float32"),
    ({"rows": None}, TypeError, "rows must be an integer"),
    ({"rows": 2.0}, TypeError, "rows must be an integer"),
]


@pytest.mark.parametrize(("options", "error", "text"), OPTIONS, ids=[text for *_, text in OPTIONS])
def test_an_option_that_is_wrong_is_named(options, error, text):
    with pytest.raises(error, match=f"^{text}"):
        dk.warm_up(**{"weight": head(), "rows": 1} | options)


def test_inference_mode_does_not_reach_a_warm_up():
    weight, bias, weights = head(), torch.zeros(V, requires_grad=True), torch.ones(2, 3)
    with torch.inference_mode():
        assert dk.warm_up(weight, rows=256, bias=bias, token_weights=weights).strategy == "chunked"
        assert torch.is_inference_mode_enabled()
    assert weight.grad is None


def test_a_head_that_needs_no_gradient_may_be_made_under_inference_mode():
    frozen = {"weight": inference(V, H, trainable=False), "bias": inference(V, trainable=False)}
    assert dk.warm_up(**frozen, rows=256).strategy == "frozen_head"
    reference = {"ref_weight": inference(V, H), "ref_bias": inference(V)}
    assert dk.warm_up(head(), rows=256, **reference).strategy == "chunked"


def test_a_backend_without_launches_has_no_choices():
    assert RowKernels.chosen_launches() is None
    RowKernels.take_launches(None)
    with pytest.raises(AssertionError):
        RowKernels.take_launches({})


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    pytest.importorskip("triton")
    with patch.dict("os.environ", {"TRITON_INTERPRET": "1", "DPO_KERNELS_AUTOTUNE": "1"}):
        folder = tmp_path_factory.mktemp("ranks")
        return gloo.run("warmed", 2, folder, str(folder), module="warming")


def test_ranks_take_the_first_ones_choices(ranks):
    """Each rank has a folder of its own, and a clock that prefers another launch."""
    first, second = ranks
    assert first["alone"] != second["alone"]
    assert first["together"] == second["together"] == first["alone"]
    assert first["timed"] > 0
    assert second["timed"] == 0
    assert first["stay"]  # or a rank with a large batch would choose by itself
    assert second["stay"]
    assert first["bits"] == second["bits"]


def test_a_first_rank_that_fails_leaves_nobody_waiting(ranks):
    first, second = (each["error"] for each in ranks)
    assert first == "ValueError: of this rank alone"
    assert second == "RuntimeError: the first rank has raised an error in its warm-up"
