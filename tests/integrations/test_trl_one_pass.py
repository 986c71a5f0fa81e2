"""``FusedORPOTrainer`` and ``FusedCPOTrainer`` against TRL's own: every logged value, every gradient, and memory."""

import copy
import functools
import logging
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("datasets", reason="datasets is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
trl = pytest.importorskip("trl", reason="trl is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

import transformers  # noqa: E402

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # trl.experimental says at its import that it is experimental
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from dpo_kernels.integrations.trl import FusedCPOTrainer, FusedORPOTrainer, orpo  # noqa: E402
from tests.distributed import gloo  # noqa: E402
from tests.gemm_counts import costs  # noqa: E402
from tests.integration_helpers import SMALL  # noqa: E402
from tests.trl_helpers import LARGEST, NOT_LOGGED_TWICE, OTHERS_WARNINGS, calm, ratings, tokenizer  # noqa: E402

pytestmark = OTHERS_WARNINGS
STEPS = 3
KINDS = {"orpo": (ORPOTrainer, FusedORPOTrainer, ORPOConfig), "cpo": (CPOTrainer, FusedCPOTrainer, CPOConfig)}


def make(kind, fused, tmp_path, model="llama", adapter=None, **options):
    policy = calm(model) if isinstance(model, str) else copy.deepcopy(model)
    defaults = {
        "learning_rate": 1e-2, "optim": "sgd", "per_device_train_batch_size": 2, "per_device_eval_batch_size": 3,
        "beta": 0.3, "max_length": 64, "bf16": False, "use_cpu": True, "gradient_checkpointing": False,
        "lr_scheduler_type": "constant", "save_strategy": "no",
    }  # fmt: skip
    stock_class, fused_class, config = KINDS[kind]
    args = config(
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
    return (fused_class if fused else stock_class)(
        model=policy,
        args=args,
        train_dataset=ratings(12, 0),
        eval_dataset=ratings(7, 1),
        processing_class=tokenizer(),
        peft_config=adapter,
    )


def assert_same_logs(kind, tmp_path, **options):
    logs = []
    for fused in (False, True):
        trainer = make(kind, fused, tmp_path, **options)
        if fused:
            assert trainer.fallback_reason == ""
        trainer.train()
        logs.append(trainer.state.log_history)
    assert_same_entries(*logs)
    return trainer


def assert_same_entries(stock, ours):
    assert len(stock) == len(ours) == STEPS + 2
    for step, (theirs, mine) in enumerate(zip(stock, ours, strict=True)):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            if not any(word in key for word in NOT_LOGGED_TWICE):
                assert abs(mine[key] - value) <= 1e-5 * max(1.0, abs(value)), f"entry {step}, {key}"
            assert abs(value) <= LARGEST.get(key.removeprefix("eval_"), abs(value)), f"{key} is {value}: a wild run"
    wanted = {"loss", "grad_norm", "nll_loss", "logps/chosen", "logits/rejected", "rewards/margins"}
    assert wanted <= set(ours[0])
    assert {f"eval_{key}" for key in wanted - {"grad_norm"}} <= set(ours[STEPS])
    assert abs(ours[0]["grad_norm"]) > 0.05
    assert abs(ours[0]["logits/chosen"]) > 1e-4


STARTS = {"FSDP": ("DDP", "FSDP2", "FSDP1"), "DeepSpeed": ("ZeRO-3", "ZeRO-2")}  # each of two processes


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """What both ranks have logged, by start. The first test that asks for one makes it."""

    @functools.cache
    def start(name):
        if name == "DeepSpeed":
            pytest.importorskip("deepspeed", reason="deepspeed is not installed")
        folder = tmp_path_factory.mktemp(name)
        return gloo.run("everything", 2, folder, STARTS[name], folder, module="one_pass")

    return start


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("start", "engine"), [(start, each) for start, engines in STARTS.items() for each in engines])
def test_two_ranks_log_what_they_log_with_trl(kind, start, engine, started, tmp_path):
    alone = make(kind, True, tmp_path / "alone")
    alone.train()
    for rank in started(start):
        stock, ours = rank[kind, engine]
        assert_same_entries(stock, ours)
        assert ours[0]["loss"] != alone.state.log_history[0]["loss"]  # of other pairs


@pytest.mark.parametrize("model", ["llama", "gemma2", "cohere", "granite", "phi", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_logs_are_those_of_trl(kind, model, tmp_path):
    assert_same_logs(kind, tmp_path, model=model)


LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]}
RUNS = {
    "accumulated": {"gradient_accumulation_steps": 3},
    "checkpointed": {"gradient_checkpointing": True},
    "peft": {"adapter": peft.LoraConfig(**LORA)},
    "lora on the head": {"adapter": peft.LoraConfig(**LORA | {"target_modules": ["lm_head", "q_proj"]})},
    "peft, checkpointed": {"adapter": peft.LoraConfig(**LORA), "gradient_checkpointing": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RUNS)
def test_logs_are_those_of_trl_in_every_setup(kind, name, tmp_path):
    assert_same_logs(kind, tmp_path, **RUNS[name])


OPTIONS = {
    "sigmoid": {"label_smoothing": 0.1},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo", "cpo_alpha": 0.5},
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.7},
    "alphapo": {"loss_type": "alphapo", "alpha": 0.4},
    "alpha of averages": {"loss_type": "simpo", "alpha": 0.1, "cpo_alpha": 2.0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_loss_of_cpo_is_that_of_trl(name, tmp_path):
    assert_same_logs("cpo", tmp_path, **OPTIONS[name])


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_of_experts_has_its_router_loss(kind, tmp_path):
    torch.manual_seed(0)
    sizes = {name: value for name, value in SMALL.items() if name != "head_dim"}
    config = transformers.MixtralConfig(
        **sizes, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.2
    )
    trainer = assert_same_logs(kind, tmp_path, model=transformers.AutoModelForCausalLM.from_config(config).eval())
    assert trainer.aux_loss_enabled


def step(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@functools.cache
def batch_of(kind):
    trainer = make(kind, False, Path(tempfile.mkdtemp()))
    return trainer.data_collator([trainer.train_dataset[index] for index in range(4)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["llama", "gemma2"])
def test_gradients_are_those_of_trl(kind, model, tmp_path):
    batch = batch_of(kind)
    (theirs, wanted), (mine, got) = (step(make(kind, fused, tmp_path, model=model), batch) for fused in (False, True))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= 2e-5 * gradient.norm().clamp(min=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_batch_without_a_token_stays_in_the_graph(kind, tmp_path):
    batch = {name: value.clone() if torch.is_tensor(value) else value for name, value in batch_of(kind).items()}
    for side in ("chosen", "rejected"):
        batch[f"{side}_labels"].fill_(-100)
        batch[f"{side}_attention_mask"][:, 1:] = 0
    trainer = make(kind, True, tmp_path)
    loss, gradients = step(trainer, batch)
    assert torch.isfinite(loss)
    assert set(gradients) == {name for name, _ in trainer.model.named_parameters()}
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients.values())


def test_a_pair_without_a_rejected_token_leaves_the_others(tmp_path):
    batch = {name: value.clone() if torch.is_tensor(value) else value for name, value in batch_of("orpo").items()}
    batch["rejected_labels"][1].fill_(-100)
    loss, gradients = step(make("orpo", True, tmp_path), batch)
    stock = make("orpo", False, tmp_path)
    assert torch.isnan(step(stock, batch)[0])
    keep = [0, 2, 3]
    few = {name: value[keep] if torch.is_tensor(value) else value for name, value in batch.items()}
    nll = stock.concatenated_forward(stock.model, batch)[4]
    odds = stock.odds_ratio_loss(*stock.concatenated_forward(stock.model, few)[:2])[0]
    torch.testing.assert_close(loss, (nll - odds.sum() / 4).detach(), rtol=1e-5, atol=1e-5)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("kind", KINDS)
def test_no_full_logits_are_made(kind, tmp_path):
    torch.manual_seed(0)
    V, H = 4096, 32
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | {"vocab_size": V})).eval()
    batch = batch_of(kind)
    rows, length = 8, max(batch[f"{side}_input_ids"].shape[1] for side in ("chosen", "rejected"))
    full = rows * length * V * 4
    largest, flops = {}, {}
    for fused in (False, True):
        trainer = make(kind, fused, tmp_path, model=model)
        trainer.compute_loss(trainer.model, batch)  # the self-check of the head
        flops[fused], (largest[fused], _) = costs(functools.partial(trainer.compute_loss, trainer.model, batch))
    assert largest[False] >= full
    assert largest[True] <= max(V * H * 4, 0.75 * full)
    scored = sum(int((batch[f"{side}_labels"][:, 1:] != -100).sum()) for side in ("chosen", "rejected"))
    if kind == "orpo":
        scored += int(((batch["chosen_labels"] == -100) & (batch["chosen_attention_mask"] == 1))[:, 1:].sum())
    # Three matrix products of 2 V H FLOP a position each, of the scored positions only.
    assert flops[False] - flops[True] == pytest.approx(3 * 2 * V * H * (rows * length - scored), rel=0.01)


def test_an_encoder_decoder_goes_to_trl_with_one_line(tmp_path, caplog):
    model = calm("llama")
    model.config.is_encoder_decoder = False
    trainer = make("cpo", True, tmp_path, model=model)
    trainer.is_encoder_decoder, trainer._reason = True, None
    with caplog.at_level(logging.WARNING, logger="dpo_kernels"):
        assert trainer.fallback_reason == "the model is an encoder-decoder"
    said = [record.getMessage() for record in caplog.records if record.name.startswith("dpo_kernels")]
    assert said == ["FusedCPOTrainer: TRL's own step is used: the model is an encoder-decoder"]
    trainer.is_encoder_decoder = False
    stock = make("cpo", False, tmp_path, model=model)
    batch = batch_of("cpo")
    assert torch.equal(step(trainer, batch)[0], step(stock, batch)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_trl_that_adds_up_its_loss_otherwise_is_refused(kind, tmp_path, monkeypatch):
    stock_class = KINDS[kind][0]
    original = stock_class.get_batch_loss_metrics

    def doubled(self, *given, **named):
        loss, metrics = original(self, *given, **named)
        return 2 * loss, metrics

    trainer = make(kind, True, tmp_path)
    monkeypatch.setattr(stock_class, "get_batch_loss_metrics", doubled)
    with pytest.raises(RuntimeError, match=r"this version of TRL makes .* use TRL's own trainer"):
        trainer.compute_loss(trainer.model, batch_of(kind))


def test_the_head_is_checked_at_the_first_batch(tmp_path):
    trainer = make("orpo", True, tmp_path)
    trainer._head(trainer.model).logit_scale = 1.3
    with pytest.raises(RuntimeError, match="does not reproduce the logits"):
        trainer.compute_loss(trainer.model, batch_of("orpo"))


def test_every_scored_position_is_in_one_sequence():
    g = torch.Generator().manual_seed(3)
    mask = (torch.arange(9) < torch.tensor([9, 6, 4, 9, 8, 3])[:, None]).long()
    ids = torch.randint(3, 60, (6, 9), generator=g) * mask
    completion = (torch.rand(6, 9, generator=g) < 0.5) & mask.bool() & (torch.arange(9) > 1)  # turns by turns
    labels = ids.masked_fill(~completion, -100)
    rows = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    order, targets, cu_seqlens = orpo.sequences({f"concatenated_{name}": value for name, value in rows.items()})
    assert len(set(order.tolist())) == len(order)
    for pair in range(3):
        for number, (row, wanted) in enumerate(
            [
                (pair, completion[pair]),
                (3 + pair, completion[3 + pair]),
                (pair, mask[pair].bool() & ~completion[pair]),
                (pair, torch.zeros(9, dtype=torch.bool)),
            ]
        ):
            part = slice(cu_seqlens[4 * pair + number], cu_seqlens[4 * pair + number + 1])
            places = wanted[1:].nonzero()[:, 0]
            assert order[part].tolist() == (row * 8 + places).tolist()
            assert targets[part].tolist() == ids[row, 1:][places].tolist()
