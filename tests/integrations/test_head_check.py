"""The self-check of a fused head lets through what is right: images, compiled models, parts of a backbone."""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from dpo_kernels.integrations.transformers import fused_lm_head  # noqa: E402
from tests.integration_helpers import SMALL, H, V, batch, tiny, without  # noqa: E402

assert batch  # a fixture

IMAGE = V - 1
TEXT = without("bos_token_id", "eos_token_id", "pad_token_id")


def with_images(rows, tokens):
    """Token ids of four sequences, in some of which an image stands."""
    ids = torch.randint(3, IMAGE - 1, (4, 11))
    for row in rows:
        ids[row, 1 : 1 + tokens] = IMAGE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def llava():
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**SMALL), image_token_index=IMAGE,
        vision_feature_layer=-1,
    )  # fmt: skip
    # Two images for four sequences: of the second row and of the last.
    return config, with_images([1, 3], 4) | {"pixel_values": torch.randn(2, 3, 8, 8)}


def qwen2_vl():
    vision = {
        "depth": 1, "embed_dim": 16, "hidden_size": H, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
        "temporal_patch_size": 1,
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2VLConfig(
        text_config=without("head_dim") | {"rope_parameters": rope}, vision_config=vision, image_token_id=IMAGE,
        vision_start_token_id=1, vision_end_token_id=2, video_token_id=IMAGE - 1,
    )  # fmt: skip
    inputs = with_images([0, 1, 2, 3], 1)
    grid = torch.tensor([[1, 2, 2]] * 4)  # 16 patches, 4 for each image
    kinds = (inputs["input_ids"] == IMAGE).int()
    return config, inputs | {
        "pixel_values": torch.randn(16, 3 * 4 * 4), "image_grid_thw": grid, "mm_token_type_ids": kinds,
    }  # fmt: skip


def qwen2_vl_positions():
    config, inputs = qwen2_vl()
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    inputs["input_ids"] = inputs["input_ids"].clamp(max=IMAGE - 2)
    positions = torch.arange(11).expand(3, 4, 11) + torch.arange(3)[:, None, None]
    return config, inputs | {"position_ids": positions}


@pytest.mark.parametrize("case", [llava, qwen2_vl, qwen2_vl_positions])
def test_inputs_that_do_not_begin_with_the_batch(case):
    config, inputs = case()
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    hidden, weight, _ = fused_lm_head(model)(**inputs)
    torch.testing.assert_close(hidden @ weight.t(), model(**inputs).logits, rtol=1e-5, atol=1e-5)
    head = fused_lm_head(model)
    head.logit_scale = 1.02
    with pytest.raises(RuntimeError, match="does not reproduce the logits"):
        head(**inputs)


def rows_seen(model, **inputs):
    """Over how many sequences the check runs."""
    seen = []
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.shape[:-1]))
    fused_lm_head(model).check(**inputs)
    handle.remove()
    return [shape[0] for shape in seen]


def test_the_check_takes_two_sequences_where_that_is_safe(batch):
    model, inputs = tiny("llama"), batch[0]
    assert rows_seen(model, **inputs) == [2]
    assert rows_seen(model, **inputs, position_ids=torch.arange(11).expand(4, 11), labels=batch[1]) == [2]
    assert rows_seen(model, **inputs | {"attention_mask": torch.ones(4, 1, 11, 11).tril()}) == [4]
    assert rows_seen(tiny("opt"), **inputs) == [2, 2]  # which calls a part of its backbone


def test_the_check_makes_few_logits(batch):
    model, shapes = tiny("gpt2"), []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    fused_lm_head(model).check(**batch[0] | {"attention_mask": torch.ones(4, 1, 11, 11).tril()})
    assert shapes == [(2, 8, V)]


def test_padding_is_not_compared(batch):
    model = tiny("llama")
    head = fused_lm_head(model)
    ids = batch[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0

    def stain(module, args, outputs):
        outputs.last_hidden_state[:, 8:] = torch.nan

    handle = model.model.register_forward_hook(stain)
    head.check(input_ids=ids, attention_mask=mask)
    with pytest.raises(RuntimeError, match="does not reproduce the logits"):
        head.check(input_ids=ids, attention_mask=torch.ones_like(ids))
    handle.remove()


def padded(width, *kept):
    """Token ids and a mask ``(B, width)``; a positive count is padded on the right, a negative one on the left."""
    ids = torch.randint(3, V, (len(kept), width), generator=torch.Generator().manual_seed(2))
    mask = torch.zeros_like(ids)
    for row, count in zip(mask, kept, strict=True):
        row[slice(count) if count >= 0 else slice(count, None)] = 1
    return {"input_ids": ids, "attention_mask": mask}


@functools.cache
def granite_scaled():
    return tiny("granite")


@functools.cache
def gemma_with_small_logits():
    """A soft cap that only stretched logits reach."""
    model = tiny("gemma2")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-3)
    model.config.final_logit_softcapping = 30.0
    return model


# Of the first two rows nothing stands in the last eight columns, then other shapes of what is kept.
PADDED = {
    "on the right": (20, 20, 40, 40), "on the left": (-3, -3, 40, 40), "both sides": (5, -5, 9, 40),
    "one position": (1, 1), "one row": (0, 0, 0, 6), "one position in all": (0, 0, 1), "no short row": (40, 40),
    "two wholly masked": (0, 0, 20, 20),
}  # fmt: skip


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("as_rows", [True, False])
def test_positions_that_are_not_padding_are_found_wherever_they_stand(name, as_rows):
    inputs = padded(40, *PADDED[name])
    # An input that does not have a row for each sequence makes the check run over all of them.
    inputs |= {} if as_rows else {"position_ids": torch.arange(40)[None]}
    model = granite_scaled()
    head = fused_lm_head(model)
    head.check(**inputs)
    assert head.checked
    wrong = fused_lm_head(model)
    wrong.logit_scale = 1.0
    with pytest.raises(RuntimeError, match="does not reproduce the logits"):
        wrong(**inputs)
    assert not wrong.checked


@pytest.mark.parametrize("kept", [*range(1, 8), -1, -4, 12])
def test_a_forgotten_softcap_is_caught_whatever_is_kept(kept):
    model = gemma_with_small_logits()
    head = fused_lm_head(model)
    head.check(**padded(12, kept, kept))
    head.softcap = None
    with pytest.raises(RuntimeError, match="softcap=None"):
        head.check(**padded(12, kept, kept))


def test_where_nothing_can_be_compared_the_next_batch_is():
    head = fused_lm_head(granite_scaled())
    head.logit_scale = 1.0
    for inputs in (padded(40, 0, 0), padded(0, 0, 0), {"input_ids": torch.zeros(0, 5, dtype=torch.int64)}):
        head.check(**inputs)
        assert not head.checked
    with pytest.raises(RuntimeError, match="does not reproduce the logits"):
        head(**padded(40, 20, 20, 40, 40))


def test_the_rows_with_most_to_compare_are_taken():
    model, seen = tiny("llama"), []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    model.model.register_forward_hook(lambda module, args, out: seen.append(tuple(out[0].shape)))
    fused_lm_head(model).check(**padded(40, 0, 1, 5, 40, 20, 30))
    assert seen == [(2, 40, H), (2, 8, V)]
    seen.clear()
    fused_lm_head(model).check(**padded(40, 0, 0, 5))
    assert seen == [(1, 40, H), (1, 8, V)]


class Projected(transformers.LlamaForCausalLM):
    """Something that the constructor cannot see stands between its backbone and its head."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        hidden = self.between(self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state)
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=self.lm_head(hidden))


@pytest.mark.parametrize(
    ("between", "words"),
    [
        (torch.tanh, r"what its output embedding receives is not what its backbone returns\)"),
        (lambda hidden: hidden[:, 1:], r"returns hidden states \(2, 11, 32\), but its output embedding receives"),
    ],
)
def test_what_stands_between_backbone_and_head_is_caught(batch, between, words):
    model = Projected(transformers.LlamaConfig(**SMALL)).eval()
    model.between = between
    with pytest.raises(RuntimeError, match=words):
        fused_lm_head(model)(**batch[0])
    model.between = lambda hidden: 3.0 * hidden  # a scale is one, wherever it stands
    head = fused_lm_head(model)
    head.logit_scale = 3.0
    head.check(**batch[0])


class OtherInputs(transformers.LlamaForCausalLM):
    """Gives its backbone other inputs than its own."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        hidden = self.model(input_ids=input_ids.flip(1), attention_mask=attention_mask).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=self.lm_head(hidden))


class NoEmbedding(transformers.LlamaForCausalLM):
    """Never calls its output embedding."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=hidden @ self.lm_head.weight.t())


@pytest.mark.parametrize(
    ("kind", "words"),
    [(OtherInputs, "does not reproduce the logits"), (NoEmbedding, "without calling its output embedding")],
)
def test_what_the_check_cannot_vouch_for_is_refused(batch, kind, words):
    model = kind(transformers.LlamaConfig(**SMALL)).eval()
    with pytest.raises(RuntimeError, match=rf"{words}.*check=False"):
        fused_lm_head(model)(**batch[0])
    hidden, _, _ = fused_lm_head(model, check=False)(**batch[0])
    assert torch.equal(hidden, model.model(**batch[0]).last_hidden_state)


# --- compiled models --------------------------------------------------------------------------------------------------


def compiled_whole(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_backbone(model):
    model.model = torch.compile(model.model, backend="eager")
    return model


def compiled_head(model):
    model.lm_head = torch.compile(model.lm_head, backend="eager")
    return model


@pytest.fixture
def _forgotten():
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize(
    ("compiled", "attached"),
    [
        (compiled_whole, ""), (compiled_whole, "before"), (compiled_in_place, "after"), (compiled_backbone, ""),
        (compiled_head, ""),
    ],
)  # fmt: skip
def test_a_compiled_model(compiled, attached, batch):
    inputs = batch[0]
    model = tiny("llama")
    model.model.layers = model.model.layers[:1]

    def work(outputs, hidden, weight, options):
        return hidden @ weight.t()

    expected = model(**inputs).logits
    if attached == "before":
        fused_lm_head(model).attach()
    wrapped = compiled(model)
    if attached == "after":
        fused_lm_head(wrapped).attach()
    got = wrapped(**inputs, fused_call=work) if attached else work(None, *fused_lm_head(wrapped)(**inputs))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    assert float(model.get_input_embeddings().weight.grad.norm()) > 0
    wrong = fused_lm_head(wrapped)
    wrong.logit_scale = 1.02
    with pytest.raises(RuntimeError, match="does not reproduce the logits"):
        wrong(**inputs)


# --- in TRL's trainer -------------------------------------------------------------------------------------------------


@pytest.fixture
def train(tmp_path):
    """Two steps of TRL's trainer and of the fused one; the log, by entry."""
    helpers = pytest.importorskip("tests.trl_helpers", reason="trl, peft or datasets is not installed")
    from dpo_kernels.integrations.trl import FusedDPOTrainer

    def run(stock=False, check_head=True, **options):
        changes = {"check_head": check_head, "evaluate": lambda *args, **options: {}}
        kind = type("Trainer", (FusedDPOTrainer,), changes)
        kind = helpers.trl.DPOTrainer if stock else kind
        log, trainer = helpers.run(kind, tmp_path, precompute_ref_log_probs=True, **{"steps": 2} | options)
        assert stock or trainer.fallback_reason == ""
        return [entry["loss"] for entry in log if "loss" in entry]

    return run


TRAINED_ON_THE_DAY = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class TestTrainer:
    """Each loss is compared with that of TRL's own trainer."""

    pytestmark = TRAINED_ON_THE_DAY

    def test_a_model_whose_forward_calls_a_part_of_its_backbone(self, train):
        assert train(model="opt") == pytest.approx(train(stock=True, model="opt"), rel=1e-5)

    @pytest.mark.slow
    @pytest.mark.usefixtures("_forgotten")
    def test_a_compiled_model_which_is_not_compiled_anew_for_every_batch(self, train):
        from tests.trl_helpers import ratings, with_columns

        def one_layer(model):
            model.model.layers = model.model.layers[:1]
            return model

        compiler = CompileCounterWithBackend("eager")
        rows = ratings(24, 0)
        data = (with_columns(rows, [-20.0] * 24, [-21.0] * 24),) * 2
        compiled = train(
            wrap=lambda model: torch.compile(one_layer(model), backend=compiler), data=data, steps=6, check_head=False
        )
        assert compiled == pytest.approx(train(wrap=one_layer, data=data, steps=6), rel=1e-5)
        assert compiler.frame_count <= 2  # of one length and of any

    def test_the_check_can_be_left_out(self, train):
        def shifted(model):
            model.lm_head.register_forward_hook(lambda module, args, logits: logits + torch.arange(float(V)))
            return model

        with pytest.raises(RuntimeError, match=r"does not reproduce the logits.*check_head = False"):
            train(wrap=shifted)
        assert train(wrap=shifted, check_head=False) == train()
