"""``FusedKTOTrainer`` against TRL's own: every logged value, every gradient, and what a step costs."""

import copy
import functools
import logging
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("datasets", reason="datasets is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
trl = pytest.importorskip("trl", reason="trl is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

from dpo_kernels.integrations import requirements  # noqa: E402
from dpo_kernels.integrations.trl import patch_trl  # noqa: E402
from tests.gemm_counts import costs  # noqa: E402
from tests.integration_helpers import SMALL  # noqa: E402
from tests.trl_helpers import LARGEST, NOT_LOGGED_TWICE, OTHERS_WARNINGS, calm, tokenizer, unpaired  # noqa: E402

try:
    from dpo_kernels.integrations.trl import FusedKTOTrainer
except ImportError:
    pytest.skip(f"FusedKTOTrainer needs TRL >= {requirements.TRL_KTO}", allow_module_level=True)

pytestmark = OTHERS_WARNINGS
STEPS = 3
LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def make(fused, tmp_path, model="llama", adapter=None, **options):
    policy = calm(model) if isinstance(model, str) else copy.deepcopy(model)
    reference = None
    if adapter is None and not options.get("precompute_ref_log_probs"):
        torch.manual_seed(5)
        reference = copy.deepcopy(policy)
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.add_(0.006 * torch.randn_like(parameter))
    defaults = {
        "learning_rate": 1e-2, "optim": "sgd", "per_device_train_batch_size": 4, "per_device_eval_batch_size": 3,
        "beta": 0.3, "max_length": 64, "bf16": False, "use_cpu": True, "gradient_checkpointing": False,
        "lr_scheduler_type": "constant", "save_strategy": "no",
    }  # fmt: skip
    args = trl.KTOConfig(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=STEPS,
        report_to=[],
        seed=1,
        disable_tqdm=True,
        **defaults | options,
    )
    return (FusedKTOTrainer if fused else trl.KTOTrainer)(
        model=policy,
        ref_model=reference,
        args=args,
        train_dataset=unpaired(),
        eval_dataset=unpaired().select(range(7)),
        processing_class=tokenizer(),
        peft_config=adapter,
    )


def assert_same_logs(tmp_path, **options):
    logs = []
    for fused in (False, True):
        trainer = make(fused, tmp_path, **options)
        if fused:
            assert trainer.fallback_reason == ""
        trainer.train()
        logs.append(trainer.state.log_history)
    stock, ours = logs
    assert len(stock) == len(ours) == STEPS + 2
    for step, (theirs, mine) in enumerate(zip(stock, ours, strict=True)):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            if not any(word in key for word in NOT_LOGGED_TWICE):
                assert abs(mine[key] - value) <= 1e-5 * max(1.0, abs(value)), f"entry {step}, {key}"
            assert abs(value) <= LARGEST.get(key.removeprefix("eval_"), abs(value)), f"{key} is {value}: a wild run"
    wanted = {"loss", "grad_norm", "kl", "entropy", "logps/chosen", "logits/rejected", "rewards/margins"}
    assert wanted <= set(ours[0])
    assert {f"eval_{key}" for key in wanted - {"grad_norm"}} <= set(ours[STEPS])
    assert abs(ours[0]["grad_norm"]) > 0.01
    assert abs(ours[0]["logits/chosen"]) > 1e-4
    return trainer


@pytest.mark.parametrize("model", ["llama", "gemma2", "cohere", "granite", "phi"])
def test_logs_are_those_of_trl(model, tmp_path):
    trainer = assert_same_logs(tmp_path, model=model)
    assert any(entry["kl"] > 0 for entry in trainer.state.log_history if "kl" in entry)  # a KL of 0 would hide it


RUNS = {
    "accumulated": {"gradient_accumulation_steps": 2},
    "checkpointed": {"gradient_checkpointing": True},
    "weights": {"desirable_weight": 1.5, "undesirable_weight": 0.7},
    "no KL": {"loss_type": "apo_zero_unpaired"},
    "precomputed": {"precompute_ref_log_probs": True},
    "precomputed, no KL": {"precompute_ref_log_probs": True, "loss_type": "apo_zero_unpaired"},
    "peft": {"adapter": peft.LoraConfig(**LORA)},
    "peft, checkpointed": {"adapter": peft.LoraConfig(**LORA), "gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", RUNS)
def test_logs_are_those_of_trl_in_every_setup(name, tmp_path):
    assert_same_logs(tmp_path, **RUNS[name])


def test_a_mixture_of_experts_has_its_router_loss(tmp_path):
    torch.manual_seed(0)
    sizes = {name: value for name, value in SMALL.items() if name != "head_dim"}
    config = transformers.MixtralConfig(
        **sizes, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.2
    )
    trainer = assert_same_logs(tmp_path, model=transformers.AutoModelForCausalLM.from_config(config).eval())
    assert trainer.aux_loss_enabled


def batch_of(trainer, few=8):
    return trainer.data_collator([trainer.train_dataset[index] for index in range(few)])


def step(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def assert_gradients_agree(got, wanted):
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= 2e-5 * gradient.norm().clamp(min=1e-6), name


@pytest.mark.parametrize("model", ["llama", "gemma2"])
def test_gradients_are_those_of_trl(model, tmp_path):
    stock, ours = (make(fused, tmp_path, model=model) for fused in (False, True))
    batch = batch_of(stock)
    (theirs, wanted), (mine, got) = step(stock, batch), step(ours, batch)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert_gradients_agree(got, wanted)


def sums(model, batch, prefix=""):
    """Log-probs of the completions from the model's own logits."""
    ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].double()
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (logps * batch[f"{prefix}completion_mask"][:, 1:]).sum(-1)


def test_an_adapter_of_the_head_is_trained(tmp_path):
    adapter = peft.LoraConfig(**LORA | {"target_modules": ["lm_head", "q_proj"]})
    with pytest.raises(ValueError, match="PEFT adapter to `lm_head` is not supported"):
        make(False, tmp_path, adapter=adapter)
    trainer = make(True, tmp_path, adapter=adapter)
    batch = batch_of(trainer)
    mine, got = step(trainer, batch)
    model = trainer.model
    model.zero_grad()
    with torch.no_grad(), model.disable_adapter():
        reference, reference_kl = sums(model, batch), sums(model, batch, "KL_")
    with torch.no_grad():
        kl = (sums(model, batch, "KL_") - reference_kl).mean().clamp(min=0)
    ratio = sums(model, batch) - reference
    loss = (1 - torch.sigmoid(0.3 * torch.where(torch.as_tensor(batch["label"]), ratio - kl, kl - ratio))).mean()
    loss.backward()
    assert mine.item() == pytest.approx(loss.item(), rel=1e-5)
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert any("lm_head" in name for name in wanted)
    assert_gradients_agree(got, wanted)


def test_a_micro_batch_without_a_token_stays_in_the_graph(tmp_path):
    trainer = make(True, tmp_path)
    batch = batch_of(trainer)
    for prefix in ("", "KL_"):
        batch[f"{prefix}completion_mask"].fill_(0)
    loss, gradients = step(trainer, batch)
    assert loss.item() == pytest.approx(0.5)
    assert set(gradients) == {name for name, _ in trainer.model.named_parameters()}
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients.values())


@pytest.mark.parametrize("frozen", [False, True])
def test_a_step_takes_a_pass_less_than_with_the_patch(frozen, tmp_path):
    torch.manual_seed(0)
    V, H = 4096, 32
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | {"vocab_size": V})).eval()
    model.lm_head.weight.requires_grad_(not frozen)
    flops, largest = {}, {}
    for fused in (False, True):
        trainer = make(fused, tmp_path, model=model)
        batch = batch_of(trainer)
        with patch_trl():
            trainer.compute_loss(trainer.model, batch)  # the self-check of the head
            flops[fused], (largest[fused], _) = costs(functools.partial(trainer.compute_loss, trainer.model, batch))
    positions, scored = (
        {
            prefix: int(batch[f"{prefix}completion_mask"][:, 1:].ne(least).sum())
            for prefix in ("", "KL_")
        }
        for least in (-1, 0)
    )  # fmt: skip
    # On a CPU TRL hands every position to the patched function. Policy and reference score both kinds of sequences.
    passes = {False: (3 if frozen else 5, 2), True: (3 if frozen else 4, 2)}
    head = {
        fused: 2 * V * H * (passes[fused][0] * count[""] + passes[fused][1] * count["KL_"])
        for fused, count in ((False, positions), (True, scored))
    }
    assert flops[False] - flops[True] == pytest.approx(head[False] - head[True], rel=0.01)
    assert largest[True] <= max(V * H * 4, scored[""] * V * 4)
    assert largest[True] < 0.75 * largest[False]


def test_precomputed_log_probs_are_not_cast_with_the_models_inputs(tmp_path, monkeypatch):
    trainer = make(True, tmp_path, precompute_ref_log_probs=True)
    batch = batch_of(trainer)
    bf16 = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=bf16)))
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    prepared = trainer._prepare_inputs({**batch, "features": torch.ones(2)})
    assert prepared["features"].dtype == torch.bfloat16  # as transformers has it
    for name in ("ref_logps", "ref_KL_logps"):
        assert torch.equal(prepared[name], batch[name])
        assert prepared[name].dtype == torch.float32


def test_what_is_not_fused_goes_to_trl_with_one_line(tmp_path, caplog):
    trainer, stock = (make(fused, tmp_path) for fused in (True, False))
    trainer.loss_type, trainer._reason = "bco", None
    with caplog.at_level(logging.WARNING, logger="dpo_kernels"):
        assert trainer.fallback_reason == "loss_type bco is not in this version's family"
    said = [record.getMessage() for record in caplog.records if record.name.startswith("dpo_kernels")]
    assert said == ["FusedKTOTrainer: TRL's own step is used: loss_type bco is not in this version's family"]
    trainer.loss_type = "kto"
    batch = batch_of(stock)
    assert torch.equal(step(trainer, batch)[0], step(stock, batch)[0])
    for mine, theirs in zip(
        trainer.compute_ref_log_probs(trainer.ref_model, batch),
        stock.compute_ref_log_probs(stock.ref_model, batch),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


def test_a_trl_that_adds_up_its_loss_otherwise_is_refused(tmp_path, monkeypatch):
    original = trl.KTOTrainer._compute_loss
    trainer = make(True, tmp_path)
    monkeypatch.setattr(trl.KTOTrainer, "_compute_loss", lambda self, *given: 2 * original(self, *given))
    with pytest.raises(RuntimeError, match=r"this version of TRL makes .* use TRL's own trainer"):
        trainer.compute_loss(trainer.model, batch_of(trainer))


def test_the_head_is_checked_at_the_first_batch(tmp_path):
    trainer = make(True, tmp_path)
    trainer._head(trainer.model).logit_scale = 1.3
    with pytest.raises(RuntimeError, match="does not reproduce the logits"):
        trainer.compute_loss(trainer.model, batch_of(trainer))


def test_compute_metrics_gets_logits(tmp_path):
    trainer = make(True, tmp_path)
    batch = batch_of(trainer)
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert outputs.logits.shape == (*batch["input_ids"].shape, 67)
