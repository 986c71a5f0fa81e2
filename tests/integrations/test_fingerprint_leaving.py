"""Models whose forward leaves something behind, and ids of padding: the fingerprint of the same model is the same."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

from dpo_kernels.integrations.fingerprint import model_fingerprint  # noqa: E402
from tests.integration_helpers import LEAVING, leaving, tiny  # noqa: E402

IDS = torch.arange(3, 14)[None]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def state(model):
    kept = {name: tensor for module in model.modules() for name, tensor in vars(module).items()}
    return {**dict(model.named_buffers()), **dict(model.named_parameters())}, kept


@pytest.mark.parametrize("name", LEAVING)
def test_what_a_forward_leaves_behind_changes_nothing(name):
    model = leaving(name)
    fingerprint = model_fingerprint(model)
    before = str(state(model))
    logits(model)
    assert str(state(model)) != before  # or else nothing is tried
    assert model_fingerprint(model) == fingerprint
    model.train()
    assert model_fingerprint(model) == fingerprint
    assert model_fingerprint(leaving(name, seed=1)) != fingerprint
    assert model_fingerprint(leaving(name)) == fingerprint


def test_weights_that_rwkv_divides_are_counted():
    model = leaving("rwkv")
    fingerprint = model_fingerprint(model)
    with torch.no_grad():
        model.rwkv.blocks[2].feed_forward.value.weight.mul_(2.0)
    assert model_fingerprint(model) != fingerprint
    assert model_fingerprint(leaving("rwkv", rescale_every=2)) != fingerprint
    whole = leaving("rwkv", rescale_every=0)
    fingerprint = model_fingerprint(whole)
    logits(whole)
    assert model_fingerprint(whole) == fingerprint


def test_a_table_of_positions_is_counted_by_its_first_rows():
    for model in map(leaving, ("xglm", "trocr")):
        fingerprint = model_fingerprint(model)
        next(module for module in model.modules() if hasattr(module, "weights")).weights.mul_(1.1)
        assert model_fingerprint(model) != fingerprint


class YarnRotaryEmbedding(torch.nn.Module):
    """As code that comes with a model has it: a table that grows, and frequencies that follow from the length."""

    def __init__(self, length=16, base=100.0):
        super().__init__()
        self.forward(length, base)

    def forward(self, length, base=100.0):
        self.register_buffer("inv_freq", base ** -torch.arange(0.0, 1.0, 0.25), persistent=False)
        self.max_seq_len_cached = length
        angles = torch.arange(float(length))[:, None] * self.inv_freq
        self.register_buffer("cos_cached", angles.cos()[None, None], persistent=False)
        self.register_buffer("sin_cached", angles.sin(), persistent=False)


class DynamicNTKRotaryEmbedding(YarnRotaryEmbedding):
    pass


@pytest.mark.parametrize(("kind", "by_length"), [(YarnRotaryEmbedding, False), (DynamicNTKRotaryEmbedding, True)])
def test_tables_of_a_rotary_embedding_that_comes_with_a_model(kind, by_length):
    model = tiny("llama")
    rotary = model.model.own = kind()
    fingerprint = model_fingerprint(model)
    rotary(64)
    assert model_fingerprint(model) == fingerprint
    rotary(64, base=50.0)
    assert (model_fingerprint(model) == fingerprint) == by_length


def test_offsets_of_an_image_that_a_model_has_seen_change_nothing():
    model = tiny("llama")
    model.model.rope_deltas = None
    fingerprint = model_fingerprint(model)
    model.model.rope_deltas = torch.tensor([[3]])
    assert model_fingerprint(model) == fingerprint


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_an_id_of_padding_that_only_gradients_depend_on_changes_nothing(name):
    config = copy.deepcopy(tiny(name).config)
    config.pad_token_id = 2
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.load_state_dict(tiny(name).state_dict())
    assert torch.equal(logits(model), logits(tiny(name)))
    assert model_fingerprint(model) == model_fingerprint(tiny(name))


def test_an_id_of_padding_that_positions_are_counted_from_is_another_model():
    class Counting(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids.clamp(min=self.padding_idx))

    model = tiny("llama")
    found = set()
    for padding in (1, 2):
        model.model.own = Counting(4, 4, padding, _weight=torch.ones(4, 4))
        found.add(model_fingerprint(model))
    assert len(found) == 2
