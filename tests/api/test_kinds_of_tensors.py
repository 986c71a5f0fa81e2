"""Every argument of every public function, given every kind of thing that is not the tensor it wants.

What is refused is refused in words of ours, which name the argument, whatever the kind: not in torch's.
``tests/api/test_inputs.py`` has the shapes, values and combinations.
"""

from functools import partial

import numpy as np
import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import dpo_kernels as dk
from dpo_kernels.engine import passes
from dpo_kernels.shapes import Head

S, T, H, V = 4, 3, 5, 7
LABELS = torch.tensor([[1, 2, 3], [-100, 4, 5], [6, 0, -100], [3, 2, 1]])
DESIRABLE = torch.tensor([True, False, True, True])


def rand(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def padded(**more):
    return {"hidden": rand(S, T, H), "weight": rand(V, H), "labels": LABELS, "bias": rand(V)} | more


PAIRED = {"ref_logps": -rand(S), "token_weights": rand(S, T)}
BY_TOKEN = {"ref_token_logps": -rand(S, T)}
SCORED = {"ref_hidden": rand(S, T, 4), "ref_weight": rand(V, 4), "ref_bias": rand(V)}
PACKED = {
    "hidden": rand(12, H),
    "weight": rand(V, H),
    "labels": LABELS.flatten(),
    "cu_seqlens": torch.tensor([0, 3, 6, 9, 12]),
    "token_weights": rand(12),
    "ref_logps": -rand(S),
}
BY_PAIR = {
    **{f"{who}_{side}_logps": -rand(2) - 1 for who in ("policy", "ref") for side in ("chosen", "rejected")},
    "chosen_tokens": torch.tensor([3.0, 2.0]),
    "rejected_tokens": torch.tensor([1.0, 4.0]),
    "token_denominator": torch.tensor(3.0),
}
NUMBERS = {"denominator": torch.tensor(2.0), "token_denominator": torch.tensor(2.0), "nll_weight": 1.0}


def updated(**rewards):
    delta = dk.RunningDelta()
    return delta.update(**rewards)


# name: (function, valid arguments, those of them that are tried)
FUNCTIONS = {
    "fused_dpo_loss": (dk.fused_dpo_loss, padded(**PAIRED), ("hidden", "weight", "labels", "bias", *PAIRED)),
    "a scored reference": (dk.fused_dpo_loss, padded(**SCORED), tuple(SCORED)),
    "by token": (dk.fused_dpo_loss, padded(**BY_TOKEN), tuple(BY_TOKEN)),
    "rows": (dk.fused_dpo_loss, padded(hidden=rand(5, H), rows=torch.arange(12).view(S, T) % 5, **PAIRED), ("rows",)),
    "packed": (dk.fused_dpo_loss, PACKED, tuple(PACKED)),
    "numbers": (dk.fused_dpo_loss, padded(**PAIRED, **NUMBERS), tuple(NUMBERS)[:2]),
    "by pair": (
        partial(dk.fused_dpo_loss, loss_type="odpo"),
        padded(**PAIRED, margin=rand(2), pair_weights=rand(2)),
        ("margin", "pair_weights"),
    ),
    "main_grad": (dk.fused_dpo_loss, padded(**PAIRED, main_grad=torch.zeros(V, H)), ("main_grad",)),
    "explain": (dk.explain, padded(**PAIRED), ("hidden", "weight", "labels", *PAIRED)),
    "fused_token_logps": (dk.fused_token_logps, padded(), tuple(padded())),
    "fused_sequence_logps": (
        dk.fused_sequence_logps,
        {name: value for name, value in PACKED.items() if name != "ref_logps"},
        ("hidden", "labels", "cu_seqlens", "token_weights"),
    ),
    "kto": (dk.fused_kto_loss, padded(desirable=DESIRABLE, kl=torch.tensor(0.1), **PAIRED), ("desirable", "kl")),
    "bco": (
        partial(dk.fused_kto_loss, loss_type="bco"),
        padded(desirable=DESIRABLE, delta=torch.tensor(0.1), **PAIRED),
        ("delta",),
    ),
    "dpo_loss": (partial(dk.dpo_loss, loss_type="ipo", nll_weight=1.0), BY_PAIR, tuple(BY_PAIR)),
    "kto_kl": (dk.kto_kl, {"policy_logps": rand(2), "ref_logps": rand(2)}, ("policy_logps", "ref_logps")),
    "RunningDelta": (
        updated,
        {"chosen_rewards": rand(2), "rejected_rewards": rand(3)},
        ("chosen_rewards", "rejected_rewards"),
    ),
    "bradley_terry_loss": (
        dk.bradley_terry_loss,
        {"chosen_rewards": rand(2), "rejected_rewards": rand(2), "margin": rand(2)},
        ("chosen_rewards", "rejected_rewards", "margin"),
    ),
    "bradley_terry_strengths": (dk.bradley_terry_strengths, {"wins": torch.full((3, 3), 2.0)}, ("wins",)),
}
CASES = [(function, name, False) for function, (_, _, names) in FUNCTIONS.items() for name in names]
# With a head that is trained the passes are others, and main_grad is for that alone.
CASES = [case for case in CASES if case[1] != "main_grad"]
CASES += [
    (function, name, True)
    for function, (_, arguments, names) in FUNCTIONS.items()
    for name in names
    if "weight" in arguments and name != "weight"
]

# Numbers of each pair, or counts, may be integers; and what may be left out, None.
INTEGERS_TOO = {
    "margin",
    "pair_weights",
    "denominator",
    "token_denominator",
    "chosen_tokens",
    "rejected_tokens",
    "wins",
}
MAY_BE_NONE = {
    *("bias", "token_weights", "ref_weight", "ref_bias", "denominator", "token_denominator", "main_grad"),
    *("chosen_tokens", "rejected_tokens"),
}


def nested(tensor, layout):
    return torch.nested.nested_tensor(list(tensor) if tensor.dim() > 1 else [tensor, tensor], layout=layout)


def others(name, tensor):
    """(what it is, a thing of another kind made of ``tensor``)."""
    yield "a string", "x"
    yield "on meta", tensor.to("meta")
    yield "an object", object()
    yield "a nested tensor, strided", nested(tensor, torch.strided)
    yield "a sparse tensor", tensor.to_sparse()
    yield "complex", tensor.to(torch.complex64)
    yield "a wrapper", TwoTensor(tensor.clone(), tensor.clone())
    if tensor.dim():
        yield "a list", tensor.tolist()
        yield "an array", np.array(tensor.tolist())
        yield "a nested tensor, jagged", nested(tensor, torch.jagged)
    if tensor.dim() == 2:
        yield "a compressed sparse tensor", tensor.to_sparse_csr()
    if name not in MAY_BE_NONE:
        yield "None", None
    if tensor.dtype != torch.bool and name != "wins":
        yield "bool", tensor > 0
    if tensor.is_floating_point():
        yield "float8", tensor.to(torch.float8_e4m3fn)
        yield "quantised", torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)
        if name not in INTEGERS_TOO:
            yield "integers", tensor.long()
        if tensor.dim():
            yield "of mkldnn", tensor.to_mkldnn()
    else:
        yield "floats", tensor.float()
        yield "bytes", tensor.to(torch.uint8)


def outcome(function, arguments):
    """What a call raised, as text, and whether that was one of ours by its kind."""
    try:
        function(**arguments)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}", type(error) in (ValueError, TypeError)
    return "nothing raised", False


# torch says of compressed sparse and of nested tensors that they are new, of quantised ones that they will go.
@pytest.mark.filterwarnings("ignore:.*(in beta state|in prototype stage|quantize_per_tensor)")
@pytest.mark.parametrize(("function", "name", "trained"), CASES)
def test_another_kind_is_named(function, name, trained):
    call, arguments, _ = FUNCTIONS[function]
    if trained:
        arguments = arguments | {"weight": arguments["weight"].clone().requires_grad_()}
    call(**arguments)
    wrong = []
    for kind, value in others(name, arguments[name]):
        said, ours = outcome(call, arguments | {name: value})
        if not ours or name not in said:
            wrong.append(f"{kind}: {said[:150]}")
    assert wrong == []


def test_what_need_not_be_a_tensor_of_one_kind_is_taken():
    """Integers where there are counts, numbers where there is one, and subclasses that hold numbers of their own."""

    class Named(torch.Tensor):
        pass

    call, arguments, names = FUNCTIONS["fused_dpo_loss"]
    plain = call(**arguments)
    named = call(**arguments | {name: arguments[name].as_subclass(Named) for name in names})
    assert torch.equal(named.loss, plain.loss)
    losses = dk.dpo_loss(**BY_PAIR, loss_type="ipo")[0]
    counts = {name: BY_PAIR[name].long() for name in ("chosen_tokens", "rejected_tokens")}
    assert torch.equal(dk.dpo_loss(**BY_PAIR | counts, loss_type="ipo")[0], losses)
    with pytest.raises(ValueError, match="denominator must be > 0, got 0"):
        dk.fused_dpo_loss(**arguments, denominator=torch.nn.Parameter(torch.tensor(0.0)))


def test_a_head_that_a_collective_has_yet_to_fill_is_waited_for():
    """A launch of a kernel is no operation of torch's, and would be given the address of nothing."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    weight, bias = torch.randn(5, 3), torch.randn(5)
    given = Head(AsyncCollectiveTensor(weight), AsyncCollectiveTensor(bias))
    head = passes._operand_head(given, torch.float32)
    for got, wanted in ((head.weight, weight), (head.bias, bias)):
        assert type(got) is torch.Tensor
        assert got.data_ptr() == wanted.data_ptr()


def test_none_to_average_over():
    nothing = torch.zeros(0)
    with pytest.raises(ValueError, match="policy_logps holds no log-probs: the mean of none is undefined"):
        dk.kto_kl(nothing, nothing)
    delta = dk.RunningDelta()
    assert float(delta.update(nothing, nothing)) == delta.updates == 0  # a batch of neither kind changes nothing
    assert float(delta.update(torch.tensor([2.0, 4.0]), nothing)) == 3.0


def test_traced_on_meta_everything_is_shapes():
    """All tensors on meta is a legal way to ask for shapes; one of them there is a mistake."""
    there = {name: value.to("meta") for name, value in padded(**PAIRED).items()}
    there["weight"].requires_grad_()
    out = dk.FusedDPOLoss()(**there)
    out.loss.backward()
    assert there["weight"].grad.shape == (V, H)
    kto = dk.fused_kto_loss(**there, desirable=DESIRABLE.to("meta"), kl=torch.tensor(0.1, device="meta"))
    group = dk.fused_group_loss(**there, group_sizes=[3, 1])
    del there["ref_logps"]
    logps = dk.fused_sequence_logps(**there)
    assert [t.is_meta for t in (kto.loss, kto.rewards, group.loss, logps)] == [True] * 4
    assert kto.rewards.shape == logps.shape == (S,)
