"""What stands around the losses: metrics, running shift, weights of tokens and pairs, Bradley and Terry."""

import doctest
import importlib
import math
import pkgutil

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dpo_kernels as dk
from dpo_kernels.shapes import STATS
from tests.cases import STRATEGIES, Case
from tests.small import F64, TRAINED, problem

close = torch.testing.assert_close


# --- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", ["stacked", "interleaved"])
def test_metrics_are_what_trl_logs(pairs):
    data = problem(*TRAINED)
    out = dk.fused_dpo_loss(**data, stats=STATS, pairs=pairs, beta=0.5)
    found = out.metrics(pairs)
    assert all(value.dim() == 0 and not value.requires_grad for value in found.values())
    logits = data["hidden"].detach() @ data["weight"].detach().T + data["bias"].detach()
    scored = data["labels"] >= 0
    chosen = torch.arange(6) < 3 if pairs == "stacked" else torch.arange(6) % 2 == 0
    close(found["logits/chosen"], logits[chosen][scored[chosen]].mean().float())
    close(found["logits/rejected"], logits[~chosen][scored[~chosen]].mean().float())
    right = logits.argmax(-1) == data["labels"]
    close(found["mean_token_accuracy"], right[chosen][scored[chosen]].float().mean())
    logp = logits[scored].log_softmax(-1)
    close(found["entropy"], -(logp.exp() * logp).sum(-1).mean().float())
    close(found["scored_tokens"], scored.sum().float())
    close(found["rewards/margins"], (out.chosen_rewards - out.rejected_rewards).mean())
    close(found["rewards/accuracies"], (out.chosen_rewards > out.rejected_rewards).double().mean())
    close(found["logps/chosen"], out.chosen_logps.mean())
    plain = dk.fused_dpo_loss(**data, pairs=pairs).metrics(pairs)
    assert plain.keys() == {name for name in found if name.startswith(("rewards", "logps"))} | {"scored_tokens"}
    with pytest.raises(ValueError, match="unknown pairs"):
        out.metrics("zipped")


# --- log-probs by token -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_token_log_probs_of_the_same_pass(strategy, frozen, layout, shift):
    case = Case(F64, frozen=frozen, layout=layout, shift=shift, reference="free", bias=True)
    inputs = case.tensors()
    name, scratch = STRATEGIES[strategy]
    how = {"strategy": name, "scratch_bytes": scratch}
    out = dk.fused_dpo_loss(**inputs, **case.keywords(), **how, stats=("token_logps", "entropy"))
    got = out.stats["token_logps"]
    given = {key: inputs[key] for key in ("hidden", "weight", "labels", "bias", "cu_seqlens") if key in inputs}
    close(got, dk.fused_token_logps(**given, shift=shift).detach(), rtol=1e-12, atol=1e-13)
    assert not got.requires_grad
    assert got.shape == inputs["labels"].shape
    assert out.stats.keys() == {"entropy", "token_logps", "tokens"}
    assert dk.fused_dpo_loss(**inputs, **case.keywords(), **how, stats=("token_logps",)).stats.keys() == {
        "token_logps",
        "tokens",
    }


def test_token_log_probs_compiled():
    inputs = Case(torch.float32).tensors()

    def step(hidden, weight, labels, ref_logps):
        out = dk.fused_dpo_loss(hidden, weight, labels, ref_logps=ref_logps, stats=("token_logps", "top1"))
        return out.loss, out.stats["token_logps"]

    for ours, theirs in zip(
        torch.compile(step, fullgraph=True, backend="aot_eager")(**inputs), step(**inputs), strict=True
    ):
        close(ours, theirs)


# --- BCO's shift, KTO's KL --------------------------------------------------------------------------------------------


def test_running_delta():
    delta = dk.RunningDelta(decay=0.75)
    assert float(delta.value) == 0.0
    delta.update(torch.tensor([1.0, 3.0]), torch.tensor([-4.0]))
    assert float(delta.value) == -1.0  # (2 - 4) / 2
    delta.update(torch.tensor([7.0]), torch.tensor([7.0]))
    assert float(delta.value) == 0.75 * -1.0 + 0.25 * 7.0
    again = dk.RunningDelta()
    again.load_state_dict(delta.state_dict())
    assert (float(again.value), again.decay, again.updates) == (1.0, 0.75, 2)
    delta.update(torch.zeros(0), torch.zeros(0))
    assert float(delta.value) == 1.0
    loss = dk.dpo_loss(*(torch.zeros(1) for _ in range(4)), loss_type="bco_pair", delta=delta.value)[0]
    close(loss, torch.tensor([math.log1p(math.e) + math.log1p(math.exp(-1.0))]))
    with pytest.raises(ValueError, match="decay must lie"):
        dk.RunningDelta(decay=1.0)


def test_kl_of_kto():
    policy = torch.tensor([-1.0, -2.0], requires_grad=True)
    kl = dk.kto_kl(policy, torch.tensor([-2.0, -2.5]))
    assert float(kl) == 0.75
    assert not kl.requires_grad
    assert float(dk.kto_kl(torch.tensor([-3.0]), torch.tensor([-1.0]))) == 0.0
    with pytest.raises(ValueError, match="differ"):
        dk.kto_kl(torch.zeros(2), torch.zeros(3))


# --- weights ----------------------------------------------------------------------------------------------------------


def test_ld_weights_by_hand():
    """Completions of 3 and 2, and of 1 and 3 tokens: what is beyond the shorter side counts alpha."""
    x = -100
    labels = torch.tensor([[x, 1, 2, 3], [x, x, 4, x], [x, 5, 6, x], [7, 8, 9, x]])
    got = dk.ld_token_weights(labels, 0.25)
    scored = labels != x
    expected = torch.tensor([[1, 1, 1, 0.25], [1, 1, 1, 1], [1, 1, 1, 1], [1, 0.25, 0.25, 1]])
    close(torch.where(scored, got, 1.0), expected)
    woven = labels[[0, 2, 1, 3]]
    close(torch.where(woven != x, dk.ld_token_weights(woven, 0.25, pairs="interleaved"), 1.0), expected[[0, 2, 1, 3]])
    lengths = torch.tensor([4, 3, 3, 4])
    packed = torch.cat([row[:n] for row, n in zip(labels, lengths, strict=True)])
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    in_row = torch.cat([row[:n] for row, n in zip(expected, lengths, strict=True)])
    close(torch.where(packed != x, dk.ld_token_weights(packed, 0.25, cu_seqlens=cu), 1.0), in_row)
    # Shifted, the first label of a sequence is not scored: 7 in the last row.
    shifted = dk.ld_token_weights(labels, 0.25, shift=True)
    close(shifted[3, 1:3], torch.tensor([1.0, 0.25]))


def test_ld_weights_make_ld_dpo():
    inputs = Case(F64).tensors()
    weights = dk.ld_token_weights(inputs["labels"], 0.5)
    out = dk.fused_dpo_loss(**inputs, token_weights=weights)
    tokens = dk.fused_token_logps(inputs["hidden"], inputs["weight"], inputs["labels"])
    close(out.chosen_logps, (tokens * weights).sum(1)[:3].detach())
    same = dk.fused_dpo_loss(**inputs, token_weights=dk.ld_token_weights(inputs["labels"], 1.0))
    close(same.loss, dk.fused_dpo_loss(**inputs).loss)
    with pytest.raises(ValueError, match="alpha must lie"):
        dk.ld_token_weights(inputs["labels"], 1.5)
    with pytest.raises(ValueError, match="odd number"):
        dk.ld_token_weights(inputs["labels"][:3], 0.5)
    assert dk.ld_token_weights(inputs["labels"][:0], 0.5).shape == inputs["labels"][:0].shape


LABELS = torch.arange(8)


@pytest.mark.parametrize(
    ("labels", "options", "error", "words"),
    [
        (LABELS.float().view(2, 4), {}, TypeError, "labels must be int32 or int64, got torch.float32"),
        (LABELS.view(2, 4) > 3, {}, TypeError, "labels must be int32 or int64, got torch.bool"),
        (LABELS, {}, ValueError, r"labels has shape \(8,\), expected \(2B, T\)"),
        (torch.tensor(3), {}, ValueError, r"labels has shape \(\), expected \(2B, T\)"),
        (LABELS.view(2, 4), {"cu_seqlens": torch.tensor([0, 4, 8])}, ValueError, r"expected \(N,\) when cu_seqlens"),
        (LABELS, {"cu_seqlens": [0, 4, 8]}, TypeError, "cu_seqlens must be a tensor, got list"),
        (LABELS, {"cu_seqlens": torch.tensor([0.0, 4, 8])}, TypeError, "cu_seqlens must be int32 or int64"),
        (LABELS, {"cu_seqlens": torch.tensor([[0, 4, 8]])}, ValueError, r"cu_seqlens must have shape \(2B \+ 1,\)"),
        (LABELS, {"cu_seqlens": torch.tensor([0, 4, 7])}, ValueError, r"from 0 to N = 8 .* got \[0, 4, 7\]"),
        (LABELS, {"cu_seqlens": torch.tensor([1, 4, 8])}, ValueError, r"from 0 to N = 8 .* got \[1, 4, 8\]"),
        (LABELS, {"cu_seqlens": torch.tensor([0, 9, 8])}, ValueError, r"from 0 to N = 8 .* got \[0, 9, 8\]"),
        (LABELS, {"cu_seqlens": torch.tensor([0, 8], device="meta")}, ValueError, "cu_seqlens is on meta but labels"),
        (LABELS.view(2, 4), {"shift": 1}, TypeError, "shift must be a bool"),
        (LABELS.view(2, 4), {"ignore_index": None}, TypeError, "ignore_index must be an integer"),
    ],
)
def test_what_ld_weights_cannot_be_made_of_is_named(labels, options, error, words):
    with pytest.raises(error, match=words):
        dk.ld_token_weights(labels, 0.5, **options)


@pytest.mark.parametrize("bounds", [[0, 4, 7], [1, 4, 8], [0, 9, 8], [0, 4, 99], [-3, 4, 8], [0]])
def test_bounds_that_are_not_looked_at_make_nan(bounds, monkeypatch):
    """As on a GPU, where a look would be a sync: no index out of bounds, which there would end the context."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    weights = dk.ld_token_weights(LABELS, 0.5, cu_seqlens=torch.tensor(bounds))
    assert weights.shape == LABELS.shape
    assert weights.isnan().all()
    assert not dk.ld_token_weights(LABELS, 0.5, cu_seqlens=torch.tensor([0, 4, 8])).isnan().any()


def test_bounds_without_values_are_not_looked_at():
    with FakeTensorMode():
        labels = torch.zeros(8, dtype=torch.int64)
        weights = dk.ld_token_weights(labels, 0.5, cu_seqlens=torch.tensor([0, 4, 8]))
        assert weights.shape == labels.shape


@pytest.mark.parametrize("pairs", ["stacked", "interleaved"])
def test_wpo_weights(pairs):
    data = problem(*TRAINED)
    out = dk.fused_dpo_loss(**data, stats=("log_sum_p2",), pairs=pairs)
    logp = (data["hidden"] @ data["weight"].T + data["bias"]).detach().log_softmax(-1)
    scored = data["labels"] >= 0
    picked = logp.gather(-1, data["labels"].clamp(min=0)[..., None])[..., 0]
    adjusted = (picked - (2 * logp).logsumexp(-1)) * scored
    by_sequence = torch.exp(adjusted.sum(1) / scored.sum(1).clamp(min=1))
    chosen, rejected = by_sequence.chunk(2) if pairs == "stacked" else (by_sequence[0::2], by_sequence[1::2])
    weights = dk.wpo_pair_weights(out, pairs)
    close(weights, chosen * rejected, rtol=1e-6, atol=0)
    weighted = dk.fused_dpo_loss(**data, pairs=pairs, reduction="none", pair_weights=weights)
    close(weighted.loss, weights * dk.fused_dpo_loss(**data, pairs=pairs, reduction="none").loss)
    with pytest.raises(ValueError, match="needs stats"):
        dk.wpo_pair_weights(dk.fused_dpo_loss(**data))


def test_wpo_weights_by_hand():
    """Tokens of probability p among p, (1 - p)/2, (1 - p)/2: p / sum of squares is 4/3 for 1/2 and 2/3 for 1/4.

    Sides of 4/3 and 4/3, of 4/3 and 2/3, of 2/3 and sqrt(4/3 * 2/3), and of 4/3 and nothing.
    """
    half = torch.tensor([2.0, 1.0, 1.0], dtype=F64).log()  # 1/2, 1/4, 1/4: squares add up to 3/8
    hidden = half.expand(8, 2, 3).contiguous()
    x, likely, unlikely = -100, 0, 1
    chosen = [[likely, x], [likely, likely], [unlikely, x], [x, likely]]
    rejected = [[likely, likely], [x, unlikely], [likely, unlikely], [x, x]]
    labels = torch.tensor([*chosen, *rejected])
    out = dk.fused_dpo_loss(hidden, torch.eye(3, dtype=F64), labels, reference_free=True, stats=("log_sum_p2",))
    weights = torch.tensor([16 / 9, 8 / 9, (2 / 3) * math.sqrt(8 / 9), 4 / 3], dtype=F64)
    close(dk.wpo_pair_weights(out), weights, rtol=1e-6, atol=0)  # two of them above 1: eq. 2 has no bound
    # The authors' code bounds the product, not each side: 4/3 * 2/3 stays 8/9, which would else be 2/3.
    bounded = torch.tensor([1.0, 8 / 9, (2 / 3) * math.sqrt(8 / 9), 1.0], dtype=F64)
    close(dk.wpo_pair_weights(out, largest=1), bounded, rtol=1e-6, atol=0)
    close(dk.wpo_pair_weights(out, largest=1.5), weights.clamp(max=1.5), rtol=1e-6, atol=0)
    for bad, error in ((0.0, ValueError), (math.inf, ValueError), ("1", TypeError)):
        with pytest.raises(error, match="largest must be"):
            dk.wpo_pair_weights(out, largest=bad)
    with pytest.raises(TypeError, match="out must be the result of fused_dpo_loss, got dict"):
        dk.wpo_pair_weights(out._asdict())


@pytest.mark.parametrize(
    "call",
    [
        lambda: dk.bradley_terry_loss([1.0], torch.zeros(1)),
        lambda: dk.bradley_terry_loss(torch.zeros(1), [1.0]),
        lambda: dk.bradley_terry_strengths([[0, 1], [1, 0]]),
        lambda: dk.ld_token_weights([[1, 2]], 0.5),
        lambda: dk.ld_token_weights(torch.arange(2), 0.5, cu_seqlens=[0, 1, 2]),
        lambda: dk.kto_kl([0.0], torch.zeros(1)),
        lambda: dk.kto_kl(torch.zeros(1), 0.0),
    ],
)
def test_what_is_no_tensor_is_named(call):
    with pytest.raises(TypeError, match="must be a tensor, got"):
        call()


# --- Bradley and Terry ------------------------------------------------------------------------------------------------


def test_strengths_of_a_chain():
    """A beats B 8 of 12, C beats A 5 of 8: odds 2 and 5/3, B : C is 1/2 : 5/3 = 3 : 10."""
    wins = torch.zeros(3, 3)
    wins[0, 1], wins[1, 0], wins[2, 0], wins[0, 2] = 8, 4, 5, 3
    a, b, c = dk.bradley_terry_strengths(wins)
    close(torch.sigmoid(b - c), torch.tensor(3 / 13, dtype=F64))
    close(a + b + c, torch.zeros((), dtype=F64))


def test_strengths_are_the_maximum_of_the_likelihood():
    wins = torch.tensor([[9, 3, 1, 4], [2, 9, 5, 0], [4, 1, 9, 2], [1, 3, 3, 9]], dtype=F64)
    strengths = dk.bradley_terry_strengths(wins).requires_grad_()
    counts = wins.clone().fill_diagonal_(0)
    likelihood = (counts * torch.nn.functional.logsigmoid(strengths[:, None] - strengths[None, :])).sum()
    (slope,) = torch.autograd.grad(likelihood, strengths)
    close(slope, torch.zeros(4, dtype=F64), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("wins", "words"),
    [
        (torch.zeros(2, 3), "shape"),
        (torch.tensor([[0.0, -1.0], [1.0, 0.0]]), "not negative"),
        (torch.tensor([[0.0, 5.0], [0.0, 0.0]]), "no maximum exists"),
        (torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]), "no maximum exists"),
    ],
)
def test_strengths_that_do_not_exist(wins, words):
    with pytest.raises(ValueError, match=words):
        dk.bradley_terry_strengths(wins)


def test_one_contestant():
    assert dk.bradley_terry_strengths(torch.ones(1, 1)).tolist() == [0.0]


def test_loss_of_a_reward_model():
    chosen, rejected = torch.tensor([math.log(3), 0.0]).double(), torch.zeros(2, dtype=F64)
    losses = dk.bradley_terry_loss(chosen, rejected, reduction="none")
    close(losses, torch.tensor([math.log(4 / 3), math.log(2)], dtype=F64))
    shifted = dk.bradley_terry_loss(chosen, rejected, margin=torch.tensor([math.log(3), 0.0]).double(), reduction="sum")
    close(shifted, torch.tensor(2 * math.log(2), dtype=F64))
    close(dk.bradley_terry_loss(chosen, rejected), losses.mean())
    assert torch.autograd.gradcheck(dk.bradley_terry_loss, [t.clone().requires_grad_() for t in (chosen, rejected)])
    for bad, words in (
        ({"rejected_rewards": torch.zeros(3)}, "shape"),
        ({"margin": torch.zeros(3)}, "margin has shape"),
        ({"reduction": "max"}, "unknown reduction"),
    ):
        with pytest.raises(ValueError, match=words):
            dk.bradley_terry_loss(**{"chosen_rewards": chosen, "rejected_rewards": rejected} | bad)
    with pytest.raises(ValueError, match="empty batch"):
        dk.bradley_terry_loss(torch.zeros(0), torch.zeros(0))


# --- examples in docstrings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [module.name for module in pkgutil.iter_modules(dk.losses.__path__)])
def test_the_examples_of_docstrings_run(module):
    assert doctest.testmod(importlib.import_module(f"dpo_kernels.losses.{module}")).failed == 0


@pytest.mark.parametrize("name", [
    "RunningDelta", "bradley_terry_loss", "bradley_terry_strengths", "kto_kl", "ld_token_weights", "wpo_pair_weights",
])  # fmt: skip
def test_what_is_public_has_an_example(name):
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(dk, name), name)
    assert len(example.examples) >= 3
