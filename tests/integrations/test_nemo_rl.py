"""NeMo-RL's log-probs and DPO loss against its formulae on full logits, with its arguments and its batches."""

import functools
import importlib
import inspect

import pytest
import torch
import torch.nn.functional as F

from dpo_kernels.integrations.nemo_rl import from_parallel_hidden_states_to_logprobs, preference_loss
from tests.distributed import gloo, nemo_rl
from tests.gemm_counts import costs

B, T, H, V = 6, 8, 7, 13
F64 = torch.float64
CONFIGS = {
    "plain": {},
    "weighted": {"preference_loss_weight": 0.7, "reference_policy_kl_penalty": 0.3},
    "averages": {"preference_average_log_probs": True, "reference_policy_kl_penalty": 2.0},
    "SFT": {"sft_loss_weight": 0.4},
    "SFT averages": {"sft_loss_weight": 0.4, "sft_average_log_probs": True, "preference_loss_weight": 0.5},
    "all averages": {
        "sft_loss_weight": 0.4, "sft_average_log_probs": True, "preference_average_log_probs": True,
        "reference_policy_kl_penalty": 2.0,
    },
    "SFT alone": {"sft_loss_weight": 1.5, "preference_loss_weight": 0.0},
}  # fmt: skip


# --- NeMo-RL's formulae -----------------------------------------------------------------------------------------------


def logps_of_nemo_rl(
    tensor_parallel_hidden_states, output_weight_layer, runtime_gather_output, target, vocab_start_index,
    vocab_end_index, tp_group, inference_only=False, cp_group=None, chunk_size=None,
):  # fmt: skip
    """On one rank: at t the log-prob of the id at t + 1."""
    logits = (tensor_parallel_hidden_states @ output_weight_layer.t()).transpose(0, 1)
    return logits[:, :-1].log_softmax(-1).gather(-1, target[:, 1:, None])[..., 0]


def loss_of_nemo_rl(
    logps, data, global_valid_seqs, reference_policy_kl_penalty=0.05, preference_loss_weight=1.0, sft_loss_weight=0.0,
    preference_average_log_probs=False, sft_average_log_probs=False,
):  # fmt: skip
    """(loss, metrics) of log-probs ``(2B, T - 1)``."""
    scored, counts = data["token_mask"][:, 1:], data["sample_mask"]
    rewards = ((logps - data["reference_policy_logprobs"][:, :-1]) * scored).sum(-1)
    surprise = -(logps * scored).sum(-1) * counts
    if preference_average_log_probs:
        rewards = rewards / scored.sum(-1).clamp(min=1)
    if sft_average_log_probs:
        surprise = surprise / (scored * counts[:, None]).sum(-1).clamp(min=1)
    chosen, rejected = rewards[0::2], rewards[1::2]
    by_pair = {
        "sft_loss": surprise[0::2] * (sft_loss_weight > 0),
        "preference_loss": -F.logsigmoid(reference_policy_kl_penalty * (chosen - rejected)),
        "accuracy": chosen > rejected,
        "rewards_chosen_mean": chosen,
        "rewards_rejected_mean": rejected,
    }
    means = {name: (values * counts[0::2]).sum() / (global_valid_seqs / 2 + 1e-8) for name, values in by_pair.items()}
    loss = sft_loss_weight * means["sft_loss"] + preference_loss_weight * means["preference_loss"]
    metrics = {"loss": loss, **means, "num_valid_samples": counts.sum() / 2}
    return loss, {name: value.item() for name, value in metrics.items()}


# --- batches ----------------------------------------------------------------------------------------------------------


def batch(dtype=F64, vocab=V, width=H):
    """(hidden, weight, data) of three pairs. The second has a chosen sequence without a scored token."""
    g = torch.Generator().manual_seed(4)
    hidden = torch.randn(B, T, width, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=g, dtype=dtype).requires_grad_()
    token_mask = torch.ones(B, T, dtype=torch.long)
    token_mask[:, :2] = token_mask[0, 6:] = token_mask[5, 4:] = token_mask[2] = 0
    token_mask[4, 0] = 1  # no position predicts it
    data = {
        "input_ids": torch.randint(0, vocab, (B, T), generator=g),
        "token_mask": token_mask,
        "sample_mask": torch.ones(B, dtype=dtype),
        "reference_policy_logprobs": -3 * torch.rand(B, T, generator=g, dtype=dtype),
    }
    return hidden, weight, data


def without_last_pair(data):
    return data | {"sample_mask": torch.tensor([1, 1, 1, 1, 0, 0]).to(data["sample_mask"].dtype)}


def whole(hidden, weight, ids, **more):
    return hidden.transpose(0, 1), weight, None, ids, 0, weight.shape[0], None, *more.values()


def assert_same(mine, theirs, wanted, tolerance=1e-9):
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    upstream = torch.linspace(-1, 2, theirs.numel(), dtype=theirs.dtype).view(theirs.shape) + 0.1
    got = [torch.autograd.grad((values * upstream).sum(), wanted, retain_graph=True) for values in (mine, theirs)]
    torch.testing.assert_close(*got, rtol=tolerance, atol=tolerance)


def assert_metrics(mine, theirs, tolerance=1e-9):
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name


# --- log-probs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_log_probs_are_those_of_full_logits(chunk_size):
    hidden, weight, data = batch()
    given = whole(hidden, weight, data["input_ids"])
    mine = from_parallel_hidden_states_to_logprobs(*given, chunk_size=chunk_size)
    assert_same(mine, logps_of_nemo_rl(*given), (hidden, weight))


def test_the_arguments_are_those_of_nemo_rl():
    mine, theirs = (
        [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]
        for function in (from_parallel_hidden_states_to_logprobs, logps_of_nemo_rl)
    )
    assert mine == theirs


def test_inference_keeps_nothing_for_a_backward_pass():
    hidden, weight, data = batch()
    given = whole(hidden, weight, data["input_ids"])
    mine = from_parallel_hidden_states_to_logprobs(*given, inference_only=True)
    assert not mine.requires_grad
    torch.testing.assert_close(mine, logps_of_nemo_rl(*given).detach())


def test_bounds_that_are_not_those_of_a_whole_head_are_refused():
    hidden, weight, data = batch()
    with pytest.raises(ValueError, match="rows 0 to 13, but the bounds are 0 and 6: pass tp_group"):
        from_parallel_hidden_states_to_logprobs(hidden.transpose(0, 1), weight, None, data["input_ids"], 0, 6, None)


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left_out", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_the_loss_is_that_of_full_logits(config, left_out):
    hidden, weight, data = batch()
    data = without_last_pair(data) if left_out else data
    logps = logps_of_nemo_rl(*whole(hidden, weight, data["input_ids"]))
    theirs, expected = loss_of_nemo_rl(logps, data, torch.tensor(10.0), **CONFIGS[config])
    mine, metrics = preference_loss(hidden, weight, data, torch.tensor(10.0), **CONFIGS[config])
    assert_same(mine, theirs, (hidden, weight))
    assert_metrics(metrics, expected)


def test_micro_batches_add_up_to_the_loss_of_the_batch():
    hidden, weight, data = batch()
    parts = []
    for rows in (slice(0, 2), slice(2, 6)):
        part = {name: value[rows] for name, value in data.items()}
        parts.append(preference_loss(hidden[rows], weight, part, B, sft_loss_weight=0.4))
    mine, metrics = preference_loss(hidden, weight, data, B, sft_loss_weight=0.4)
    assert_same(parts[0][0] + parts[1][0], mine, (hidden, weight))
    assert_metrics({name: parts[0][1][name] + parts[1][1][name] for name in metrics}, metrics)


@pytest.mark.parametrize("config", ["plain", "SFT averages"])
@pytest.mark.parametrize("global_valid_seqs", [0, 8])
@pytest.mark.parametrize("mask", ["token_mask", "sample_mask"])
def test_a_batch_without_a_token_stays_in_the_graph(mask, global_valid_seqs, config):
    hidden, weight, data = batch()
    data[mask] = torch.zeros_like(data[mask])
    if not global_valid_seqs:
        data["sample_mask"] = torch.zeros(B)
    mine, metrics = preference_loss(hidden, weight, data, torch.tensor(global_valid_seqs), **CONFIGS[config])
    mine.backward()
    assert hidden.grad.abs().max() == weight.grad.abs().max() == 0
    _, expected = loss_of_nemo_rl(torch.zeros(B, T - 1), data, global_valid_seqs, **CONFIGS[config])
    assert_metrics(metrics, expected, 1e-6)


def test_what_a_pair_holds_that_does_not_count_does_not_matter():
    hidden, weight, data = batch()
    data = without_last_pair(data)
    expected, metrics = preference_loss(hidden, weight, data, 4)
    spoilt = hidden.detach().clone()
    spoilt[4:] = torch.nan
    spoilt.requires_grad_()
    data["reference_policy_logprobs"][4:] = torch.nan
    mine, others = preference_loss(spoilt, weight, data, 4)
    assert mine == expected
    assert others == metrics
    mine.backward()
    assert spoilt.grad.isfinite().all()
    assert spoilt.grad[4:].abs().max() == 0


def test_validation_needs_no_gradient():
    hidden, weight, data = batch()
    with torch.no_grad():
        mine, metrics = preference_loss(hidden, weight, data, B)
    assert not mine.requires_grad
    assert metrics["loss"] == pytest.approx(mine.item())


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({}, {"sft_loss_weight": -1.0}, "sft_loss_weight must be at least 0, got -1"),
        ({}, {"preference_loss_weight": float("nan")}, "preference_loss_weight must be at least 0, got nan"),
        ({"sample_mask": torch.ones(5)}, {}, "data\\['sample_mask'\\] must be \\(6,\\)"),
        ({"token_mask": torch.ones(B, T - 1)}, {}, "data\\['token_mask'\\] must be \\(6, 8\\)"),
        ({"reference_policy_logprobs": torch.ones(B, T - 1)}, {}, "data\\['reference_policy_logprobs'\\] must be"),
        ({"input_ids": torch.ones(5, T, dtype=torch.long)}, {}, "alternately chosen and rejected, got \\(5, 8\\)"),
    ],
)
def test_what_does_not_fit_is_named(change, options, words):
    hidden, weight, data = batch()
    with pytest.raises(ValueError, match=words):
        preference_loss(hidden, weight, data | change, B, **options)


def test_an_unknown_option_is_refused():
    hidden, weight, data = batch()
    with pytest.raises(ValueError, match="sft_weight is not an option"):
        preference_loss(hidden, weight, data, B, sft_weight=1.0)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_no_full_logits_are_made():
    vocab, width = 4096, 16
    hidden, weight, data = batch(torch.float32, vocab, width)
    given = whole(hidden, weight, data["input_ids"])
    full, rows = B * T * vocab * 4, width * vocab * 4
    calls = {
        "their log-probs": functools.partial(logps_of_nemo_rl, *given),
        "our log-probs": functools.partial(from_parallel_hidden_states_to_logprobs, *given, chunk_size=2),
        "their loss": lambda: loss_of_nemo_rl(logps_of_nemo_rl(*given), data, B)[0],
        "our loss": lambda: preference_loss(hidden, weight, data, B, scratch_bytes=full // 4)[0],
    }
    largest = {name: costs(call)[1][0] for name, call in calls.items()}
    assert min(largest["their log-probs"], largest["their loss"]) >= full * (T - 1) // T
    assert max(largest["our log-probs"], largest["our loss"]) <= max(rows, full // 4)


# --- several ranks, and NeMo-RL itself --------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_log_probs_of_a_head_that_is_split_over_ranks(chunk_size, tmp_path):
    made = nemo_rl.tensors()
    hidden, weight = (made[name].requires_grad_() for name in ("hidden", "weight"))
    logps = logps_of_nemo_rl(*whole(hidden.transpose(0, 1), weight, made["input_ids"]))
    grads = torch.autograd.grad((logps * made["upstream"]).sum(), (hidden, weight))
    for rank, found in enumerate(gloo.run("log_probs", 2, tmp_path, chunk_size, module="nemo_rl")):
        torch.testing.assert_close(found["logps"], logps.detach())
        torch.testing.assert_close(found["grads"], tuple(grad.chunk(2)[rank] for grad in grads))


def test_the_loss_of_a_head_that_is_split_over_ranks(tmp_path):
    made = nemo_rl.tensors()
    hidden, weight = (made[name].requires_grad_() for name in ("hidden", "weight"))
    logps = logps_of_nemo_rl(*whole(hidden.transpose(0, 1), weight, made["input_ids"]))
    options = {"sft_loss_weight": 0.3, "sft_average_log_probs": True}
    loss, metrics = loss_of_nemo_rl(logps, made, torch.tensor(6.0), **options)
    grads = torch.autograd.grad(loss, (hidden, weight))
    for rank, found in enumerate(gloo.run("loss", 2, tmp_path, module="nemo_rl")):
        torch.testing.assert_close(found["loss"], loss.detach())
        assert_metrics(found["metrics"], metrics)
        torch.testing.assert_close(found["grads"], tuple(grad.chunk(2)[rank] for grad in grads))


def test_sequences_that_are_split_over_ranks_are_refused(tmp_path):
    for said in gloo.run("refused", 2, tmp_path, "sequences", module="nemo_rl"):
        assert said.startswith("cp_group has several ranks")


def test_bounds_that_are_not_those_of_the_rows_are_refused(tmp_path):
    for said in gloo.run("refused", 2, tmp_path, "bounds", module="nemo_rl"):
        assert said == "rank 0 has 6 rows of the head, but bounds 0 to 5"


def test_the_real_function_of_nemo_rl(tmp_path):
    pytest.importorskip("nemo_rl.distributed.model_utils", reason="NeMo-RL is not installed", exc_type=ImportError)
    for theirs, mine in gloo.run("beside_nemo_rls_function", 2, tmp_path, module="nemo_rl"):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        assert min(float(value.abs().max()) for value in mine) > 0.1


@pytest.mark.parametrize("config", CONFIGS)
def test_the_real_loss_of_nemo_rl(config):
    name = "nemo_rl.algorithms.loss.loss_functions"
    pytest.importorskip(name, reason="NeMo-RL is not installed", exc_type=ImportError)
    losses = importlib.import_module(name)
    hidden, weight, data = batch(torch.float32)
    data = without_last_pair(data)
    real = losses.DPOLossFn(losses.DPOLossConfig(**CONFIGS[config]))
    logps = logps_of_nemo_rl(*whole(hidden, weight, data["input_ids"]))
    theirs, expected = real(logps, data, torch.tensor(10.0), torch.tensor(100.0))
    mine, metrics = preference_loss(hidden, weight, data, torch.tensor(10.0), **CONFIGS[config])
    assert_same(mine, theirs, (hidden, weight), 1e-5)
    assert_metrics(metrics, expected, 1e-5)
