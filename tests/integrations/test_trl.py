"""``FusedDPOTrainer`` against TRL's own on tiny models: four steps and an evaluation, every logged value the same.

Agreement to 1e-5 means agreement only where a run does not amplify the last bits. So heads are a quarter of ``tiny``'s,
references lie within a few nats of the policy, and the optimizer is SGD with TRL's clipping, which is linear in
gradients of noise where Adam takes whole steps. With parameters moved by 1e-5 the first entry moves by 1e-6 and no
later one of any option by more than five times that; Adam had made 230 times of it, wild losses 35 to 170 times.
"""

import copy
import functools
import logging
import re
import tempfile
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("datasets", reason="datasets is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
trl = pytest.importorskip("trl", reason="trl is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402

from dpo_kernels import losses  # noqa: E402
from dpo_kernels.integrations.trl import FusedDPOTrainer  # noqa: E402
from dpo_kernels.integrations.trl.batch import REFERENCE, pair_batch  # noqa: E402
from dpo_kernels.integrations.trl.options import NotFused, loss_options  # noqa: E402
from tests.integration_helpers import SMALL, tiny  # noqa: E402
from tests.trl_helpers import (  # noqa: E402
    LARGEST,
    NOT_LOGGED_TWICE,
    OTHERS_WARNINGS,
    STEPS,
    WORDS,
    calm,
    needs,
    ratings,
    run,
    tokenizer,
    with_columns,
)

pytestmark = OTHERS_WARNINGS


KEYS = {
    "loss", "grad_norm", "learning_rate", "epoch", "entropy", "num_tokens", "mean_token_accuracy",
    "logits/chosen", "logits/rejected", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    "logps/chosen", "logps/rejected",
}  # fmt: skip


@functools.cache
def log_of(trainer_class, model, setup):
    """The log of a run of ``SETUPS`` that several tests look at."""
    with tempfile.TemporaryDirectory() as folder:
        log, trainer = run(trainer_class, Path(folder), **{"model": model} | SETUPS[setup])
    if trainer_class is FusedDPOTrainer:
        assert trainer.fallback_reason == ""
    return log


def assert_same(stock, ours):
    assert len(ours) == len(stock) == STEPS + 2
    for step, (theirs, mine) in enumerate(zip(stock, ours, strict=True)):
        assert mine.keys() == theirs.keys()
        tied = any(abs(theirs.get(f"{mode}rewards/margins", 1.0)) < 1e-4 for mode in ("", "eval_"))
        for key, value in theirs.items():
            if not any(word in key for word in (*NOT_LOGGED_TWICE, *(["rewards/accuracies"] if tied else []))):
                rounding = LOSS_ROUNDING if key.endswith("loss") else 0.0
                assert abs(mine[key] - value) <= 1e-5 * max(1.0, abs(value)) + rounding, f"entry {step}, {key}"
            assert abs(value) <= LARGEST.get(key.removeprefix("eval_"), abs(value)), f"{key} is {value}: a wild run"
    assert set(ours[0]) == KEYS | {"step"} | ({"aux_loss"} if "aux_loss" in stock[0] else set())
    # Values that vanish would agree whatever they are.
    assert min(abs(entry[key]) for entry in ours[:STEPS] for key in ("loss", "grad_norm")) > 0.05
    assert {f"eval_{key}" for key in KEYS} - {"eval_grad_norm", "eval_learning_rate", "eval_epoch"} <= set(ours[STEPS])


def assert_same_logs(tmp_path, **options):
    stock, _ = run(trl.DPOTrainer, tmp_path, **options)
    ours, trainer = run(FusedDPOTrainer, tmp_path, **options)
    assert trainer.fallback_reason == ""
    assert_same(stock, ours)
    return trainer


# transformers 4 logs a loss with four digits.
LOSS_ROUNDING = 0.0 if int(transformers.__version__.partition(".")[0]) >= 5 else 1e-4
LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]}
RUNS = {
    "full": {},
    "precomputed": {"precompute_ref_log_probs": True},
    "accumulated": {"gradient_accumulation_steps": 3},
    "peft": {"adapter": peft.LoraConfig(**LORA)},
    "peft of a Conv1D": {
        "adapter": peft.LoraConfig(**LORA | {"target_modules": ["c_attn"]}, fan_in_fan_out=True),
    },
}
MODELS = ("llama", "qwen3", "gemma2", "cohere", "granite", "phi", "gpt2")
IN_EVERY_SETUP = (
    ("llama", "precomputed"),
    ("llama", "accumulated"),
    ("llama", "peft"),
    ("gemma2", "precomputed"),
    ("gemma2", "peft"),
    ("gpt2", "accumulated"),
    ("gpt2", "peft of a Conv1D"),
)


@pytest.mark.parametrize(("model", "kind"), [(model, "full") for model in MODELS])
def test_logs_are_those_of_trl(model, kind):
    assert_same(*(log_of(trainer_class, model, kind) for trainer_class in (trl.DPOTrainer, FusedDPOTrainer)))


@pytest.mark.parametrize(("model", "kind"), IN_EVERY_SETUP)
def test_logs_are_those_of_trl_in_every_setup(model, kind):
    assert_same(*(log_of(trainer_class, model, kind) for trainer_class in (trl.DPOTrainer, FusedDPOTrainer)))


OPTIONS = {
    "hinge": {"loss_type": ["hinge"]},
    "ipo": {"loss_type": ["ipo"]},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    "nca_pair": {"loss_type": ["nca_pair"]},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "bco_pair": {"loss_type": ["bco_pair"]},
    "sppo_hard": {"loss_type": ["sppo_hard"], "loss_weights": [0.1]},
    "aot": {"loss_type": ["aot"], "label_smoothing": 0.1},
    "aot_unpaired": {"loss_type": ["aot_unpaired"]},
    "apo_zero": {"loss_type": ["apo_zero"]},
    "apo_down": {"loss_type": ["apo_down"]},
    "discopop": {"loss_type": ["discopop"], "discopop_tau": 0.4},
    "sft": {"loss_type": ["sft"]},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"]},
    "a mix": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "a name twice": {"loss_type": ["sigmoid", "sigmoid"], "loss_weights": [0.8, 0.2]},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js": {"f_divergence_type": "js_divergence", "loss_type": ["sigmoid", "sft"]},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "ld_alpha": {"ld_alpha": 0.4},
    "ld_alpha, cached": {"ld_alpha": 0.4, "precompute_ref_log_probs": True},
    "use_weighting": {"use_weighting": True, "loss_type": ["sigmoid", "ipo"]},
    "use_weighting with ld_alpha": {"use_weighting": True, "ld_alpha": 0.4},
    "sync_ref_model": {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "max_length": {"max_length": 8},
    "pad_to_multiple_of": {"pad_to_multiple_of": 8},
    "dropout": {"disable_dropout": False, "model": "gpt2"},
}


SETUPS = RUNS | OPTIONS


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs(name) if name == "sigmoid_norm" else ()) for name in OPTIONS]
)
def test_every_option_means_what_it_means_in_trl(name):
    stock, ours = (log_of(trainer_class, "llama", name) for trainer_class in (trl.DPOTrainer, FusedDPOTrainer))
    assert_same(stock, ours)
    if name not in ("a name twice", "gradient_checkpointing", "pad_to_multiple_of"):  # which mean the same loss
        plain = log_of(FusedDPOTrainer, OPTIONS[name].get("model", "llama"), "full")
        changed = [abs(mine["loss"] - theirs["loss"]) for mine, theirs in zip(ours[:STEPS], plain, strict=False)]
        assert max(changed) > 1e-3  # a hundred times what is taken to be the same


def test_pairs_that_the_policy_prefers_weigh_more_than_1_as_in_trl(tmp_path):
    model = calm("phi")
    with torch.no_grad():
        model.get_output_embeddings().bias.zero_()[2:8] = 3.0  # <eos> and the five words of these data
    trainer = assert_same_logs(
        tmp_path, model=model, data=(ratings(24, 0, 5), ratings(7, 1, 5)), use_weighting=True, beta=0.1
    )
    losses = [entry["loss"] for entry in trainer.state.log_history[:STEPS]]
    assert max(losses) > 1.0, losses  # 0.7 without weights


def test_a_divergence_is_fused_only_where_trl_takes_it_too():
    trainer = SimpleNamespace(
        loss_weights=[1.0], beta=0.1, label_smoothing=0.0, ld_alpha=None, use_weighting=False,
        f_divergence_type="js_divergence", args=SimpleNamespace(discopop_tau=0.05),
    )  # fmt: skip
    fused = set()
    for name in losses.LOSSES:
        trainer.loss_types = [name]
        try:
            loss_options(trainer)
        except NotFused:
            continue
        fused.add(name)
    # TRL 1.16 takes it with these and, averaged over tokens, with ipo and sigmoid_norm.
    assert fused == {"sigmoid", "hinge", "exo_pair", "robust", "discopop", "sft"}


def test_a_deep_copy_of_a_trained_model_may_be_the_next_reference(tmp_path):
    _, trainer = run(FusedDPOTrainer, tmp_path, steps=1)
    assert_same_logs(tmp_path, model=trainer.model)  # run() copies it, once for the policy and once for the reference


@needs("router_aux_loss_coef")
def test_a_mixture_of_experts_has_its_router_loss(tmp_path):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **{k: v for k, v in SMALL.items() if k != "head_dim"}, num_local_experts=4, output_router_logits=True
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    trainer = assert_same_logs(tmp_path, model=model, router_aux_loss_coef=0.1)
    assert trainer.aux_loss_enabled
    assert "aux_loss" in trainer.state.log_history[0]


def test_an_adapter_that_is_trained_on_is_its_own_reference(tmp_path):
    def wrap(model):
        torch.manual_seed(3)
        model = peft.get_peft_model(model, peft.LoraConfig(**LORA))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.2)
        return model

    trainer = assert_same_logs(tmp_path, wrap=wrap)
    assert "ref" in trainer.model.peft_config
    assert trainer.state.log_history[0]["rewards/chosen"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("model", "setup"), [("llama", "full"), ("llama", "ld_alpha"), ("llama", "precomputed"), ("gemma2", "full")]
)
def test_padding_free_gives_what_padding_gives(model, setup, tmp_path):
    padded = log_of(FusedDPOTrainer, model, setup)
    free, trainer = run(FusedDPOTrainer, tmp_path, model=model, padding_free=True, **SETUPS[setup])
    assert trainer.padding_free
    for theirs, mine in zip(padded, free, strict=True):
        for key, value in theirs.items():
            if not any(word in key for word in (*NOT_LOGGED_TWICE, "accuracies")):  # which jump at a margin of 0
                assert mine[key] == pytest.approx(value, rel=1e-4, abs=1e-4), key


def test_padding_free_is_refused_where_sequences_would_mix(tmp_path):
    with pytest.raises(RuntimeError, match="does not keep packed sequences apart"):
        run(FusedDPOTrainer, tmp_path, model="falcon_h1", steps=1, padding_free=True)


def test_lora_on_the_head_is_trained(tmp_path):
    adapter = peft.LoraConfig(**LORA | {"target_modules": ["lm_head"]})
    if hasattr(trl.trainer.dpo_trainer, "add_fused_lm_head"):  # 1.15 and later read the head's bare weight
        with pytest.raises(ValueError, match="lm_head"):
            run(trl.DPOTrainer, tmp_path, adapter=adapter)
    log, trainer = run(FusedDPOTrainer, tmp_path, adapter=adapter)
    assert log[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert abs(log[STEPS - 1]["rewards/margins"]) > 1e-5
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    scored = labels[:, 1:] != -100

    def logps():
        with torch.no_grad():
            logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        values = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        return (values * scored).sum(-1)

    with trainer.model.disable_adapter():
        reference = logps()
    chosen, rejected = (logps() - reference).chunk(2)
    expected = -torch.nn.functional.logsigmoid(0.3 * (chosen - rejected)).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_label_smoothing_is_honoured_and_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="dpo_kernels.integrations.trl"):
        plain, _ = run(FusedDPOTrainer, tmp_path, steps=1)
        assert not caplog.records
        smoothed, _ = run(FusedDPOTrainer, tmp_path, steps=1, label_smoothing=0.2)
    assert [record.getMessage() for record in caplog.records] == [
        "FusedDPOTrainer: label_smoothing=0.2 is honoured by the sigmoid loss (conservative DPO); TRL ignores it there"
    ]
    # -(1 - e) log s(u) - e log s(-u) = -log s(u) + e u, and the margins are u.
    assert smoothed[0]["loss"] == pytest.approx(plain[0]["loss"] + 0.2 * plain[0]["rewards/margins"], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": ["ipo"], "f_divergence_type": "js_divergence"}, "f_divergence_type 'js_divergence' with"),
        ({"loss_type": ["sft"], "ld_alpha": 0.5}, "sft with ld_alpha"),
    ],
)
def test_what_only_trl_computes_goes_to_trl_with_one_line(options, words, tmp_path, caplog):
    stock, _ = run(trl.DPOTrainer, tmp_path, steps=2, **options)
    with caplog.at_level(logging.WARNING, logger="dpo_kernels.integrations.trl"):
        ours, trainer = run(FusedDPOTrainer, tmp_path, steps=2, **options)
    assert words in trainer.fallback_reason
    assert len(caplog.records) == 1
    assert f"TRL's own loss is used: {trainer.not_fused}" in caplog.text
    assert [entry.get("loss") for entry in ours] == [entry.get("loss") for entry in stock]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": ["ipo"], "label_smoothing": 0.1}, r"label_smoothing=0\.1 has no effect with loss_type ipo"),
        ({"ld_alpha": 1.5}, "ld_alpha must lie in"),
        ({"loss_type": ["sft"], "ld_alpha": 0.5, "padding_free": True}, "padding_free=True needs the fused loss"),
    ],
)
def test_options_without_effect_are_refused(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        run(FusedDPOTrainer, tmp_path, **options)


class Trusting(FusedDPOTrainer):
    check_reference = False


def test_log_probs_that_the_data_bring_are_taken(tmp_path):
    def cached(rows, shift):
        tokens = [len(row["chosen"].split()) for row in rows]
        columns = {"ref_chosen_logps": -20.0 + shift, "ref_rejected_logps": -21.0}
        for name, value in columns.items():
            rows = rows.add_column(name, [value - n for n in tokens])
        return rows

    data = (cached(ratings(24, 0), 0.0), cached(ratings(7, 1), 0.0))
    moved = (cached(ratings(24, 0), 5.0), cached(ratings(7, 1), 5.0))
    margins = [
        run(Trusting, tmp_path, steps=1, data=d, precompute_ref_log_probs=True)[0][0]["rewards/margins"]
        for d in (data, moved)
    ]
    assert margins[0] - margins[1] == pytest.approx(0.3 * 5.0, abs=1e-4)


def test_log_probs_that_the_data_bring_are_not_those_of_ld_alpha(tmp_path):
    data = with_columns(ratings(24, 0), [-20.0] * 24, [-21.0] * 24), ratings(7, 1)
    with pytest.raises(ValueError, match=r"ld_alpha=0\.4 weighs the policy's tokens"):
        run(FusedDPOTrainer, tmp_path, data=data, ld_alpha=0.4, precompute_ref_log_probs=True)


COMPARED = {"adapter": peft.LoraConfig(**LORA), "steps": 1, "precompute_ref_log_probs": True}


@functools.cache
def first_step_and_reference():
    """The first entry of a run with an adapter, and the columns that were computed for it."""
    with tempfile.TemporaryDirectory() as folder:
        log, trainer = run(FusedDPOTrainer, Path(folder), **COMPARED)
    assert not trainer.check_reference
    return log[0], [list(trainer.train_dataset[name]) for name in REFERENCE]


@pytest.mark.parametrize("padding_free", [False, True])
def test_log_probs_that_the_data_bring_are_compared_with_a_reference_at_hand(tmp_path, padding_free):
    first, right = first_step_and_reference()
    wrong = [right[0], [value - 2.5 for value in right[1]]]
    brought = [(with_columns(ratings(24, 0), *columns), ratings(7, 1)) for columns in (right, wrong)]
    options = COMPARED | {"padding_free": padding_free}
    again, _ = run(FusedDPOTrainer, tmp_path, data=brought[0], **options)
    assert again[0]["loss"] == pytest.approx(first["loss"], rel=1e-6)
    with pytest.raises(ValueError, match=r"ref_rejected_logps is -\d+\.\d\d for one of the first pairs, but"):
        run(FusedDPOTrainer, tmp_path, data=brought[1], **options)
    trusted, _ = run(Trusting, tmp_path, data=brought[1], **options)
    assert trusted[0]["rewards/margins"] == pytest.approx(first["rewards/margins"] - 0.3 * 2.5, abs=1e-4)


def test_pairs_of_which_nothing_is_scored_are_not_what_a_reference_is_compared_by(tmp_path):
    _, trainer = run(FusedDPOTrainer, tmp_path, **COMPARED | {"per_device_train_batch_size": 3})
    batch = next(iter(trainer.get_train_dataloader()))
    right = torch.cat([batch[name] for name in REFERENCE])
    assert trainer._check_reference(batch, right)
    for pair in range(2):  # as a collator leaves them that cuts completions off
        batch["completion_mask"][pair::3] = 0
        right[pair::3] = 0.0
    assert trainer._check_reference(batch, right)
    with pytest.raises(ValueError, match=r"ref_rejected_logps is -99\.00 for one of the first pairs, but"):
        trainer._check_reference(batch, torch.cat([right[:5], torch.tensor([-99.0])]))
    batch["completion_mask"][:] = 0
    assert not trainer._check_reference(batch, right)


@needs("precomputed log-probs without a reference")
def test_the_recipe_for_log_probs_of_trls_rows(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/integrations/plain-pytorch.md").read_text(encoding="utf-8")
    recipe = next(code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "add_column" in code)
    options = {"max_length": 8, "bf16": False, "use_cpu": True, "report_to": [], "output_dir": str(tmp_path)}
    space = {
        "model": tiny("gemma2"),
        "ref_model": tiny("gemma2", seed=1),
        "args": trl.DPOConfig(**options),
        "texts": ratings(9, 0),
        "tokenizer": tokenizer(),
    }
    monkeypatch.chdir(tmp_path)
    exec(recipe, space)
    stock = trl.DPOTrainer(
        tiny("gemma2"),
        tiny("gemma2", seed=1),
        trl.DPOConfig(**options, precompute_ref_log_probs=True),
        train_dataset=ratings(9, 0),
        processing_class=tokenizer(),
    )
    for name in REFERENCE:
        ours, theirs = (torch.tensor(list(t.train_dataset[name])) for t in (space["trainer"], stock))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_reference_log_probs_are_not_cast_with_the_models_inputs(tmp_path, monkeypatch):
    _, trainer = run(FusedDPOTrainer, tmp_path, steps=1, precompute_ref_log_probs=True)
    batch = next(iter(trainer.get_train_dataloader()))
    bf16 = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=bf16)))
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    prepared = trainer._prepare_inputs({**batch, "features": torch.ones(2)})
    assert prepared["features"].dtype == torch.bfloat16  # as transformers has it
    for name in REFERENCE:
        assert torch.equal(prepared[name], batch[name])
        assert prepared[name].dtype == torch.float32
    monkeypatch.setattr(trainer, "args", SimpleNamespace(device=torch.device("meta"), past_index=-1))
    assert {value.device.type for value in trainer._prepare_inputs(batch).values()} == {"meta"}


def test_an_adapter_on_the_head_never_reaches_trls_own_loss(tmp_path):
    adapter = peft.LoraConfig(**LORA | {"target_modules": ["lm_head"]})
    with pytest.raises(ValueError, match="an adapter on the LM head needs the fused loss, but: loss_type sft"):
        run(FusedDPOTrainer, tmp_path, adapter=adapter, loss_type=["sft"], ld_alpha=0.5)


def test_a_wrong_scale_in_the_configuration_stops_the_first_step(tmp_path):
    model = tiny("cohere")
    model.logit_scale = model.logit_scale * 2
    with pytest.raises(RuntimeError, match="does not reproduce the logits of CohereForCausalLM"):
        run(FusedDPOTrainer, tmp_path, model=model, steps=1)


def test_a_wrong_scale_stops_the_first_step_where_the_chosen_are_short(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_kernels.integrations.model_parts.DIVIDERS", ())
    words = " ".join(WORDS[:30])
    rows = [{"prompt": f"w{i} ", "chosen": f"w{i + 1} w{i + 2}", "rejected": words} for i in range(4)]
    with pytest.raises(RuntimeError, match="does not reproduce the logits of GraniteForCausalLM"):
        run(FusedDPOTrainer, tmp_path, model="granite", steps=1, data=(Dataset.from_list(rows),) * 2)


class DoubledByTheAdapter(FusedDPOTrainer):
    """The adapter on its head does something that the fused head does not know."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        layer = self.accelerator.unwrap_model(self.model).get_output_embeddings()
        layer.register_forward_hook(lambda module, args, out: out if module.disable_adapters else 2.0 * out)


def test_the_policys_head_is_compared_and_not_only_its_references(tmp_path):
    adapter = peft.LoraConfig(**LORA | {"target_modules": ["lm_head"]})
    with pytest.raises(RuntimeError, match="does not reproduce the logits"):
        run(DoubledByTheAdapter, tmp_path, adapter=adapter, steps=1)


def test_an_adapter_that_acts_in_pefts_own_forward_is_trained_by_trls_own_loss(tmp_path, caplog):
    adapter = peft.LoraConfig(**LORA, alora_invocation_tokens=tokenizer().convert_tokens_to_ids(["w1", "w2"]))
    rows = [{"prompt": f"w{i} w1 w2 ", "chosen": f"w{i + 5} w4", "rejected": f"w{i + 9} w3 w8"} for i in range(8)]
    options = {"adapter": adapter, "steps": 2, "data": (Dataset.from_list(rows),) * 2}
    stock, _ = run(trl.DPOTrainer, tmp_path, **options)
    with caplog.at_level(logging.WARNING, logger="dpo_kernels.integrations.trl"):
        ours, _ = run(FusedDPOTrainer, tmp_path, **options)
    assert "TRL's own loss is used: the adapter 'default' (aLoRA) acts in PEFT's own forward" in caplog.text
    assert [entry.get("loss") for entry in ours] == [entry.get("loss") for entry in stock]
    assert min(entry["grad_norm"] for entry in ours[:2]) > 0.01  # of the adapter's weights: it was not left out
    with pytest.raises(ValueError, match=r"padding_free=True needs the fused loss.*aLoRA"):
        run(FusedDPOTrainer, tmp_path, padding_free=True, **options)


def test_mixed_precision(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # transformers 4 leaves bf16 there for all that follows
    exact, _ = run(FusedDPOTrainer, tmp_path, model="gemma2", steps=2)
    mixed, _ = run(FusedDPOTrainer, tmp_path, model="gemma2", steps=2, bf16=True)
    assert not torch.is_autocast_enabled("cpu")
    assert mixed[0]["loss"] == pytest.approx(exact[0]["loss"], abs=0.05)
    assert mixed[0]["grad_norm"] == pytest.approx(exact[0]["grad_norm"], rel=0.1)
    assert mixed[0]["logps/chosen"] != exact[0]["logps/chosen"]
    free, _ = run(FusedDPOTrainer, tmp_path, model="gemma2", steps=1, bf16=True, padding_free=True)
    assert free[0]["loss"] == pytest.approx(mixed[0]["loss"], abs=0.05)


def test_compute_metrics_gets_logits(tmp_path):
    seen = []
    _, trainer = run(FusedDPOTrainer, tmp_path, steps=1, per_device_eval_batch_size=7)
    trainer.compute_metrics = lambda prediction: seen.append(prediction.predictions) or {"seen": 1.0}
    assert trainer.evaluate()["eval_seen"] == 1.0
    (batch,) = trainer.get_eval_dataloader()
    with torch.no_grad():
        expected = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(torch.as_tensor(seen[0]), expected, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_resumes_to_the_same_log(tmp_path):
    whole, trainer = run(FusedDPOTrainer, tmp_path, save_strategy="steps", save_steps=2)
    whole = copy.deepcopy(whole)
    checkpoint = tmp_path / "FusedDPOTrainer" / "checkpoint-2"
    assert "dpo" in (checkpoint.parent / "README.md").read_text().lower()
    trainer.train(resume_from_checkpoint=str(checkpoint))
    resumed = trainer.state.log_history
    assert [entry["loss"] for entry in resumed[:2]] == [entry["loss"] for entry in whole[:2]]  # from the checkpoint
    for mine, theirs in zip(resumed[2:STEPS], whole[2:STEPS], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_a_trainer_ends_with_its_last_name(tmp_path):
    """Without waiting for the garbage collector, as TRL's own does.

    The trainer holds DistributedDataParallel. Where that outlives ``destroy_process_group()``, it ends the group
    itself and may hang (``leave`` in ``test_ddp`` says why); with a cycle of ours ``del trainer`` would
    not be enough.
    """
    ended = weakref.ref(run(FusedDPOTrainer, tmp_path, steps=1)[1])
    assert ended() is None


def test_a_batch_of_another_collator_is_refused_in_words():
    with pytest.raises(ValueError, match="data collator gives no attention_mask, completion_mask"):
        pair_batch({"input_ids": torch.zeros(2, 3, dtype=torch.int64)}, None, False)


def test_a_reference_is_scored_as_before_trl_1_9_too(tmp_path):
    _, trainer = run(FusedDPOTrainer, tmp_path, steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    now, before = trainer.compute_ref_log_probs(trainer.ref_model, batch), trainer.compute_ref_log_probs(batch)
    for mine, theirs in zip(before, now, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.abs().min() > 1


@pytest.mark.skipif(hasattr(trl.DPOTrainer, "_truncate_inputs"), reason="this TRL cuts sequences itself")
def test_sequences_are_cut_where_trl_0_29_cuts_them(tmp_path):
    class Cutting(FusedDPOTrainer):
        """TRL 0.29 has this method, and collates sequences whole."""

        def _truncate_inputs(self, input_ids, attention_mask, completion_mask):
            return tuple(tensor[:, : self.cut] for tensor in (input_ids, attention_mask, completion_mask))

        cut = 8

    cut, _ = run(Cutting, tmp_path, steps=2)
    expected, _ = run(FusedDPOTrainer, tmp_path, steps=2, max_length=8)
    whole, _ = run(FusedDPOTrainer, tmp_path, steps=2)
    for entry in (0, 1):
        for key in ("loss", "grad_norm", "logps/chosen", "rewards/rejected"):
            assert cut[entry][key] == pytest.approx(expected[entry][key], rel=1e-5), key
        assert abs(cut[entry]["logps/chosen"] - whole[entry]["logps/chosen"]) > 1
        assert cut[entry]["num_tokens"] == whole[entry]["num_tokens"] > expected[entry]["num_tokens"]  # as TRL counts
