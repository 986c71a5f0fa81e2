"""The fingerprint of a model: another one where its log-probs are others, the same where they are not."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

from dpo_kernels.integrations.fingerprint import model_fingerprint  # noqa: E402
from dpo_kernels.integrations.transformers import fused_lm_head  # noqa: E402
from tests.integration_helpers import CONFIGS, tiny  # noqa: E402

pytestmark = [
    # PEFT 0.21 on transformers 5.23.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie:UserWarning"),
]

IDS = torch.arange(3, 14)[None]
EVERYWHERE = ["q_proj", "up_proj", "lm_head"]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def adapted(adapter="default", alpha=8, seed=2, model=None, **options):
    """A tiny LLaMA with an adapter of this name, whose weights depend on the seed only."""
    options = {"r": 3, "lora_alpha": alpha, "target_modules": EVERYWHERE, "task_type": "CAUSAL_LM"} | options
    model = peft.get_peft_model(tiny("llama") if model is None else model, peft.LoraConfig(**options), adapter)
    return drawn(model, adapter, seed)


def drawn(model, adapter, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}" in name:
                parameter.normal_(std=0.3)
    return model.eval()


# --- another model ----------------------------------------------------------------------------------------------------


def attention_scale(model):
    model.model.layers[1].self_attn.scaling *= 1.5


def positions(model):
    model.model.rotary_emb.inv_freq.mul_(1.1)  # a buffer that state_dict leaves out


def epsilon(model):
    model.model.norm.variance_epsilon = 0.5


def activation(model):
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()


def one_weight(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 1e-3


@pytest.mark.parametrize("change", [attention_scale, positions, epsilon, activation, one_weight])
def test_what_a_model_computes_with_is_in_it(change):
    model = tiny("llama")
    before, fingerprint = logits(model), model_fingerprint(model)
    change(model)
    assert not torch.equal(logits(model), before)
    assert model_fingerprint(model) != fingerprint


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("granite", "attention_multiplier", 0.3),
        ("granite", "embedding_multiplier", 2.0),
        ("granite", "residual_multiplier", 0.5),
        ("granite", "logits_scaling", 4.0),
        ("gemma2", "attn_logit_softcapping", 2.0),
        ("gemma2", "sliding_window", 3),
        ("llama", "rope_parameters", {"rope_theta": 50.0, "rope_type": "default"}),
    ],
)
def test_the_configuration_is_in_it(name, option, value):
    models = [tiny(name)]
    config = copy.deepcopy(models[0].config)
    setattr(config, option, value)
    models.append(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())
    models[1].load_state_dict(models[0].state_dict())
    assert not torch.equal(*map(logits, models))
    assert len(set(map(model_fingerprint, models))) == 2


@pytest.mark.parametrize(("attribute", "value"), [("logit_scale", 2.0), ("softcap", 5.0), ("softcap", None)])
def test_scale_and_cap_of_the_head_are_in_it(attribute, value):
    model = tiny("gemma2")
    head = fused_lm_head(model)
    fingerprint = model_fingerprint(model, head)
    assert fingerprint == model_fingerprint(model)
    setattr(head, attribute, value)
    assert model_fingerprint(model, head) != fingerprint


def test_precision_and_attention_kernel_are_in_it():
    model = tiny("llama")
    found = {model_fingerprint(model)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found.add(model_fingerprint(model))
    with torch.autocast("cpu", dtype=torch.float16):
        found.add(model_fingerprint(model))
    model.set_attn_implementation("sdpa")
    found.add(model_fingerprint(model))
    found.add(model_fingerprint(copy.deepcopy(model).to(torch.bfloat16)))
    assert len(found) == 5


def scaling(model):
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 3.0)


def bias(model):
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).add_(0.01)


@pytest.mark.parametrize("change", [scaling, bias])
def test_what_an_adapter_computes_with_is_in_it(change):
    model = adapted()
    before, fingerprint = logits(model), model_fingerprint(model)
    change(model)
    assert not torch.equal(logits(model), before)
    assert model_fingerprint(model) != fingerprint


def test_adapters_of_other_scale_or_kind_are_others():
    models = [
        adapted(),
        adapted(alpha=64),
        adapted(use_rslora=True),
        adapted(target_modules=["q_proj", "up_proj"]),
        adapted(target_modules=["q_proj", "up_proj"], use_dora=True),
        adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        adapted(target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 7]}),
        adapted(target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 8]}),
    ]
    assert len(set(map(model_fingerprint, models))) == len(models)
    ia3 = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["up_proj"], feedforward_modules=["up_proj"])
    some, other = (drawn(peft.get_peft_model(tiny("llama"), ia3), "default", seed) for seed in (1, 2))
    assert model_fingerprint(some) != model_fingerprint(other)


def test_adapters_that_are_on_together_are_in_it_in_their_order():
    model = adapted()
    model.add_adapter("second", model.peft_config["default"])
    drawn(model, "second", 3)
    found = []
    for active in (["default"], ["second"], ["default", "second"], ["second", "default"]):
        model.base_model.set_adapter(active)
        found.append(model_fingerprint(model))
    assert len(set(found)) == 4


# --- the same model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "falcon_h1"])  # which takes long
def test_running_training_copying_and_attaching_change_nothing(name):
    model = tiny(name)
    fingerprint = model_fingerprint(model)
    logits(model)
    twin = copy.deepcopy(model)
    fused_lm_head(model).attach()
    model.train()
    model.config.use_cache = False
    model.config.eos_token_id = model.config.bos_token_id = None
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert model_fingerprint(model) == model_fingerprint(twin) == fingerprint
    assert model_fingerprint(tiny(name)) == fingerprint
    assert model_fingerprint(tiny(name, seed=1)) != fingerprint


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_lengths_that_a_rotary_embedding_has_met_change_nothing(kind):
    rope = {"rope_type": kind, "rope_theta": 100.0, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 8}
    config = copy.deepcopy(tiny("llama").config)
    config.max_position_embeddings, config.rope_parameters = 8, rope
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    fingerprint = model_fingerprint(model)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    logits(model)
    assert not torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert model_fingerprint(model) == fingerprint
    config.rope_parameters = rope | {"factor": 4.0, "long_factor": [4.0] * 4}
    assert model_fingerprint(transformers.AutoModelForCausalLM.from_config(config)) != fingerprint


def test_a_saved_model_is_the_same(tmp_path):
    model = tiny("gemma2")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert model_fingerprint(loaded) == model_fingerprint(model)


def test_an_adapter_by_another_name_is_the_same():
    model, other = adapted("default"), adapted("another")
    assert torch.equal(logits(model), logits(other))
    assert model_fingerprint(model) == model_fingerprint(other)
    other.add_adapter("third", other.peft_config["another"])  # there, but not active
    assert model_fingerprint(model) == model_fingerprint(other)
    tokens = {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 7]}}
    saved = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    for options in (tokens, saved):
        assert model_fingerprint(adapted("default", **options)) == model_fingerprint(adapted("another", **options))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": EVERYWHERE},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 7]}},
        {"target_modules": ["q_proj"], "lora_dropout": 0.1},
    ],
)
def test_a_model_with_its_adapters_off_is_the_model_without(options):
    model = adapted(**options)
    plain = model_fingerprint(tiny("llama"))
    on = model_fingerprint(model)
    assert on != plain
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny("llama")))
        assert model_fingerprint(model) == plain
        drawn(model, "default", 7)  # trained meanwhile
        assert model_fingerprint(model) == plain
    assert model_fingerprint(model) not in (on, plain)


def test_a_merged_adapter_is_in_the_weights():
    model = adapted(target_modules=["q_proj"])
    model.merge_adapter()
    merged = model_fingerprint(model)
    plain = tiny("llama")
    for number, layer in enumerate(plain.model.layers):
        layer.self_attn.q_proj = model.base_model.model.model.layers[number].self_attn.q_proj.base_layer
    assert torch.equal(logits(model), logits(plain))
    assert model_fingerprint(plain) == merged
    with model.disable_adapter():  # which PEFT then takes out of the weights at the next forward
        off = model_fingerprint(model)
        assert off != merged
        logits(model)
        assert model_fingerprint(model) not in (off, merged)


def test_a_compiled_model_is_the_same():
    model = tiny("llama")
    fingerprint = model_fingerprint(model)
    assert model_fingerprint(torch.compile(model, backend="eager")) == fingerprint
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    assert model_fingerprint(model) == fingerprint


def test_offloaded_weights_are_read_where_they_are(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    fingerprint = model_fingerprint(tiny("llama"))
    for offload in (accelerate.cpu_offload, accelerate.disk_offload):
        model = tiny("llama")
        folder = {} if offload is accelerate.cpu_offload else {"offload_dir": str(tmp_path)}
        offload(model.model, execution_device=torch.device("cpu"), **folder)
        assert {p.device.type for p in model.model.parameters()} == {"meta"}
        assert model_fingerprint(model) == fingerprint
        assert {p.device.type for p in model.model.parameters()} == {"meta"}
    model = tiny("llama")
    model.model.layers.to("meta")
    with pytest.raises(ValueError, match=r"model: model\.layers\.0\..* is on the meta device"):
        model_fingerprint(model)
