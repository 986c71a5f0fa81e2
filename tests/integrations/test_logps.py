"""``head_logps`` against full logits in every layout, and the stacks' own functions that stand on it."""

import functools
import importlib
import itertools
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from dpo_kernels.integrations import ms_swift, openrlhf, verl
from dpo_kernels.integrations.logps import head_logps
from tests.gemm_counts import Allocations

B, T, H, V = 3, 7, 6, 13
F64 = torch.float64


def problem(dtype=F64, vocab=V):
    g = torch.Generator().manual_seed(2)
    hidden = torch.randn(B, T, H, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, H, generator=g, dtype=dtype).requires_grad_()
    labels = torch.randint(0, V, (B, T), generator=g)
    labels[0, :2] = labels[1, 4:] = -100
    return hidden, weight, labels


def plain(hidden, weight, labels, temperature=1.0, scale=1.0, cap=None, bias=None):
    """(B, T), at the place of the position that predicts."""
    logits = hidden @ weight.t()
    logits = scale * (logits if bias is None else logits + bias)
    logits = (logits if cap is None else cap * torch.tanh(logits / cap)) / temperature
    logp = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return logp * (labels != -100)


def gradients(values, wanted):
    upstream = torch.linspace(-1, 2, values.numel(), dtype=values.dtype).view(values.shape)
    return torch.autograd.grad((values * upstream).sum(), wanted, retain_graph=True)


def assert_same(mine, theirs, wanted):
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients(mine, wanted), gradients(theirs, wanted), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("layout", ["batch_first", "sequence_first", "packed"])
def test_every_layout_gives_what_full_logits_give(layout, shift, per):
    hidden, weight, labels = problem()
    bias = torch.linspace(-1, 1, V, dtype=F64, requires_grad=True)
    how = (0.7, 1.3, 2.0, bias)
    shifted = F.pad(plain(hidden[:, :-1], weight, labels[:, 1:], *how), (1, 0))
    expected = shifted if shift else plain(hidden, weight, labels, *how)
    given = {"batch_first": hidden, "sequence_first": hidden.transpose(0, 1), "packed": hidden.reshape(1, B * T, H)}
    options = {"layout": layout, "shift": shift, "per": per, "temperature": 0.7, "logit_scale": 1.3, "softcap": 2.0}
    wanted = labels
    if layout == "packed":
        options["cu_seqlens"], wanted = torch.arange(0, B * T + 1, T), labels.reshape(1, -1)
        expected = expected if per == "sequence" else expected.reshape(1, -1)
    expected = expected.sum(1) if per == "sequence" else expected
    mine = head_logps(given[layout], weight, wanted, bias=bias, **options)
    assert_same(mine, expected, (hidden, weight, bias))


def test_boundaries_of_packed_sequences_are_kept():
    hidden, weight, _ = problem()
    cu_seqlens = torch.tensor([0, 1, 9, 9, 21])
    labels = torch.randint(0, V, (21,), generator=torch.Generator().manual_seed(1))
    flat = hidden.reshape(21, H)
    got = head_logps(flat, weight, labels, layout="packed", per="sequence", shift=True, cu_seqlens=cu_seqlens)
    for sequence, (start, stop) in enumerate(itertools.pairwise(cu_seqlens)):
        own = plain(flat[start : max(start, stop - 1)], weight, labels[start + 1 : stop])
        torch.testing.assert_close(got[sequence], own.sum())


def test_hidden_states_with_the_sequence_first_are_not_copied():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 2, 256, generator=g).requires_grad_(), torch.randn(16, 256, generator=g)
    labels = torch.randint(0, 16, (2, 64), generator=g)

    def large(given, targets, layout):
        """How many tensors as large as the hidden states a step makes."""
        with Allocations() as made:
            head_logps(given, weight, targets, layout=layout).sum().backward()
        made.sizes.pop(hidden.untyped_storage()._cdata, None)  # views of them
        return sum(size >= hidden.nbytes for size, _ in made.sizes.values())

    flat = large(hidden.reshape(-1, 256), labels.t().reshape(-1), "packed")  # as they lie, and labels in that order
    assert large(hidden, labels, "sequence_first") == flat
    assert large(hidden.transpose(0, 1).contiguous(), labels, "batch_first") == flat + 1


def test_padded_rows_of_the_head_are_cut():
    hidden, weight, labels = problem(vocab=16)
    got = head_logps(hidden, weight, labels, vocab_size=V)
    assert_same(got, plain(hidden, weight[:V], labels), (hidden, weight))
    assert gradients(got, (weight,))[0][V:].abs().max() == 0
    assert (got - head_logps(hidden, weight, labels)).abs().max() > 1e-3


@pytest.mark.parametrize("layout", ["batch_first", "sequence_first", "packed"])
@pytest.mark.parametrize("per", ["token", "sequence"])
def test_a_batch_without_a_scored_token_stays_in_the_graph(layout, per):
    hidden, weight, labels = problem()
    labels.fill_(-100)
    given = {"batch_first": hidden, "sequence_first": hidden.transpose(0, 1), "packed": hidden.reshape(B * T, H)}
    options = {}
    if layout == "packed":
        options["cu_seqlens"], labels = torch.arange(0, B * T + 1, T), labels.flatten()
    logps = head_logps(given[layout], weight, labels, layout=layout, per=per, **options)
    assert logps.abs().max() == 0
    logps.sum().backward()
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layout": "tbh"}, "unknown layout 'tbh'"),
        ({"per": "word"}, "unknown per 'word'"),
        ({"layout": "packed", "shift": True}, "cu_seqlens is needed"),
        ({"layout": "packed", "per": "sequence"}, "cu_seqlens is needed"),
        ({"cu_seqlens": torch.tensor([0, 21])}, 'cu_seqlens goes with layout="packed"'),
        ({"layout": "sequence_first"}, r"hidden is \(T, B, H\) = \(3, 7, 6\), but labels are \(B, T\) = \(3, 7\)"),
        ({"vocab_size": 14}, "vocab_size is 14, but weight has 13 rows"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"sequence_sharded_hidden": True}, "needs the group"),
        ({"temperature": 0.0}, "temperature must be > 0"),
    ],
)
def test_what_does_not_fit_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        head_logps(*problem(), **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"vocab_parallel": None, "static": True},
            "head_logps takes no vocab_parallel, static; group= takes a VocabParallel or its group",
        ),
        ({"loss_type": "ipo"}, "head_logps takes no loss_type"),
        ({"cu_seqlen": torch.tensor([0, 21])}, "head_logps takes no cu_seqlen"),
    ],
)
@pytest.mark.parametrize("function", [head_logps, openrlhf.log_probs_from_hidden])
def test_what_is_unknown_is_refused(function, options, words):
    with pytest.raises(TypeError, match=f"^{words}$"):
        function(*problem(), **options)


def test_how_it_is_run_can_be_told():
    hidden, weight, labels = problem()
    logps = head_logps(hidden, weight, labels, backend="torch", strategy="recompute", scratch_bytes=1 << 16)
    assert_same(logps, plain(hidden, weight, labels), (hidden, weight))
    with pytest.raises(ValueError, match="unknown strategy 'none'"):
        head_logps(hidden, weight, labels, strategy="none")


# --- verl -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("flat", [True, False])
def test_the_layer_of_verl(temperature, flat):
    hidden, weight, labels = problem()
    labels = labels.clamp(min=0)
    given, ids = (hidden.reshape(-1, H), labels.reshape(-1)) if flat else (hidden, labels)
    logps, entropy = verl.fused_linear_for_ppo(given, weight, ids, temperature)
    logp = ((given @ weight.t()) / temperature).log_softmax(-1)
    assert_same(logps, logp.gather(-1, ids[..., None])[..., 0], (hidden, weight))
    expected = -(logp.exp() * logp).sum(-1)
    torch.testing.assert_close(entropy, expected.to(entropy.dtype), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        gradients(entropy.double(), (hidden, weight)), gradients(expected, (hidden, weight)), rtol=1e-5, atol=1e-5
    )


def test_ids_of_another_shape_are_named():
    hidden, weight, labels = problem()
    with pytest.raises(ValueError, match=r"input_ids \(3, 6\) must have the shape of hidden_states"):
        verl.fused_linear_for_ppo(hidden, weight, labels[:, 1:])


def layer_of_verl(monkeypatch, arguments="self, hidden_states, vocab_weights, input_ids, temperature=1.0"):
    """A module with verl's name and its layer, of which the forward has these arguments."""
    space = {}
    exec(f"def forward({arguments}):\n    return 'verl'", space)
    layer = type("FusedLinearForPPO", (torch.nn.Module,), {"forward": space["forward"]})
    module = types.ModuleType(verl.MODULE)
    module.FusedLinearForPPO = layer
    for name in ("verl", "verl.utils", "verl.utils.experimental"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, verl.MODULE, module)
    return layer


def test_the_patch_of_verl(monkeypatch):
    layer = layer_of_verl(monkeypatch)
    own = layer.forward
    hidden, weight, labels = problem()
    verl.patch_verl()
    verl.patch_verl()
    logps, _ = layer()(hidden, weight, labels.clamp(min=0), temperature=0.5)
    torch.testing.assert_close(logps, plain(hidden, weight, labels.clamp(min=0), 0.5))
    verl.unpatch_verl()
    assert layer.forward is own
    verl.unpatch_verl()
    assert layer.forward is own


def test_a_later_patch_of_verl_stays(monkeypatch):
    layer = layer_of_verl(monkeypatch)
    own = layer.forward
    verl.patch_verl()
    layer.forward = later = lambda self, *given: "later"
    verl.unpatch_verl()
    assert layer.forward is later
    layer.forward = own
    verl.patch_verl()
    verl.unpatch_verl()
    assert layer.forward is own


def over(forward):
    """Another patch of verl's forward, which calls what it found; it keeps the attributes of that, as most do."""

    @functools.wraps(forward)
    def later(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        return "later", forward(self, hidden_states, vocab_weights, input_ids, temperature)

    return later


def what_computes(layer):
    """The names of those that compute, from the outside in."""
    hidden, weight, labels = problem()
    found = layer()(hidden, weight, labels.clamp(min=0))
    names = []
    while isinstance(found, tuple) and found[0] == "later":
        names, found = [*names, "later"], found[1]
    return [*names, found if isinstance(found, str) else "ours"]


def test_what_a_later_patch_keeps_of_ours_computes_as_verl_does(monkeypatch):
    layer = layer_of_verl(monkeypatch)
    own = layer.forward
    verl.patch_verl()
    ours = layer.forward
    layer.forward = later = over(ours)
    assert what_computes(layer) == ["later", "ours"]
    verl.unpatch_verl()
    assert layer.forward is later
    assert what_computes(layer) == ["later", "verl"]
    layer.forward = ours  # now they put back what they found
    assert what_computes(layer) == ["verl"]
    verl.patch_verl()
    assert what_computes(layer) == ["ours"]
    verl.unpatch_verl()
    assert layer.forward is own


def test_two_of_ours_with_a_later_patch_between_them(monkeypatch):
    layer = layer_of_verl(monkeypatch)
    own = layer.forward
    verl.patch_verl()
    ours = layer.forward
    layer.forward = later = over(ours)
    verl.patch_verl()
    assert what_computes(layer) == ["ours"]
    verl.unpatch_verl()
    assert layer.forward is later
    assert what_computes(layer) == ["later", "verl"]
    layer.forward = ours
    verl.unpatch_verl()
    assert layer.forward is own


def test_a_patch_under_ours_stays(monkeypatch):
    layer = layer_of_verl(monkeypatch)
    layer.forward = earlier = over(layer.forward)
    verl.patch_verl()
    verl.patch_verl()
    assert what_computes(layer) == ["ours"]
    verl.unpatch_verl()
    assert layer.forward is earlier


@pytest.mark.parametrize(
    "arguments",
    [
        "self, hidden_states, vocab_weights, input_ids, temperature, reduction",
        "self, hidden_states, vocab_weights, input_ids",
    ],
)
def test_another_verl_is_refused(monkeypatch, arguments):
    layer = layer_of_verl(monkeypatch, arguments)
    own = layer.forward
    with pytest.raises(RuntimeError, match=r"patch_verl\(\) knows FusedLinearForPPO"):
        verl.patch_verl()
    assert layer.forward is own
    del sys.modules[verl.MODULE].FusedLinearForPPO
    with pytest.raises(RuntimeError, match="this verl has none"):
        verl.patch_verl()


def test_the_real_layer_of_verl():
    real = pytest.importorskip(verl.MODULE, reason="verl is not installed", exc_type=ImportError)
    hidden, weight, labels = problem(torch.float32)
    ids = labels.clamp(min=0)
    theirs = real.FusedLinearForPPO()(hidden, weight, ids, temperature=0.6)
    verl.patch_verl()
    try:
        mine = real.FusedLinearForPPO()(hidden, weight, ids, temperature=0.6)
    finally:
        verl.unpatch_verl()
    for number in (0, 1):
        torch.testing.assert_close(mine[number], theirs[number], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            gradients(mine[number], (hidden, weight)), gradients(theirs[number], (hidden, weight)), rtol=1e-5, atol=1e-5
        )


# --- OpenRLHF ---------------------------------------------------------------------------------------------------------


def loss_of_openrlhf(chosen, rejected, ref_chosen, ref_rejected, beta, smoothing, ipo):
    """Its formulae: IPO on sums."""
    logits = (chosen - rejected) - (ref_chosen - ref_rejected)
    if ipo:
        return ((logits - 1 / (2 * beta)) ** 2).mean()
    return (-F.logsigmoid(beta * logits) * (1 - smoothing) - F.logsigmoid(-beta * logits) * smoothing).mean()


def pairs():
    g = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(*shape, generator=g, dtype=F64).requires_grad_() for shape in ((4, T, H), (V, H)))
    labels = torch.randint(0, V, (4, T), generator=g)
    labels[0, :3] = labels[2, 5:] = labels[3, :2] = -100
    return hidden, weight, labels, torch.randn(4, generator=g, dtype=F64) - 10


@pytest.mark.parametrize(("ipo", "smoothing"), [(False, 0.0), (False, 0.2), (True, 0.0)])
def test_the_loss_of_openrlhf(ipo, smoothing):
    hidden, weight, labels, ref = pairs()
    logps = plain(hidden[:, :-1], weight, labels[:, 1:]).sum(1)
    expected = loss_of_openrlhf(*logps.chunk(2), *ref.chunk(2), 0.3, smoothing, ipo)
    out = openrlhf.preference_loss(hidden, weight, labels, ref, 0.3, smoothing, ipo, sums_in_ipo=ipo)
    assert_same(out.loss, expected, (hidden, weight))
    torch.testing.assert_close(out.chosen_rewards, (0.3 * (logps - ref)[:2]).detach())


def test_ipo_takes_averages_unless_asked():
    hidden, weight, labels, ref = pairs()
    counts = (labels[:, 1:] != -100).sum(1)
    chosen, rejected = ((plain(hidden[:, :-1], weight, labels[:, 1:]).sum(1) - ref) / counts).chunk(2)
    out = openrlhf.preference_loss(hidden, weight, labels, ref, 0.3, ipo=True)
    assert_same(out.loss, ((chosen - rejected - 1 / 0.6) ** 2).mean(), (hidden, weight))


@pytest.mark.parametrize("options", [{"sums_in_ipo": True}, {"ipo": True, "label_smoothing": 0.1}])
def test_an_option_of_openrlhf_without_effect_is_refused(options):
    with pytest.raises(ValueError, match="has no effect"):
        openrlhf.preference_loss(*pairs(), 0.3, **options)


def test_log_probs_of_openrlhf_are_those_of_rolled_ids():
    hidden, weight, labels = problem()
    rolled = torch.roll(labels.clamp(min=0), -1, dims=1)
    mine = openrlhf.log_probs_from_hidden(hidden, weight, rolled, 0.8)
    assert_same(mine[:, :-1], plain(hidden, weight, rolled, 0.8)[:, :-1], (hidden, weight))


def test_the_real_functions_of_openrlhf():
    utils = pytest.importorskip("openrlhf.models.utils", reason="OpenRLHF is not installed", exc_type=ImportError)
    loss = importlib.import_module("openrlhf.models.loss")
    hidden, weight, labels, ref = (value.detach() for value in pairs())
    hidden, weight = (value.float().requires_grad_() for value in (hidden, weight))
    rolled = torch.roll(labels.clamp(min=0), -1, dims=1)
    theirs = utils.log_probs_from_logits(hidden @ weight.t(), rolled, 0.8)
    mine = openrlhf.log_probs_from_hidden(hidden, weight, rolled, 0.8)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    sums = plain(hidden[:, :-1], weight, labels[:, 1:]).sum(1)
    for ipo in (False, True):
        expected, *rewards = loss.DPOLoss(0.3, ipo=ipo)(*sums.chunk(2), *ref.float().chunk(2))
        out = openrlhf.preference_loss(hidden, weight, labels, ref.float(), 0.3, ipo=ipo, sums_in_ipo=ipo)
        torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close([out.chosen_rewards, out.rejected_rewards], rewards, rtol=1e-5, atol=1e-5)


# --- ms-swift ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_log_probs_of_ms_swift(reduction):
    hidden, weight, labels = problem()
    logps, reduced, mask = ms_swift.get_per_token_logps(hidden, weight, labels, reduction=reduction)
    assert_same(logps, plain(hidden, weight, labels), (hidden, weight))
    logits = (hidden @ weight.t()).detach()
    expected = (logits.mean(-1) if reduction == "mean" else logits.sum(-1)) * (labels != -100)
    torch.testing.assert_close(reduced, expected.to(reduced.dtype), rtol=1e-5, atol=1e-5)
    assert torch.equal(mask, labels != -100)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_real_ms_swift_gives_the_same(reduction):
    pytest.importorskip("swift", reason="ms-swift is not installed")
    mixin = importlib.import_module("swift.rlhf_trainers.rlhf_mixin").RLHFTrainerMixin
    trainer = types.SimpleNamespace(template=types.SimpleNamespace(sequence_parallel_size=1))
    hidden, weight, labels = problem(torch.float32)
    logits = hidden @ weight.t()
    theirs = mixin.get_per_token_logps(trainer, logits, labels, label_pad_token_id=-100, reduction=reduction)
    mine = ms_swift.get_per_token_logps(hidden, weight, labels, label_pad_token_id=-100, reduction=reduction)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    wanted = (hidden, weight)
    torch.testing.assert_close(gradients(mine[0], wanted), gradients(theirs[0], wanted), rtol=1e-5, atol=1e-5)


def test_a_rank_of_ms_swift_without_a_scored_token_stays_in_the_graph():
    hidden, weight, labels = problem()
    logps, *_ = ms_swift.get_per_token_logps(hidden, weight, labels.fill_(-100))
    logps.sum().backward()
    assert hidden.grad.abs().max() == weight.grad.abs().max() == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [({"reduction": "max"}, "unknown reduction 'max'"), ({"labels": torch.zeros(3, 6)}, "but labels")],
)
def test_what_ms_swift_does_not_give_is_named(options, words):
    hidden, weight, labels = problem()
    with pytest.raises(ValueError, match=words):
        ms_swift.get_per_token_logps(**{"hidden": hidden, "weight": weight, "labels": labels} | options)
