"""Heads that PEFT has wrapped: LoRA, modules_to_save, trained tokens; the same numbers as through the model itself."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

from dpo_kernels import fused_dpo_loss  # noqa: E402
from dpo_kernels.integrations import lm_head  # noqa: E402
from dpo_kernels.integrations.precompute import precompute_reference_logps  # noqa: E402
from dpo_kernels.integrations.transformers import fused_lm_head  # noqa: E402
from tests.integration_helpers import V, assert_same, batch, both, full_logits_loss, tiny  # noqa: E402

assert batch  # a fixture

pytestmark = [
    # PEFT 0.21 on transformers 5.23.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # An adapter on a tied head is what is tested.
    pytest.mark.filterwarnings("ignore:.*tie:UserWarning"),
    # Shadow of PEFT 0.21 on transformers 5.24.
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
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


# --- what is compared for each state of the adapters ------------------------------------------------------------------


def logits_of(outputs, hidden, weight, options):
    return torch.nn.functional.linear(hidden, weight, options["bias"])


def doubled_by_the_adapter(model):
    """A head whose logits are what the fused head says only while its adapters are off."""
    layer = model.get_output_embeddings()
    layer.register_forward_hook(lambda module, args, out: out if module.disable_adapters else 2.0 * out)
    return model


@pytest.mark.parametrize("attached", [True, False])
def test_each_state_of_the_adapters_is_compared(attached, batch):
    model = doubled_by_the_adapter(adapted(target_modules=["lm_head"]))
    head = fused_lm_head(model)
    if attached:
        head.attach()

    def call():
        return model(**batch[0], fused_call=logits_of) if attached else logits_of(None, *head(**batch[0]))

    with model.disable_adapter():  # as a reference that is the policy without its adapters
        torch.testing.assert_close(call(), model(**batch[0]).logits)
        assert head.checked
    assert not head.checked
    with pytest.raises(RuntimeError, match="does not reproduce the logits"):
        call()


def test_a_state_is_compared_once(batch):
    model = adapted(target_modules=["lm_head"])
    model.add_adapter("ref", model.peft_config["default"])
    fused_lm_head(model).attach()
    twin, seen = copy.deepcopy(model), []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(model.active_adapter))
    for name in ("default", "ref", "default", "ref"):
        model.set_adapter(name)
        model(**batch[0], fused_call=logits_of)
    model.merge_adapter()
    model(**batch[0], fused_call=logits_of)
    assert seen == ["default", "ref", "ref"]
    twin.lm_head.register_forward_hook(lambda module, args, out: seen.append(twin.active_adapter))
    for name in ("default", "ref"):  # of the same class and configuration
        twin.set_adapter(name)
        twin(**batch[0], fused_call=logits_of)
    assert len(seen) == 3


def test_a_changed_scale_is_compared_again(batch):
    head = fused_lm_head(tiny("granite"))
    head(**batch[0])
    head.logit_scale *= 1.02
    with pytest.raises(RuntimeError, match="does not reproduce the logits"):
        head(**batch[0])


# --- adapters that act in PEFT's own forward --------------------------------------------------------------------------


def alora():
    return adapted(target_modules=["q_proj"], alora_invocation_tokens=[V - 2, V - 1])


@pytest.fixture
def xlora(tmp_path):
    for name in "ab":
        adapted(target_modules=["q_proj"]).save_pretrained(tmp_path / name)
    model = tiny("llama")
    model.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1,
        adapters={"0": str(tmp_path / "a"), "1": str(tmp_path / "b")},
    )  # fmt: skip
    return peft.get_peft_model(model, config).eval()


ROWS = [{"prompt_ids": [5, V - 2, V - 1], "chosen_ids": [7, 8, 9], "rejected_ids": [9, 10]}]


@pytest.mark.parametrize("kind", ["aLoRA", "XLORA", "POLY", "SHADOW"])
def test_an_adapter_that_acts_in_pefts_own_forward_is_not_left_out(kind, request, batch, tmp_path):
    if kind == "POLY":
        config = peft.PolyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2, n_tasks=2, n_skills=2)
        model = peft.get_peft_model(tiny("llama"), config)
    elif kind == "SHADOW":
        if not hasattr(peft, "ShadowConfig"):
            pytest.skip("this version of PEFT has no Shadow")
        model = peft.get_peft_model(tiny("llama"), peft.ShadowConfig(task_type="CAUSAL_LM"))
    else:
        model = alora() if kind == "aLoRA" else request.getfixturevalue("xlora")
    refused = pytest.raises(ValueError, match=rf"'default' \({kind}\) acts in PEFT's own forward.*disable_adapter")
    with refused:
        fused_lm_head(model)
    with refused:
        fused_lm_head(model, check=False)
    with refused:
        fused_lm_head(model.get_base_model())
    with refused:
        precompute_reference_logps(model, ROWS, tmp_path / "logps", progress=False)
    with model.disable_adapter():  # where there is nothing to leave out
        head = fused_lm_head(model)
        torch.testing.assert_close(logits_of(None, *head(**batch[0])), model(**batch[0]).logits)
        head.attach()
        torch.testing.assert_close(model(**batch[0], fused_call=logits_of), model(**batch[0]).logits)
    with refused:
        head(**batch[0])
    if kind != "POLY":  # which wants task_ids, and says so itself
        with refused:
            model(**batch[0], fused_call=logits_of)


def test_an_adapter_that_is_not_active_is_no_reason_to_refuse(batch):
    model = adapted(target_modules=["q_proj"])
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=3, target_modules=["q_proj"], alora_invocation_tokens=[V - 2, V - 1]
    )
    model.add_adapter("activated", config)
    head = fused_lm_head(model)
    head(**batch[0])
    head.attach()
    twin = copy.deepcopy(model)  # whose PEFT model the head does not know
    twin(**batch[0], fused_call=logits_of)
    for changed in (model, twin):
        changed.set_adapter("activated")
        with pytest.raises(ValueError, match=r"'activated' \(aLoRA\)"):
            changed(**batch[0], fused_call=logits_of)
        with changed.disable_adapter():
            changed(**batch[0], fused_call=logits_of)


def test_what_only_pefts_own_forward_reads_is_refused(batch):
    head = fused_lm_head(adapted(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapter_names: only PEFT's own forward reads this"):
        head(**batch[0], adapter_names=["default"] * 4)


@pytest.mark.parametrize("case", ["lora on the head", "saved head"])
def test_a_head_with_another_adapter_for_each_sequence_is_refused(case, batch):
    model = adapted(**CASES[case]).eval()
    fused_lm_head(model).attach()
    model(**batch[0], fused_call=logits_of)
    with pytest.raises(ValueError, match="adapter_names chooses an adapter of the head for each sequence"):
        model(**batch[0], adapter_names=["default", "__base__"] * 2, fused_call=logits_of)


def test_the_forward_that_is_compared_is_pefts(batch):
    """An adapter of a sort that is not known, which acts in PEFT's forward, is caught by the self-check."""
    model = adapted(target_modules=["q_proj"])
    inner = model.base_model.forward

    def forward(*args, **kwargs):
        handle = model.base_model.model.model.layers[0].register_forward_hook(lambda module, args, out: out * 1.5)
        try:
            return inner(*args, **kwargs)
        finally:
            handle.remove()

    fused_lm_head(model)(**batch[0])
    model.base_model.forward = forward
    with pytest.raises(RuntimeError, match="does not reproduce the logits"):
        fused_lm_head(model)(**batch[0])


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
    assert lm_head.has_adapter(fused_lm_head(adapted(target_modules=["lm_head"])).output_embedding)
    assert not lm_head.has_adapter(fused_lm_head(adapted(**CASES["saved head"])).output_embedding)
    assert not lm_head.has_adapter(None)
