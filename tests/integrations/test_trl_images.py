"""The fused trainers on data with images: a tiny LLaVA, its own processor, and TRL's trainers beside them."""

import copy
import functools
import random

import pytest
import torch

pytest.importorskip("datasets", reason="datasets is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
trl = pytest.importorskip("trl", reason="trl is not installed")
Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
CLIPImageProcessor = getattr(transformers, "CLIPImageProcessorPil", None)
if CLIPImageProcessor is None:
    pytest.skip("transformers has no image processor that needs pillow alone", allow_module_level=True)

from datasets import Dataset  # noqa: E402

from dpo_kernels.integrations.trl import FusedDPOTrainer  # noqa: E402
from tests.integration_helpers import SMALL  # noqa: E402
from tests.trl_helpers import NOT_LOGGED_TWICE, OTHERS_WARNINGS, WORDS, tokenizer  # noqa: E402

try:
    from dpo_kernels.integrations.trl import FusedKTOTrainer
except ImportError:
    FusedKTOTrainer = None

pytestmark = OTHERS_WARNINGS
STEPS = 3


@functools.cache
def processor():
    words = copy.deepcopy(tokenizer())
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return transformers.LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


@functools.cache
def models():
    """A policy and a reference."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**SMALL),
        image_token_index=processor().tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    policy = transformers.LlavaForConditionalGeneration(config).eval()
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.006 * torch.randn_like(parameter))
    return policy, reference


def examples(kind):
    draw = random.Random(0)

    def some():
        return " ".join(draw.choices(WORDS, k=draw.randint(2, 8)))

    rows = []
    for number in range(12):
        row = {"images": [Image.frombytes("RGB", (20, 24), draw.randbytes(20 * 24 * 3))]}
        row["prompt"] = f"<image> {some()} "
        if kind == "dpo":
            row |= {"chosen": some(), "rejected": some()}
        else:
            row |= {"completion": some(), "label": number % 2 == 0}
        rows.append(row)
    return Dataset.from_list(rows)


def make(kind, fused, tmp_path, **options):
    stock_class, fused_class, config = {
        "dpo": (trl.DPOTrainer, FusedDPOTrainer, trl.DPOConfig),
        "kto": (trl.KTOTrainer, FusedKTOTrainer, trl.KTOConfig),
    }[kind]
    if fused_class is None:
        pytest.skip("FusedKTOTrainer needs a later TRL")
    policy, reference = copy.deepcopy(models())
    args = config(
        output_dir=str(tmp_path), max_steps=STEPS, logging_steps=1, per_device_train_batch_size=2, learning_rate=1e-2,
        optim="sgd", beta=0.3, bf16=False, use_cpu=True, gradient_checkpointing=False, save_strategy="no",
        report_to=[], seed=1, disable_tqdm=True, per_device_eval_batch_size=2, eval_strategy="steps", eval_steps=STEPS,
        **options,
    )  # fmt: skip
    return (fused_class if fused else stock_class)(
        model=policy,
        ref_model=reference,
        args=args,
        train_dataset=examples(kind),
        eval_dataset=examples(kind).select(range(4)),
        processing_class=processor(),
    )


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_logs_are_those_of_trl(kind, tmp_path):
    logs = []
    for fused in (False, True):
        trainer = make(kind, fused, tmp_path)
        if fused:
            assert trainer.fallback_reason == ""
        trainer.train()
        logs.append(trainer.state.log_history)
    stock, ours = logs
    assert len(stock) == len(ours) == STEPS + 2
    for theirs, mine in zip(stock, ours, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            if not any(word in key for word in NOT_LOGGED_TWICE):
                assert mine[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    assert ours[0]["grad_norm"] > 0.05


def batch_of(trainer):
    return trainer.data_collator([trainer.train_dataset[number] for number in range(4)])


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_gradients_reach_the_images_as_with_trl(kind, tmp_path):
    found = []
    for fused in (False, True):
        trainer = make(kind, fused, tmp_path)
        trainer.compute_loss(trainer.model, batch_of(trainer)).backward()
        found.append({name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None})
    wanted, got = found
    assert got.keys() == wanted.keys()
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    for name, gradient in wanted.items():  # that of a bias of keys is 0, and rounding
        assert (got[name] - gradient).norm() <= 2e-5 * gradient.norm().clamp(min=1e-4 * largest), name
    assert any("vision_tower" in name and float(gradient.norm()) > 1e-4 for name, gradient in wanted.items())


def test_compute_metrics_gets_the_logits_of_the_images(tmp_path):
    trainer = make("dpo", True, tmp_path)
    batch = batch_of(trainer)
    _, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    with torch.no_grad():
        wanted = trainer.model(**{name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}).logits
    torch.testing.assert_close(outputs.logits, wanted)


def test_images_are_not_packed(tmp_path):
    with pytest.raises(ValueError, match=r"padding_free=True needs the fused loss, .* images cannot be packed"):
        make("dpo", True, tmp_path, padding_free=True)
