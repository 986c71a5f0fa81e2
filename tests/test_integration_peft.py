"""Heads that PEFT has wrapped: LoRA, modules_to_save, trained tokens; the same numbers as through the model itself."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

from dpo_kernels import fused_dpo_loss  # noqa: E402
from dpo_kernels.integrations import heads  # noqa: E402
from dpo_kernels.integrations.transformers import fused_lm_head  # noqa: E402
from tests.test_integration_transformers import assert_same, batch, both, full_logits_loss, tiny  # noqa: E402

assert batch  # a fixture

pytestmark = [
    # PEFT 0.21 on transformers 5.23.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # An adapter on a tied head is what is tested.
    pytest.mark.filterwarnings("ignore:.*tie:UserWarning"),
]


def adapted(name="llama", **options):
    torch.manual_seed(2)
    model = peft.get_peft_model(tiny(name), peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, **options))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_(std=0.3)
    return model


CASES = {
    "attention only": {"target_modules": ["q_proj", "v_proj"]},
    "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    "rank-stabilised": {"target_modules": ["lm_head"], "use_rslora": True},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 7]}},
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_full_logits(case, batch):
    model = adapted(**CASES[case])
    if case == "trained tokens":
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "tokens_delta" in n).normal_()
    plain, fused = both(model, batch)
    assert_same(plain, fused)
    assert plain[1]


def test_lora_and_its_bias_on_a_head_with_a_bias(batch):
    model = adapted("phi", target_modules=["lm_head"], lora_bias=True)
    plain, fused = both(model, batch)
    assert_same(plain, fused)
    assert sum("lora_" in name for name in fused[1]) == 3


def test_lora_on_a_tied_head(batch):
    plain, fused = both(adapted("gpt2", target_modules=["lm_head"]), batch)
    assert_same(plain, fused)


def test_the_adapter_on_the_head_matters(batch):
    model = adapted(target_modules=["lm_head"])
    inputs, labels, ref = batch

    def loss():
        hidden, weight, options = fused_lm_head(model)(**inputs)
        return fused_dpo_loss(hidden, weight, labels, shift=True, ref_logps=ref, **options).loss

    with model.disable_adapter():
        without = loss()
        torch.testing.assert_close(without, full_logits_loss(model(**inputs).logits, labels, ref, 0.1))
    assert abs(loss() - without) > 0.01


def test_a_second_adapter_is_followed(batch):
    model = adapted(target_modules=["lm_head"])
    model.add_adapter("ref", model.peft_config["default"])
    head = fused_lm_head(model)
    for name in ("ref", "default"):
        model.set_adapter(name)
        head.check(**batch[0])
    widths = head(**batch[0]).hidden.shape[-1]
    assert widths == 32 + 3


def second_adapter(model, **options):
    """Another LoRA on the head beside the first, both active."""
    torch.manual_seed(3)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=7, target_modules=["lm_head"], **options)
    model.add_adapter("second", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and ".second." in name:
                parameter.normal_(std=0.3)
    model.base_model.set_adapter(["default", "second"])
    return model


@pytest.mark.parametrize(("name", "bias"), [("llama", False), ("phi", True)])
def test_two_active_adapters_on_the_head_are_both_used(batch, name, bias):
    model = second_adapter(adapted(name, target_modules=["lm_head"], lora_bias=bias), lora_bias=bias)
    plain, fused = both(model, batch)
    assert_same(plain, fused)
    assert sum("lora_" in name for name in fused[1]) == (6 if bias else 4)
    hidden, weight, options = fused_lm_head(model, check=False)(**batch[0])
    logits = torch.nn.functional.linear(hidden, weight, options["bias"])
    torch.testing.assert_close(logits, model(**batch[0]).logits, rtol=1e-5, atol=1e-5)
    model.set_adapter("default")
    assert (logits - model(**batch[0]).logits).abs().max() > 0.1


def test_a_saved_head_follows_the_adapter(batch):
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lm_head" in n and p.requires_grad).add_(1.0)
    head = fused_lm_head(model)
    trained = head(**batch[0]).weight
    with model.disable_adapter():
        head.check(**batch[0])
        assert not torch.equal(head(**batch[0]).weight, trained)


def test_a_small_update_is_not_lost_in_sixteen_bits(batch):
    model = adapted(target_modules=["lm_head"]).to(torch.bfloat16)
    hidden, weight, _ = fused_lm_head(model)(**batch[0])
    assert weight.dtype == hidden.dtype == torch.bfloat16
    assert torch.equal(weight[:, 32:], model.get_output_embeddings().lora_B["default"].weight)


def test_dropout_and_what_is_not_plain_lora_on_the_head_are_refused(batch):
    model = adapted(target_modules=["lm_head"], lora_dropout=0.1).train()
    with pytest.raises(ValueError, match=r"lora_dropout=0\.1"):
        fused_lm_head(model, check=False)(**batch[0])
    fused_lm_head(model.eval())(**batch[0])
    with pytest.raises(ValueError, match=r"DoRA|Dora"):
        fused_lm_head(adapted(target_modules=["lm_head"], use_dora=True))(**batch[0])
    adalora = peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], total_step=9)
    with pytest.raises(ValueError, match="'default' is not a plain LoRA: SVDLinear"):
        fused_lm_head(peft.get_peft_model(tiny("llama"), adalora))(**batch[0])
    ia3 = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["lm_head"], feedforward_modules=[])
    with pytest.raises(ValueError, match="not a plain LoRA"):
        fused_lm_head(peft.get_peft_model(tiny("llama"), ia3))(**batch[0])


def test_prompt_learning_is_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="virtual tokens"):
        fused_lm_head(peft.get_peft_model(tiny("llama"), config))


def test_a_deep_copy_has_adapters_of_its_own(batch):
    model = adapted(target_modules=["q_proj", "lm_head"])
    fused_lm_head(model).attach()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-2.0)

    def work(outputs, hidden, weight, options):
        return hidden @ weight.t()

    logits = [attached(**batch[0], fused_call=work) for attached in (model, twin)]
    for attached, mine in zip((model, twin), logits, strict=True):
        torch.testing.assert_close(mine, attached(**batch[0]).logits)
    assert (logits[0] - logits[1]).abs().max() > 0.1


def test_what_counts_as_an_adapter_on_the_head():
    assert heads.has_adapter(fused_lm_head(adapted(target_modules=["lm_head"])).output_embedding)
    assert not heads.has_adapter(fused_lm_head(adapted(**CASES["saved head"])).output_embedding)
    assert not heads.has_adapter(None)
