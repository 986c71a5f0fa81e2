"""Edges that the larger tests pass by: ties, sequences that end a token early, tiles of nothing, chunk after chunk."""

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels.losses.divergence import DIVERGENCES
from dpo_kernels.reference import dpo_loss_reference
from tests.cases import RICH, Case, run, widened
from tests.extremes import extreme


def test_a_tie_is_no_pair_that_is_ranked_right():
    """As TRL has it: ``chosen > rejected``."""
    rewards = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    zeros = torch.zeros(4)
    out = dk.DPOLossOutput(torch.zeros(()), *rewards, zeros, zeros, zeros, zeros, {"tokens": torch.ones(8)})
    assert float(out.metrics()["rewards/accuracies"]) == 0.25


@pytest.mark.parametrize("ends", [(0, 3, 2, 5, 6), (0, 1, 0, 5, 6), (0, 3, 4, 7, 6), (1, 3, 4, 5, 6), (0, 3, 4, 5, 7)])
def test_cumulative_lengths_that_are_off_by_one(ends):
    hidden, weight, labels = torch.randn(6, 4), torch.randn(7, 4), torch.arange(6)
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to N = 6"):
        dk.fused_dpo_loss(hidden, weight, labels, reference_free=True, cu_seqlens=cu_seqlens)
    right = torch.tensor([0, 3, 3, 5, 6], dtype=torch.int32)  # an empty sequence is none of these
    assert dk.fused_dpo_loss(hidden, weight, labels, reference_free=True, cu_seqlens=right).loss.isfinite()


@pytest.mark.parametrize("strategy", ["recompute", "streaming"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("columns", [16, 20, 36], ids=str)
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_tiles_of_which_no_token_can_be_reached(backend, columns, frozen, strategy):
    """The first tiles of the vocabulary are -inf from edge to edge: nothing that is finite was seen before them."""
    inputs = extreme()
    inputs["labels"] = torch.full_like(inputs["labels"], 36)
    bias = torch.zeros(37)
    bias[:columns] = -torch.inf
    inputs["bias"] = bias.requires_grad_(not frozen)
    inputs["weight"].requires_grad_(not frozen)
    how = {"strategy": strategy, "backend": backend, "stats": ("entropy", "top1", "log_sum_p2")}
    cut = dict(how, scratch_bytes=1400)
    plan = dk.explain(**inputs, **cut)
    assert plan.tile.cols <= 18
    whole, found = (run(dk.fused_dpo_loss, inputs, **options) for options in (how, cut))
    for name, value in found.items():
        assert value.isfinite().all(), name
        torch.testing.assert_close(
            value, whole[name], rtol=2e-5, atol=2e-6, msg=lambda text, name=name: f"{name} {text}"
        )


@pytest.mark.parametrize("loss", ["sigmoid", "nca_pair"])
@pytest.mark.parametrize("reference", ["cached", "hidden"])
def test_chunk_after_chunk_is_one_batch(reference, loss):
    """Each holds whole pairs; what the first has added to the head's gradient the next ones keep."""
    case = Case(torch.float64, reference=reference, bias=True, weights=True, options={"loss_type": loss})
    inputs = case.tensors()
    how = {"strategy": "chunked", "backend": "torch", **case.keywords()}
    one_pair = 10 * 211 * 8 * 4 // 3 + 8  # bytes of scratch for the longest, and a quarter for temporaries
    given = {name: value for name, value in inputs.items() if name not in ("hidden", "weight", "labels")}
    plan = dk.explain(inputs["hidden"], inputs["weight"], inputs["labels"], **given, scratch_bytes=one_pair, **how)
    assert (plan.chunks, plan.extra_bytes) == (3, 0)
    oracle = run(dpo_loss_reference, widened(inputs), **case.keywords())
    for name, value in run(dk.fused_dpo_loss, inputs, **how, scratch_bytes=one_pair).items():
        torch.testing.assert_close(value.double(), oracle[name].double(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("strategy", ["recompute", "streaming"])
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_tiles_of_a_few_rows_and_columns_are_one_batch(frozen, backend, strategy):
    """Both are cut: each tile adds to what the rows before it and the columns before it have left."""
    case = Case(torch.float64, bias=True, weights=True, frozen=frozen, options=RICH)
    inputs = case.tensors()
    how = {"strategy": strategy, "backend": backend, "scratch_bytes": 1400, **case.keywords()}
    given = {name: value for name, value in inputs.items() if name not in ("hidden", "weight", "labels")}
    tile = dk.explain(inputs["hidden"], inputs["weight"], inputs["labels"], **given, **how).tile
    assert (tile.rows, tile.cols) == (11, 11)  # of 22 and 211
    oracle = run(dpo_loss_reference, widened(inputs), **case.keywords())
    for name, value in run(dk.fused_dpo_loss, inputs, **how).items():
        rounding = 1e-6 if name.startswith("stats.") else 1e-11
        torch.testing.assert_close(value.double(), oracle[name].double(), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_a_divergence_scores_what_has_not_changed_as_nothing(alpha, name):
    """0 at a log-ratio of 0, with a slope of 1, JS of a half: a constant cancels in most losses, not in all."""
    ratio = torch.zeros((), dtype=torch.float64, requires_grad=True)
    score = DIVERGENCES[name](ratio, alpha)
    (slope,) = torch.autograd.grad(score, ratio)
    assert float(score.detach()) == pytest.approx(0.0, abs=1e-15)
    assert float(slope) == pytest.approx(0.5 if name == "js" else 1.0)


def test_a_run_that_is_stopped_twice_loses_nothing(tmp_path):
    """What the second run has written stands beside what the first one has, not in its place."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from dpo_kernels.integrations.precompute import PART, precompute_reference_logps
    from tests.integration_helpers import rows, tiny

    model, data, calls = tiny("llama"), rows(8), []
    how = {"batch_size": 4, "save_every": 1, "progress": False}  # four batches of sequences, each written by itself
    whole = precompute_reference_logps(model, data, tmp_path / "whole", **how)

    def stop(*_):
        calls.append(1)
        if len(calls) == 3:  # after the head's self-check and one batch
            raise KeyboardInterrupt

    handle = model.model.register_forward_pre_hook(stop)
    for parts in (1, 2):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            precompute_reference_logps(model, data, tmp_path / "cut", **how)
        assert len(list((tmp_path / "cut").glob(PART))) == parts
    handle.remove()
    last = precompute_reference_logps(model, data, tmp_path / "cut", **how)
    assert all(torch.equal(last[name], value) for name, value in whole.items())
