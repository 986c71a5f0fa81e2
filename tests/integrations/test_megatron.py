"""``output_processor`` against what Megatron's output layer makes, called as Megatron Core 0.18 calls its hook."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import dpo_kernels as dk
from dpo_kernels.integrations.megatron import HeadContext, output_processor
from tests.distributed import gloo, megatron

S, B, H, V = 7, 4, 6, 13
F64 = torch.float64


class Model(torch.nn.Module):
    """The end of Megatron's ``GPTModel``: an output layer, and the hook with all the arguments that it is given."""

    def __init__(self, rows=V, tied=False, factor=1.0, bias=False):
        super().__init__()
        torch.manual_seed(3)
        self.output_layer = torch.nn.Linear(H, rows, bias=bias, dtype=F64)
        self.embedding = torch.nn.Parameter(torch.randn(rows, H, dtype=F64)) if tied else None
        self.config = SimpleNamespace(sequence_parallel=False)
        self.factor = factor

    def forward(
        self, hidden, labels, loss_mask=None, packed_seq_params=None, output_processor=None,
        output_processor_context=None,
    ):  # fmt: skip
        if output_processor is not None:
            return output_processor(
                hidden_states=hidden,
                output_layer=self.output_layer,
                output_weight=self.embedding,
                labels=labels,
                loss_mask=loss_mask,
                input_ids=None,
                position_ids=None,
                attention_mask=None,
                decoder_input=None,
                inference_context=None,
                packed_seq_params=packed_seq_params,
                runtime_gather_output=None,
                context=output_processor_context,
                compute_language_model_loss=None,
                scale_logits=lambda logits: logits * self.factor,
                config=self.config,
            )
        weight = self.output_layer.weight if self.embedding is None else self.embedding
        logits = F.linear(hidden, weight, self.output_layer.bias) * self.factor
        logps = logits.transpose(0, 1).log_softmax(-1)
        return logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)


def batch(vocab=V):
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(S, B, H, generator=g, dtype=F64).requires_grad_()
    labels = torch.randint(0, vocab, (B, S), generator=g)
    labels[1, :3] = labels[3, 5:] = -100
    return hidden, labels


def hooked(model, *given, context=None, **named):
    context = HeadContext() if context is None else context
    return model(*given, output_processor=output_processor, output_processor_context=context, **named)


def assert_same(mine, theirs, model, hidden):
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    wanted = [hidden, *(parameter for parameter in model.parameters())]
    got = [
        torch.autograd.grad(values.square().sum(), wanted, retain_graph=True, allow_unused=True)
        for values in (mine, theirs)
    ]
    for one, other in zip(*got, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"factor": 0.25}, {"bias": True}], ids=str)
def test_log_probs_are_those_of_the_output_layer(options):
    model, (hidden, labels) = Model(**options), batch()
    assert_same(hooked(model, hidden, labels), model(hidden, labels), model, hidden)


def test_a_padded_vocabulary_is_cut():
    model, (hidden, labels) = Model(rows=16), batch()
    got = hooked(model, hidden, labels, context=HeadContext(vocab_size=V))
    whole = Model()
    whole.output_layer.weight.data = model.output_layer.weight.data[:V]
    torch.testing.assert_close(got, whole(hidden, labels))
    assert (hooked(model, hidden, labels) - got).abs().max() > 1e-3  # Megatron's own sum has the padding in it


def test_positions_without_loss_are_not_scored():
    model, (hidden, labels) = Model(), batch()
    loss_mask = torch.ones(B, S)
    loss_mask[:, 4:] = 0
    expected = model(hidden, labels.masked_fill(loss_mask == 0, -100))
    assert_same(hooked(model, hidden, labels, loss_mask=loss_mask), expected, model, hidden)


def test_a_batch_without_loss_stays_in_the_graph():
    model, (hidden, labels) = Model(), batch()
    hooked(model, hidden, labels, loss_mask=torch.zeros(B, S)).sum().backward()
    assert hidden.grad.abs().max() == model.output_layer.weight.grad.abs().max() == 0


LOSS = {"beta": 0.4, "ref_logps": torch.tensor([-9.0, -8.0, -7.0, -12.0], dtype=F64)}


@pytest.mark.parametrize("rows", [V, 16])
def test_the_loss_of_pairs_is_that_of_the_log_probs(rows):
    model, (hidden, labels) = Model(rows=rows), batch()
    kept = []
    got = hooked(model, hidden, labels, context=HeadContext(loss=LOSS, vocab_size=V, keep=kept.append))
    cut = Model()
    cut.output_layer.weight.data = model.output_layer.weight.data[:V]
    chosen, rejected = (cut(hidden, labels).sum(1) - LOSS["ref_logps"]).chunk(2)
    expected = -F.logsigmoid(0.4 * (chosen - rejected)).mean()
    torch.testing.assert_close(got, expected)
    mine, theirs = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for loss in (got, expected))
    torch.testing.assert_close(mine, theirs)
    assert isinstance(kept[0], dk.DPOLossOutput)


def test_a_packed_batch_has_its_own_sequences():
    model, (hidden, labels) = Model(), batch()
    flat, row = hidden.transpose(0, 1).reshape(B * S, 1, H), labels.reshape(1, -1)
    packed = SimpleNamespace(cu_seqlens_q=torch.arange(0, B * S + 1, S, dtype=torch.int32))
    got = hooked(model, flat, row, packed_seq_params=packed, context=HeadContext(loss=LOSS))
    torch.testing.assert_close(got, hooked(model, hidden, labels, context=HeadContext(loss=LOSS)))
    assert_same(hooked(model, flat, row), model(flat, row), model, hidden)


def test_padding_within_a_packed_batch_moves_the_boundaries():
    model, (hidden, labels) = Model(), batch()
    flat, row = hidden.transpose(0, 1).reshape(B * S, 1, H), labels.clone()
    row[:, 5:] = -100  # every sequence has five tokens and two of padding
    packed = SimpleNamespace(
        cu_seqlens_q=torch.arange(0, B * 5 + 1, 5, dtype=torch.int32),
        cu_seqlens_q_padded=torch.arange(0, B * S + 1, S, dtype=torch.int32),
    )
    got = hooked(model, flat, row.reshape(1, -1), packed_seq_params=packed, context=HeadContext(loss=LOSS))
    torch.testing.assert_close(got, hooked(model, hidden, row, context=HeadContext(loss=LOSS)))


def test_a_frozen_head_has_no_main_grad():
    model, (hidden, labels) = Model(), batch()
    plain = hooked(model, hidden, labels, context=HeadContext(loss=LOSS))
    weight = model.output_layer.weight.requires_grad_(False)
    weight.main_grad = torch.zeros_like(weight)
    mine = hooked(model, hidden, labels, context=HeadContext(loss=LOSS, main_grad_scale=1.0))
    torch.testing.assert_close(*(torch.autograd.grad(loss, hidden) for loss in (mine, plain)))
    assert weight.main_grad.abs().max() == 0


def with_main_grad(model, hidden, labels, shared):
    """A step as Megatron does it: the hook after a parameter's gradient adds it to ``main_grad`` or drops it."""
    weight = model.output_layer.weight if model.embedding is None else model.embedding
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight), False
    weight.zero_out_wgrad = shared
    ready = []

    def after(parameter):
        if not parameter.grad_added_to_main_grad or parameter.zero_out_wgrad:
            parameter.main_grad.add_(parameter.grad)
        parameter.grad = None
        ready.append(parameter)

    handle = weight.register_post_accumulate_grad_hook(after)
    loss = hooked(model, hidden, labels, context=HeadContext(loss=LOSS, main_grad_scale=0.25))
    if shared:
        loss = loss + 4 * weight[:3].sum()  # the use as an embedding
    (0.25 * loss).backward()
    handle.remove()
    assert len(ready) == 1  # Megatron waits for it
    return weight.main_grad


@pytest.mark.parametrize("shared", [False, True])
def test_the_head_s_gradient_is_in_main_grad_once(shared):
    model, (hidden, labels) = Model(tied=shared), batch()
    weight = model.embedding if shared else model.output_layer.weight
    loss = hooked(model, hidden, labels, context=HeadContext(loss=LOSS))
    expected = torch.autograd.grad(0.25 * loss, weight)[0]
    if shared:
        expected[:3] += 1
    torch.testing.assert_close(with_main_grad(model, hidden, labels, shared), expected)


def test_what_megatron_adds_later_is_not_added_twice():
    model, (hidden, labels) = Model(), batch()
    with_main_grad(model, hidden, labels, shared=False)
    assert model.output_layer.weight.grad_added_to_main_grad


def test_without_a_main_grad_autograd_has_the_gradient():
    model, (hidden, labels) = Model(), batch()
    plain = hooked(model, hidden, labels, context=HeadContext(loss=LOSS))
    mine = hooked(model, hidden, labels, context=HeadContext(loss=LOSS, main_grad_scale=1.0))
    torch.testing.assert_close(*(torch.autograd.grad(loss, model.output_layer.weight) for loss in (mine, plain)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": None}, "needs labels"),
        ({"context": HeadContext(loss=LOSS, vocab_size=9, main_grad_scale=1.0)}, "a head without padding"),
        ({"scale_logits": torch.tanh}, "does not multiply logits by a number"),
        (
            {
                "config": SimpleNamespace(sequence_parallel=False, context_parallel_size=2),
                "context": HeadContext(loss=LOSS),
            },
            "context_parallel_size is 2: this rank has a part of each sequence",
        ),
        ({"context": HeadContext(vocab_size=14)}, "vocab_size is 14, but weight has 13 rows"),
        ({"context": HeadContext(loss=LOSS, vocab_size=14)}, "vocab_size is 14, but weight has 13 rows"),
        ({"context": HeadContext(loss=LOSS, vocab_size=0)}, "vocab_size must be at least 1"),
        ({"packed_seq_params": SimpleNamespace(), "context": HeadContext(loss=LOSS)}, "a packed batch has one row"),
    ],
)
def test_what_does_not_fit_is_named(change, words):
    model, (hidden, labels) = Model(), batch()
    given = {
        "hidden_states": hidden, "output_layer": model.output_layer, "output_weight": None, "labels": labels,
        "context": HeadContext(), "config": model.config,
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        output_processor(**given | change)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_head_that_is_split_over_ranks(sequence_parallel, tmp_path):
    made = megatron.tensors()
    hidden, weight = made["hidden"].requires_grad_(), made["weight"][: megatron.V].requires_grad_()
    logits = 0.5 * (hidden @ weight.t()) / 0.8
    logps = logits.transpose(0, 1).log_softmax(-1).gather(-1, made["labels"].clamp(min=0)[..., None])[..., 0]
    logps = logps * (made["labels"] != -100)
    grads = torch.autograd.grad((logps * made["upstream"]).sum(), (hidden, weight))
    rows = F.pad(grads[1], (0, 0, 0, megatron.PADDED - megatron.V)).chunk(2)
    found = gloo.run("log_probs", 2, tmp_path, sequence_parallel, module="megatron")
    for rank, each in enumerate(found):
        for values in each["logps"]:
            torch.testing.assert_close(values, logps.detach())
        torch.testing.assert_close(each["hidden"], grads[0].chunk(2)[rank] if sequence_parallel else grads[0])
        torch.testing.assert_close(each["rows"], rows[rank])


@pytest.mark.parametrize("split_first", [True, False])
def test_heads_that_share_a_context_have_their_own_groups(split_first, tmp_path):
    made = megatron.tensors()
    logits = made["hidden"] @ made["weight"].t()
    logps = logits.transpose(0, 1).log_softmax(-1).gather(-1, made["labels"].clamp(min=0)[..., None])[..., 0]
    logps = logps * (made["labels"] != -100)
    for found in gloo.run("two_heads", 2, tmp_path, split_first, module="megatron"):
        for values in found:
            torch.testing.assert_close(values, logps)


def test_log_probs_need_no_whole_sequence():
    model, (hidden, labels) = Model(), batch()
    model.config.context_parallel_size = 2
    assert_same(hooked(model, hidden, labels), model(hidden, labels), model, hidden)


def test_the_loss_of_sequences_that_are_split_over_ranks(tmp_path):
    made = megatron.tensors()
    hidden, loss = made["hidden"].requires_grad_(), {"beta": 0.4, "reference_free": True}
    logits = hidden @ made["weight"][: megatron.V].t()
    logps = logits.transpose(0, 1).log_softmax(-1).gather(-1, made["labels"].clamp(min=0)[..., None])[..., 0]
    chosen, rejected = (logps * (made["labels"] != -100)).sum(1)
    expected = -F.logsigmoid(0.4 * (chosen - rejected))
    grads = torch.autograd.grad(expected, hidden)[0].chunk(2)
    found = gloo.run("split_sequences", 2, tmp_path, loss, module="megatron")
    for (value, grad), theirs in zip(found, grads, strict=True):
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(grad, theirs)


def test_megatrons_own_layer_over_ranks(tmp_path):
    pytest.importorskip("megatron.core.tensor_parallel", reason="Megatron Core is not installed", exc_type=ImportError)
    for theirs, mine in gloo.run("beside_megatrons_layer", 2, tmp_path, module="megatron"):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        assert min(float(value.abs().max()) for value in mine) > 0.1
