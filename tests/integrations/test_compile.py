"""Whole steps of models under torch's transformations: compiled, checkpointed, accumulated, of many lengths."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

pytest.importorskip("transformers", reason="transformers is not installed")

from dpo_kernels import fused_dpo_loss
from dpo_kernels.integrations.transformers import fused_lm_head
from tests.integration_helpers import V, tiny

MODELS = ("llama", "gemma2", "gpt2")  # plain; a soft cap; a tied head


def batch_of(length, pairs=2):
    g = torch.Generator().manual_seed(length)
    ids = torch.randint(3, V, (2 * pairs, length), generator=g)
    labels = ids.clone()
    labels[:, :2] = -100
    labels[1, length - 2 :] = -100
    return ids, labels, torch.randn(2 * pairs, generator=g) - 2.0 * length


def step_of(head, **extra):
    """What a training loop compiles: backbone, head and loss."""

    def step(ids, labels, ref_logps):
        hidden, weight, options = head(input_ids=ids, attention_mask=torch.ones_like(ids))
        return fused_dpo_loss(hidden, weight, labels, ref_logps=ref_logps, shift=True, **options, **extra).loss

    return step


def checked_head(model):
    head = fused_lm_head(model)
    ids, _, _ = batch_of(7)
    head.check(input_ids=ids, attention_mask=torch.ones_like(ids))
    return head


def trained(model, step, *arguments):
    model.zero_grad()
    loss = step(*arguments)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(got, wanted):
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-5, atol=1e-6)
    assert got[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        torch.testing.assert_close(got[1][name], grad, rtol=2e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


def of_one_layer(name):
    """A model without its later layers: the same graph again, none of it ours, and most of what is compiled."""
    model = tiny(name)
    backbone = model.base_model
    layers = "h" if name == "gpt2" else "layers"
    setattr(backbone, layers, getattr(backbone, layers)[:1])
    model.config.num_hidden_layers = 1
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_step_is_the_step_and_serves_every_length(name):
    model = of_one_layer(name)
    step = step_of(checked_head(model))
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    every = name == MODELS[0]  # every size is a symbol, which takes twice as long; in the others the length alone
    compiled = torch.compile(step, fullgraph=True, dynamic=True if every else None, backend=counter)
    compiles = []
    for length in (9, 12, 17, 33):
        batch = batch_of(length)
        for tensor in () if every else batch[:2]:
            torch._dynamo.mark_dynamic(tensor, 1)
        assert_alike(trained(model, compiled, *batch), trained(model, step, *batch_of(length)))
        compiles.append(counter.frame_count)
    assert compiles[0] >= 1
    assert compiles == compiles[:1] * 4  # the first compiles, the others do not


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_activation_checkpointing_changes_nothing(name):
    model = tiny(name).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = trained(model, step_of(checked_head(model)), *batch_of(9))
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable({"use_reentrant": False})
    assert_alike(trained(again, step_of(checked_head(again)), *batch_of(9)), plain)


@pytest.mark.parametrize("accelerated", [False, True])
def test_accumulated_steps_are_one_large_batch(accelerated):
    backward, divisor = torch.Tensor.backward, 1
    if accelerated:  # its backward divides every loss by the number of micro-batches
        accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
        backward, divisor = accelerate.Accelerator(gradient_accumulation_steps=2).backward, 2
    model = tiny("gpt2")
    ids, labels, ref_logps = batch_of(9, pairs=3)
    whole = trained(model, step_of(checked_head(model)), ids, labels, ref_logps)
    model.zero_grad()
    step, total = step_of(checked_head(model), denominator=3 / divisor), 0.0
    for pairs in ([0], [1, 2]):
        rows = [*pairs, *(3 + pair for pair in pairs)]
        loss = step(ids[rows], labels[rows], ref_logps[rows])
        backward(loss)
        total = total + loss.detach() / divisor
    assert_alike((total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}), whole)
