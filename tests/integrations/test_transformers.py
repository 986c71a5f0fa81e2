"""``fused_lm_head`` on tiny random models of every head convention: the same loss and gradients as full logits."""

import copy
import pickle
import types

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from dpo_kernels import fused_sequence_logps  # noqa: E402
from dpo_kernels.integrations.transformers import fused_lm_head  # noqa: E402
from tests.integration_helpers import CONFIGS, H, V, assert_same, batch, both, tiny  # noqa: E402

assert batch  # a fixture


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_full_logits(name, batch):
    assert_same(*both(tiny(name), batch))


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite", "falcon_h1"])
def test_a_wrong_scale_is_caught(name, batch):
    head = fused_lm_head(tiny(name))
    head.logit_scale *= 1.01
    with pytest.raises(RuntimeError, match="does not reproduce the logits"):
        head(**batch[0])


def test_a_forgotten_softcap_is_caught_even_where_logits_are_small(batch):
    model = tiny("gemma2")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-3)
    model.config.final_logit_softcapping = 30.0
    head = fused_lm_head(model)
    head.softcap = None
    with pytest.raises(RuntimeError, match="softcap=None"):
        head(**batch[0])
    fused_lm_head(model)(**batch[0])


def test_a_forgotten_bias_is_caught(batch, monkeypatch):
    head = fused_lm_head(tiny("phi"))
    given = head.operands
    monkeypatch.setattr(head, "operands", lambda h: (o := given(h))._replace(options=o.options | {"bias": None}))
    with pytest.raises(RuntimeError, match="no bias"):
        head(**batch[0])


SHIFT = torch.where(torch.arange(V) % 2 == 0, 2.0, 0.0)


def test_what_is_added_to_logits_is_caught_in_sixteen_bits(batch):
    model = tiny("llama").to(torch.bfloat16)
    fused_lm_head(model).check(**batch[0])
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + SHIFT.to(logits.dtype))
    with pytest.raises(RuntimeError, match="does not reproduce the logits"):
        fused_lm_head(model).check(**batch[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_check_forgives_sixteen_bits(name, batch):
    fused_lm_head(tiny(name).to(torch.bfloat16)).check(**batch[0])


def test_the_check_forgives_the_rounding_of_tiny_logits(batch):
    model = tiny("llama").to(torch.float16)
    with torch.no_grad():
        model.lm_head.weight.mul_(3e-7)
    fused_lm_head(model).check(**batch[0])


def test_the_check_leaves_modes_and_random_numbers_alone(batch):
    model = tiny("gpt2").train()
    model.transformer.h[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    fused_lm_head(model).check(**batch[0])
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


BEFORE_THE_HEAD = [
    ("BertConfig", {}),
    ("RobertaConfig", {}),
    ("ModernBertDecoderConfig", {}),
    ("ElectraConfig", {"embedding_size": 16}),
    ("ElectraConfig", {"embedding_size": H}),
]


@pytest.mark.parametrize(("name", "options"), BEFORE_THE_HEAD)
def test_a_transform_before_the_head_is_refused_with_the_reason(name, options):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": H, "intermediate_size": 48}
    config = getattr(transformers, name)(**sizes, vocab_size=V, is_decoder=True, pad_token_id=0, **options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"not linear in the hidden states: .*Linear"):
        fused_lm_head(model)


def test_a_quantised_head_is_refused_with_the_reason():
    class Linear8bitLt(torch.nn.Linear):
        pass

    model = tiny("llama")
    model.lm_head = Linear8bitLt(H, V, bias=False)
    with pytest.raises(ValueError, match=r"quantised.*keep the head out"):
        fused_lm_head(model)
    model.lm_head = torch.nn.Linear(H, V, bias=False)
    model.lm_head.weight = torch.nn.Parameter(torch.ones(V, H, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="int8"):
        fused_lm_head(model)


def test_what_is_not_a_causal_model_is_refused():
    with pytest.raises(TypeError, match="got Linear"):
        fused_lm_head(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no output embedding"):
        fused_lm_head(tiny("llama").model)


def test_attached_the_work_is_done_in_forward(batch):
    model = tiny("llama")
    inputs, labels, _ = batch
    plain = model(**inputs).logits
    head = fused_lm_head(model).attach()
    assert fused_lm_head(model).attach().model is model
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))

    def work(outputs, hidden, weight, options):
        assert outputs.last_hidden_state.shape == (4, 11, H)
        return fused_sequence_logps(hidden, weight, labels, shift=True, **options)

    got = model(**inputs, fused_call=work)
    assert len(calls) == 1
    assert torch.equal(model(inputs["input_ids"], inputs["attention_mask"], fused_call=work), got)
    hidden, weight, options = head(**inputs)
    assert torch.equal(fused_sequence_logps(hidden, weight, labels, shift=True, **options), got)
    assert torch.equal(model(**inputs).logits, plain)
    generated = model.generate(inputs["input_ids"][:1], max_new_tokens=2, do_sample=False)
    assert generated.shape == (1, 13)


def test_the_check_does_not_enter_what_wraps_the_model_twice(batch):
    model = tiny("llama")
    fused_lm_head(model).attach()
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)  # one object, as accelerate does it
    hidden = model(**batch[0], fused_call=lambda outputs, hidden, weight, options: hidden @ weight.t())
    assert hidden.dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("attached_again", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_deep_copy_computes_with_its_own_weights(batch, wrapped, attached_again):
    inputs, labels, _ = batch
    model = tiny("llama")
    fused_lm_head(model).attach()
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    if wrapped:  # as accelerate does it with a method
        model.forward = types.MethodType(autocast(model.forward.__func__), model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].mlp.up_proj.weight.mul_(3.0)
        twin.lm_head.weight.mul_(0.5)
    if attached_again:
        fused_lm_head(twin).attach()
        assert twin.forward.fused_call.model is twin

    def work(outputs, hidden, weight, options):
        return fused_sequence_logps(hidden, weight, labels, shift=True, **options)

    results = []
    for attached in (model, twin):
        plain = tiny("llama")
        plain.load_state_dict(attached.state_dict())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=wrapped):
            assert torch.equal(attached(**inputs).logits, plain(**inputs).logits)
            results.append(attached(**inputs, fused_call=work))
            assert torch.equal(results[-1], work(None, *fused_lm_head(plain)(**inputs)))
    assert (results[0] - results[1]).abs().min() > 0.1


def test_a_deep_copy_that_would_run_the_original_says_so(batch):
    model = tiny("llama")
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)  # a function, no method of the model
    fused_lm_head(model).attach()
    logits = model(**batch[0]).logits
    twin = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="would run the original"):
        twin(**batch[0])
    assert torch.equal(model(**batch[0]).logits, logits)


def test_a_pickled_model_is_a_plain_one(batch):
    model = tiny("llama")
    fused_lm_head(model).attach()
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(**batch[0]).logits, model(**batch[0]).logits)
    with torch.no_grad():
        loaded.lm_head.weight.mul_(0.5)
    fused_lm_head(loaded).attach()
    logits = loaded(**batch[0], fused_call=lambda outputs, hidden, weight, options: hidden @ weight.t())
    torch.testing.assert_close(logits, 0.5 * model(**batch[0]).logits)


def test_autocast(batch):
    model = tiny("llama")
    inputs, labels, _ = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, weight, options = fused_lm_head(model)(**inputs)
        logps = fused_sequence_logps(hidden, weight, labels, shift=True, **options)
    exact_hidden, _, _ = fused_lm_head(model)(**inputs)
    exact = fused_sequence_logps(exact_hidden, weight, labels, shift=True, **options)
    torch.testing.assert_close(logps, exact, rtol=0.05, atol=0.5)
    model = copy.deepcopy(model).to(torch.bfloat16)
    hidden, weight, _ = fused_lm_head(model)(**inputs)
    assert hidden.dtype == weight.dtype == torch.bfloat16


def test_a_head_that_is_not_loaded_is_refused_with_the_reason():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"](transformers))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: the head's weight is on the meta device"):
        fused_lm_head(model)
