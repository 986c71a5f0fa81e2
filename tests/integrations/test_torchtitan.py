"""``FusedPreferenceLoss`` as torchtitan's trainer uses it, with torchtitan's own classes where it is installed."""

import abc
import dataclasses
import importlib
import importlib.util
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from dpo_kernels.integrations import requirements

L, H, V = 6, 8, 13
F64 = torch.float64


def stand_in():
    """``torchtitan.components.loss`` as far as it is used: what recognises a loss, and what a configuration is."""

    class BaseLoss(abc.ABC):
        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config:
            pass

        @abc.abstractmethod
        def __init__(self, config, *, compile_config=None): ...

    class ChunkedLossWrapper(BaseLoss):
        def __init__(self, config, *, compile_config=None):
            self.lm_head = None

        def set_lm_head(self, lm_head):
            self.lm_head = lm_head

    module = types.ModuleType("torchtitan.components.loss")
    module.BaseLoss, module.ChunkedLossWrapper = BaseLoss, ChunkedLossWrapper
    return module


@pytest.fixture
def titan(monkeypatch):
    """Our module, on torchtitan or on its stand-in."""
    if importlib.util.find_spec("torchtitan") is None:
        for name in ("torchtitan", "torchtitan.components"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "torchtitan.components.loss", stand_in())
        monkeypatch.setattr(requirements, "require", lambda *given: None)
    monkeypatch.delitem(sys.modules, "dpo_kernels.integrations.torchtitan", raising=False)
    module = importlib.import_module("dpo_kernels.integrations.torchtitan")
    yield module
    sys.modules.pop("dpo_kernels.integrations.torchtitan", None)


def problem():
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    head = torch.nn.Linear(H, V, bias=False, dtype=F64)
    hidden = torch.randn(4, L, H, generator=g, dtype=F64).requires_grad_()
    labels = torch.randint(0, V, (4, L), generator=g)
    labels[1, 2:] = labels[3, :3] = -100
    return head, hidden, labels, torch.tensor([-5.0, -6.0, -7.0, -8.0], dtype=F64)


def made(titan, head, **options):
    config = titan.FusedPreferenceLoss.Config(**options)
    if hasattr(config, "build"):  # as torchtitan's trainer does it
        loss = config.build(compile_config=None)
        assert type(loss) is titan.FusedPreferenceLoss
    else:
        loss = titan.FusedPreferenceLoss(config, compile_config=None)
    assert isinstance(loss, sys.modules["torchtitan.components.loss"].ChunkedLossWrapper)  # how it is recognised
    loss.set_lm_head(head)
    return loss


def expected(head, hidden, labels, ref, pairs="stacked", beta=0.1):
    logps = head(hidden).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    margins = (logps * (labels != -100)).sum(-1) - ref
    chosen, rejected = margins.chunk(2) if pairs == "stacked" else (margins[0::2], margins[1::2])
    return -F.logsigmoid(beta * (chosen - rejected))


@pytest.mark.parametrize("pairs", ["stacked", "interleaved"])
def test_loss_and_gradients_are_those_of_full_logits(titan, pairs):
    head, hidden, labels, ref = problem()
    mine, metrics = made(titan, head, pairs=pairs, beta=0.3)(
        hidden, labels, torch.tensor(40.0), ref_logps=ref, positions=torch.arange(L)
    )
    theirs = expected(head, hidden, labels, ref, pairs, 0.3).mean()
    torch.testing.assert_close(mine, theirs)
    wanted = (hidden, head.weight)
    torch.testing.assert_close(torch.autograd.grad(mine, wanted), torch.autograd.grad(theirs, wanted))
    assert {"rewards/margins", "logps/chosen"} <= set(metrics)
    assert not any(value.requires_grad for value in metrics.values())


def test_micro_batches_add_up_with_the_pairs_of_all(titan):
    head, hidden, labels, ref = problem()
    loss = made(titan, head)
    parts = [
        loss(hidden[rows], labels[rows], ref_logps=ref[rows], global_valid_pairs=torch.tensor(2.0))[0]
        for rows in (slice(0, None, 2), slice(1, None, 2))
    ]
    torch.testing.assert_close(sum(parts), expected(head, hidden, labels, ref).mean())


def test_losses_by_token_are_divided_by_the_tokens_of_all(titan):
    head, hidden, labels, _ = problem()
    mine, _ = made(titan, head, loss_type="sft")(hidden, labels, torch.tensor(50.0))
    logps = head(hidden).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    torch.testing.assert_close(mine, -logps[:2].sum() / 50)


def test_a_batch_without_a_token_stays_in_the_graph(titan):
    head, hidden, labels, ref = problem()
    mine, _ = made(titan, head)(hidden, labels.fill_(-100), ref_logps=ref)
    mine.backward()
    assert hidden.grad.abs().max() == head.weight.grad.abs().max() == 0


def test_validation_needs_no_gradient(titan):
    head, hidden, labels, ref = problem()
    with torch.no_grad():
        mine, _ = made(titan, head)(hidden, labels, ref_logps=ref)
    torch.testing.assert_close(mine, expected(head, hidden, labels, ref).mean().detach())


def test_what_is_missing_or_unknown_is_named(titan):
    head, hidden, labels, ref = problem()
    loss = made(titan, head)
    with pytest.raises(TypeError, match="not advantages"):
        loss(hidden, labels, ref_logps=ref, advantages=ref)
    loss.set_lm_head(None)
    with pytest.raises(ValueError, match="set_lm_head"):
        loss(hidden, labels, ref_logps=ref)
