"""The router loss of mixtures of experts: that of the model's own forward, or words why there is none."""

import logging
import math

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from dpo_kernels.integrations import routers  # noqa: E402
from dpo_kernels.integrations.routers import router_loss, why_no_router_loss  # noqa: E402
from tests.integration_helpers import SMALL, V, without  # noqa: E402

HEADS = without("head_dim")
ONE_LAYER = {"num_hidden_layers": 1}
# By what their configurations call the experts, how many of them a token gets, and by what the loss takes.
CONFIGS = {
    "mixtral": lambda t: t.MixtralConfig(**HEADS | ONE_LAYER, num_local_experts=4),
    "qwen3_moe": lambda t: t.Qwen3MoeConfig(
        **SMALL | ONE_LAYER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "ernie4_5_moe": lambda t: t.Ernie4_5_MoeConfig(
        **SMALL, moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=0
    ),
    "granitemoe": lambda t: t.GraniteMoeConfig(**HEADS | ONE_LAYER, num_local_experts=4, num_experts_per_tok=2),
    "jetmoe": lambda t: t.JetMoeConfig(
        **without("head_dim", "num_attention_heads", "num_key_value_heads") | ONE_LAYER, num_local_experts=4,
        num_experts_per_tok=2, kv_channels=8, num_key_value_heads=2,
    ),
    "gpt_oss": lambda t: t.GptOssConfig(**SMALL | ONE_LAYER, num_local_experts=4, num_experts_per_tok=2),
    "doge": lambda t: t.DogeConfig(**SMALL | ONE_LAYER, is_moe=True, num_experts=16, num_experts_per_tok=2),
    "olmoe": lambda t: t.OlmoeConfig(**HEADS | ONE_LAYER, num_experts=4, num_experts_per_tok=2),
}  # fmt: skip


def model_of(config):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_that_of_the_models_own_forward(name):
    model = model_of(CONFIGS[name](transformers))
    assert why_no_router_loss(model) == ""
    ids = torch.randint(3, V, (4, 11))
    mask = torch.ones_like(ids)
    mask[1, 8:] = mask[3, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "output_router_logits": True, "use_cache": False}
    own = model(**inputs).aux_loss
    ours = router_loss(model, model.base_model(**inputs), mask)
    assert torch.equal(ours, own)
    assert float(own) > 0.5
    ours.backward()
    assert max(float(p.grad.norm()) for p in model.parameters() if p.grad is not None) > 0


def llama4():
    return transformers.Llama4TextConfig(**SMALL | ONE_LAYER, num_local_experts=4, intermediate_size_mlp=48)


def dense():
    sizes = SMALL | ONE_LAYER
    return transformers.Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=16, mlp_only_layers=[0])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (llama4, "Llama4ForCausalLM computes no router loss"),
        (lambda: transformers.LlamaConfig(**SMALL | ONE_LAYER), "LlamaForCausalLM computes no router loss"),
        (dense, "Qwen3MoeForCausalLM puts out no router logits"),
    ],
)
def test_why_there_is_none(config, words):
    assert why_no_router_loss(model_of(config())) == words


def test_a_name_that_is_not_known_is_said(monkeypatch):
    model = model_of(CONFIGS["olmoe"](transformers))
    del model.num_experts_per_tok
    assert why_no_router_loss(model) == ""  # the configuration says it too
    monkeypatch.setattr(routers, "PER_TOKEN", ("by_another_name",))
    assert why_no_router_loss(model).endswith("do not say, by any name known here, the router loss's top_k")


def test_outputs_without_router_logits_are_named():
    model = model_of(CONFIGS["olmoe"](transformers))
    outputs = model.base_model(input_ids=torch.ones(1, 4, dtype=torch.long), output_router_logits=False)
    with pytest.raises(RuntimeError, match="OlmoeForCausalLM returned no router logits: set router_aux_loss_coef"):
        router_loss(model, outputs, None)


# --- in the trainer ---------------------------------------------------------------------------------------------------

trl_helpers = pytest.importorskip("tests.trl_helpers", reason="trl, peft or datasets is not installed")
from dpo_kernels.integrations.trl import FusedDPOTrainer  # noqa: E402

pytestmark = trl_helpers.OTHERS_WARNINGS
needs_the_option = pytest.mark.skipif(
    not hasattr(trl_helpers.trl.DPOConfig, "router_aux_loss_coef"), reason="this TRL has no router_aux_loss_coef"
)


@needs_the_option
def test_a_model_without_one_trains_with_one_line_in_the_log(tmp_path, caplog):
    options = {"model": model_of(llama4()), "steps": 2, "precompute_ref_log_probs": True}
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0\.1 weighs a router loss that is not to be had: "):
        trl_helpers.run(FusedDPOTrainer, tmp_path, **options, router_aux_loss_coef=0.1)
    with caplog.at_level(logging.WARNING, logger="dpo_kernels.integrations.trl"):
        without_one, _ = trl_helpers.run(FusedDPOTrainer, tmp_path, **options, router_aux_loss_coef=0.0)
        assert not caplog.records
        log, trainer = trl_helpers.run(FusedDPOTrainer, tmp_path, **options)
    assert [record.getMessage() for record in caplog.records] == [
        "FusedDPOTrainer: there is no router loss: Llama4ForCausalLM computes no router loss"
    ]
    assert trainer.fallback_reason == ""
    assert "aux_loss" not in log[0]
    assert log[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)  # the policy is its own reference
    assert [entry.get("loss") for entry in log] == [entry.get("loss") for entry in without_one]


@needs_the_option
def test_a_model_with_one_has_it_in_its_first_loss(tmp_path):
    options = {"model": model_of(CONFIGS["ernie4_5_moe"](transformers)), "steps": 2, "router_aux_loss_coef": 0.1}
    kinds = (trl_helpers.trl.DPOTrainer, FusedDPOTrainer)
    stock, ours = (trl_helpers.run(kind, tmp_path, **options)[0] for kind in kinds)
    for key in ("aux_loss", "loss", "grad_norm", "eval_loss", "eval_aux_loss"):
        theirs, mine = (next(entry[key] for entry in log if key in entry) for log in (stock, ours))
        assert mine == pytest.approx(theirs, rel=1e-4), key
