"""What a call costs: GEMM FLOPs as torch counts them, allocations as the dispatcher sees them, resident memory."""

import itertools
from types import SimpleNamespace

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels.planning import memory_budget
from tests.family import coupled
from tests.gemm_counts import Allocations, costs, measure

ROWS, HIDDEN, VOCAB = 64, 32, 2048  # per sequence
MIB = 2**20
SCRATCH = MIB // 2


def problem(trainable=True, prompt=0, hidden_grad=True, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, VOCAB, (8, ROWS), generator=g)
    labels[:, :prompt] = -100
    hidden = torch.randn(8, ROWS, HIDDEN, generator=g).to(dtype).requires_grad_(hidden_grad)
    weight = torch.randn(VOCAB, HIDDEN, generator=g).to(dtype).requires_grad_(trainable)
    return hidden, weight, labels


UNITS = [
    # strategy asked for, trainable head, hidden with gradient -> GEMM passes of 2 N H V
    ("chunked", True, True, 3),
    ("chunked", False, True, 2),
    ("chunked", True, False, 2),
    ("recompute", True, True, 4),
    ("recompute", False, True, 2),
    ("recompute", True, False, 3),
    ("streaming", True, True, 4),
    ("streaming", False, True, 3),
    ("streaming", True, False, 3),
    ("chunked", False, False, 1),
    ("recompute", False, False, 1),
    ("streaming", False, False, 1),
]


@pytest.mark.parametrize(("strategy", "trainable", "hidden_grad", "units"), UNITS)
@pytest.mark.parametrize("prompt", [0, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scratch", [SCRATCH, 48 * VOCAB * 4 * 2], ids=["whole pairs cut", "less"])
def test_units_and_largest_allocation(scratch, dtype, prompt, strategy, trainable, hidden_grad, units):
    hidden, weight, labels = problem(trainable, prompt, hidden_grad, dtype)
    options = {"reference_free": True, "strategy": strategy, "scratch_bytes": scratch}
    plan = dk.explain(hidden, weight, labels, **options)
    flops, (largest, shape) = costs(lambda: dk.fused_dpo_loss(hidden, weight, labels, **options).loss)
    scored = 8 * (ROWS - prompt)
    assert flops == units * 2 * scored * HIDDEN * VOCAB
    runs = strategy if trainable or strategy == "streaming" else "frozen_head"
    assert (plan.strategy, plan.gemms, plan.reference_gemms) == (runs, units, 0)
    assert largest <= scratch, shape
    assert scored * VOCAB * 4 > 2 * scratch  # the logits would not have fit


def test_no_grad_costs_one_unit_whatever_is_trainable():
    hidden, weight, labels = problem()
    with torch.no_grad():
        flops, _ = costs(lambda: dk.fused_dpo_loss(hidden, weight, labels, reference_free=True).loss)
        assert dk.explain(hidden, weight, labels, reference_free=True).units == 1
    assert flops == 2 * labels.numel() * HIDDEN * VOCAB


@pytest.mark.parametrize("trainable", [True, False])
def test_reference_costs_one_unit_of_its_own(trainable):
    hidden, weight, labels = problem(trainable)
    width = 48
    reference = {"ref_hidden": torch.randn(8, ROWS, width), "ref_weight": torch.randn(VOCAB, width)}
    flops, _ = costs(lambda: dk.fused_dpo_loss(hidden, weight, labels, **reference).loss)
    assert flops == 2 * labels.numel() * VOCAB * ((3 if trainable else 2) * HIDDEN + width)
    assert dk.explain(hidden, weight, labels, **reference).reference_units == 1


@pytest.mark.parametrize("loss_type", ["sigmoid", coupled], ids=["sigmoid", "coupled"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trainable", [True, False])
def test_what_explain_says_is_what_runs(trainable, reduction, loss_type):
    for prompt, stats in itertools.product((0, 30), ((), ("entropy",))):
        hidden, weight, labels = problem(trainable, prompt)
        options = {"reference_free": True, "loss_type": loss_type, "reduction": reduction, "stats": stats}
        plan = dk.explain(hidden, weight, labels, **options)
        flops, _ = costs(lambda: dk.fused_dpo_loss(hidden, weight, labels, **options).loss)  # noqa: B023
        assert flops == plan.units * 2 * 8 * (ROWS - prompt) * HIDDEN * VOCAB
    upstream_is_late = reduction == "none" or loss_type is coupled
    assert plan.units == (2 if not trainable else 4 if upstream_is_late else 3)
    assert plan.strategy == ("frozen_head" if not trainable else "recompute" if upstream_is_late else "chunked")


@pytest.mark.parametrize("function", [dk.fused_sequence_logps, dk.fused_token_logps])
@pytest.mark.parametrize(("trainable", "units"), [(True, 4), (False, 2)])
def test_log_prob_primitives(function, trainable, units):
    hidden, weight, labels = problem(trainable, prompt=10)
    flops, (largest, _) = costs(lambda: function(hidden, weight, labels, scratch_bytes=SCRATCH))
    assert flops == units * 2 * 8 * (ROWS - 10) * HIDDEN * VOCAB
    assert largest <= SCRATCH


def test_a_head_that_lies_transposed_is_not_copied():
    """As a tied embedding or a column slice may lie; torch multiplies it as it is."""
    hidden, weight, labels = problem()
    counted = []
    for head in (weight, weight.detach().t().contiguous().t().requires_grad_()):
        with Allocations() as allocations:
            dk.fused_dpo_loss(hidden, head, labels, reference_free=True, scratch_bytes=SCRATCH).loss.backward()
        counted.append(sum(size >= VOCAB * HIDDEN * 4 for size, _ in allocations.sizes.values()))
    assert counted[0] == counted[1], counted


def test_oversized_pairs_cost_no_fourth_gemm():
    hidden, weight, labels = problem()
    scratch = 40 * VOCAB * 4 * 2  # a pair has 128 rows
    plan = dk.explain(hidden, weight, labels, reference_free=True, scratch_bytes=scratch)
    assert plan.strategy == "chunked"
    assert plan.chunks == 4
    assert plan.extra_bytes == VOCAB * HIDDEN * 4
    flops, _ = costs(lambda: dk.fused_dpo_loss(hidden, weight, labels, reference_free=True, scratch_bytes=scratch).loss)
    assert flops == 3 * 2 * labels.numel() * HIDDEN * VOCAB


@pytest.mark.parametrize(("gigabytes", "mebibytes"), [(141, 2048), (79.2, 2048), (40, 1024), (8, 204.8)])
def test_the_default_scratch_of_gpus(monkeypatch, gigabytes, mebibytes):
    """2 GiB on cards that are sold as 80 GB or more, a fortieth of smaller ones."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = SimpleNamespace(total_memory=int(gigabytes * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert memory_budget.default_scratch_bytes(torch.device("cuda", 0)) == int(mebibytes * MIB)


# --- memory, as the system sees it ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("pairs", "length", "accumulators"), [(2, 512, 1), (32, 32, 0)], ids=["oversized", "many"])
def test_peak_memory(pairs, length, accumulators):
    """N = 2048, H = 256, V = 49152: full logits would take 403 MB for each copy.

    There is the scratch, the gradients, and one more of the head's size where a pair is longer than the scratch. 12 MB
    beside them are a third of the scratch and a quarter of the head's gradient: no second one of either has room.
    """
    measured = measure(pairs, length, scratch_mib=32)
    assert measured["finite"]
    planned = 32 * MIB + measured["gradients"] + accumulators * 49152 * 256 * 4
    assert measured["extra"] <= planned + 12e6, measured
