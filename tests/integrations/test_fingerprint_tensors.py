"""Wrapped, sharded and quantised weights in the fingerprint of a model: their numbers, or a refusal in words."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

from dpo_kernels.integrations.fingerprint import model_fingerprint
from tests.integration_helpers import tiny, told


class Codes(torch.Tensor):
    """A weight as eight-bit codes and one scale, in torch's protocol of wrappers."""

    @staticmethod
    def __new__(cls, codes, scale, by=1):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale, by=1):
        self.codes, self.scale, self.by = codes, scale, by

    def __tensor_flatten__(self):
        return ["codes", "scale"], {"by": self.by}

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func is torch.ops.aten.detach.default, func
        return cls(args[0].codes, args[0].scale, args[0].by)


def codes(code=3, scale=0.5, by=1):
    return nn.Parameter(Codes(torch.full((4, 4), code, dtype=torch.int8), torch.tensor(scale), by), requires_grad=False)


def test_wrappers_of_tensors_count_by_what_they_wrap():
    found = [told(codes(**options)) for options in ({}, {}, {"code": 4}, {"scale": 0.25}, {"by": 2})]
    assert found[0] == found[1]
    assert len(set(found)) == 4


def test_a_wrapper_that_does_not_tell_its_numbers_is_refused():
    class Opaque(torch.Tensor):
        @staticmethod
        def __new__(cls):
            return torch.Tensor._make_wrapper_subclass(cls, (4, 4), dtype=torch.float32)

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return cls()

    with pytest.raises(TypeError, match=r"model: held is a Opaque.*load the model with plain tensors"):
        told(Opaque())
    with pytest.raises(TypeError, match="model: held is not a dense tensor"):
        told(torch.eye(3).to_sparse())


def test_a_subclass_that_is_the_tensor_itself():
    class Named(torch.Tensor):
        pass

    assert told(torch.arange(3.0).as_subclass(Named)) == told(torch.arange(3.0))


def test_a_sharded_model_is_the_model(tmp_path):
    from torch.distributed.fsdp import fully_shard

    model = tiny("llama")
    fingerprint = model_fingerprint(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        assert type(model.model.layers[0].mlp.up_proj.weight.data).__name__ == "DTensor"
        assert model_fingerprint(model) == fingerprint
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.data.mul_(2.0)
        assert model_fingerprint(model) != fingerprint
    finally:
        torch.distributed.destroy_process_group()


# --- weights of bitsandbytes ------------------------------------------------------------------------------------------


class QuantState:
    """As bitsandbytes has it: the scales of blocks, and those of the scales in a state of its own."""

    def __init__(self, absmax, state2=None):
        self.absmax, self.state2, self.quant_type = torch.tensor([absmax]), state2, "nf4"


class QuantisedWeight(nn.Parameter):
    pass


def quantised(**beside):
    model = tiny("llama")
    weight = QuantisedWeight(torch.ones(4, 4, dtype=torch.uint8), requires_grad=False)
    for name, value in beside.items():
        setattr(weight, name, value)
    model.model.layers[0].mlp.up_proj.weight = weight
    return model


def test_scales_beside_the_codes_are_in_it():
    models = [
        quantised(quant_state=QuantState(1.0)),
        quantised(quant_state=QuantState(2.0)),
        quantised(quant_state=QuantState(1.0, QuantState(1.0))),
        quantised(quant_state=QuantState(1.0, QuantState(2.0))),
        quantised(SCB=torch.tensor([1.0])),
        quantised(SCB=torch.tensor([2.0])),
        quantised(offset=torch.tensor([2.0])),
    ]
    assert len(set(map(model_fingerprint, models))) == len(models)
    trained = quantised(quant_state=QuantState(1.0), main_grad=torch.ones(4), module=models[0].model.layers[0])
    assert model_fingerprint(trained) == model_fingerprint(models[0])


def test_scales_that_the_first_forward_moves_are_the_same():
    model = quantised(SCB=torch.tensor([1.0]), CB=torch.ones(4, 4, dtype=torch.int8))
    layer = model.model.layers[0].mlp.up_proj
    layer.state = type("MatmulLtState", (), {})()
    fingerprint = model_fingerprint(model)
    layer.state.SCB, layer.state.CB = layer.weight.SCB, layer.weight.CB
    layer.weight.SCB = layer.weight.CB = None
    assert model_fingerprint(model) == fingerprint
    layer.state.SCB = torch.tensor([2.0])
    assert model_fingerprint(model) != fingerprint


def test_a_type_that_the_first_input_sets_is_no_part_of_it():
    model = quantised(quant_state=QuantState(1.0))
    layer = model.model.layers[0].mlp.up_proj
    layer.compute_type_is_set, layer.compute_dtype = False, None
    fingerprint = model_fingerprint(model)
    layer.compute_type_is_set, layer.compute_dtype = True, torch.float32
    assert model_fingerprint(model) == fingerprint


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_bitsandbytes_has_quantised(bits):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = tiny("llama")
    for parent in [module for module in model.modules() if hasattr(module, "up_proj")]:
        weight = parent.up_proj.weight.data
        if bits == 4:
            layer = bnb.nn.Linear4bit(*weight.shape[::-1], bias=False)
            layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True)
        else:
            layer = bnb.nn.Linear8bitLt(*weight.shape[::-1], bias=False, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        parent.up_proj = layer.to("cpu").eval()
    fingerprint = model_fingerprint(model)
    if bits == 8:  # of 4 bits some kinds of CPU pack the weights otherwise when they first run
        with torch.no_grad():
            model(input_ids=torch.arange(3, 14)[None])
        assert model.model.layers[0].mlp.up_proj.weight.SCB is None
        assert model_fingerprint(model) == fingerprint
    layer = model.model.layers[0].mlp.up_proj
    scales = layer.weight.quant_state.absmax if bits == 4 else layer.state.SCB
    scales += 1
    assert model_fingerprint(model) != fingerprint
