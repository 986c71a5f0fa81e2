"""Values, functions, objects and classes in the fingerprint of a model: equal only where they compute alike."""

import dataclasses
import enum
import functools
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

from dpo_kernels.integrations.fingerprint import model_fingerprint  # noqa: E402
from dpo_kernels.integrations.fingerprint_values import is_dropout  # noqa: E402
from tests.integration_helpers import tiny, told  # noqa: E402


class Colour(enum.Enum):
    red, green = 1, 2


@dataclasses.dataclass
class Scale:
    by: float


class Plain:
    def __init__(self, by):
        self.by = by

    def scaled(self, x):
        return x * self.by


class Slots:
    __slots__ = ("by",)

    def __init__(self, by):
        self.by = by


def scaled(by):
    return lambda x: x * by


def default(by):
    def function(x, by=by):
        return x * by

    return function


def wrapped(by):
    return functools.cache(lambda x: x * by)


def globally(by):
    return eval("lambda x: x * BY", {"BY": by})


def array(by):
    return np.array([1.0, by], dtype=np.float32)


MAKERS = {
    "partial": lambda by: functools.partial(torch.clamp, min=by),
    "partial's function": lambda by: functools.partial(scaled(by)),
    "partial's argument": lambda by: functools.partial(torch.mul, by),
    "numpy number": np.float32,
    "numpy array": array,
    "array of objects": lambda by: np.array([None, by], dtype=object),
    "enum": lambda by: Colour.red if by == 2.0 else Colour.green,
    "dataclass": Scale,
    "namespace": lambda by: types.SimpleNamespace(by=by),
    "object": Plain,
    "slots": Slots,
    "nested object": lambda by: {"a": [Plain(Plain(by))]},
    "method": lambda by: Plain(by).scaled,
    "set": lambda by: {"a", by, "c"},
    "closure": scaled,
    "default": default,
    "wrapper": wrapped,
    "global": globally,
    "inner function": lambda by: eval(f"lambda x: (lambda y: y * {by})(x)"),
    "constant": lambda by: eval(f"lambda x: x * {by}"),
    "configuration": lambda by: transformers.GraniteConfig(logits_scaling=by),
    "dictionary": lambda by: {"by": by},
    "key": lambda by: {(Colour.red if by == 2.0 else Colour.green): 1, by: 2},
    "longer list": lambda by: [0] * int(by),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_values_are_equal_where_what_they_hold_is(kind):
    make = MAKERS[kind]
    assert told(make(2.0)) == told(make(2.0))
    assert told(make(2.0)) != told(make(3.0))


def test_a_module_that_holds_another_value_is_another_model():
    model = tiny("llama")
    found = set()
    for by in (2.0, 3.0):
        model.model.norm.activation = functools.partial(torch.clamp, max=by)
        found |= {model_fingerprint(model), model_fingerprint(model)}
    assert len(found) == 2


def test_functions_differ_by_what_they_do_and_not_by_having_run():
    functions = [lambda x: x + 1, lambda x: x - 1, lambda x: x.exp(), lambda x: x.log()]
    before = [told(function) for function in functions]
    assert len(set(before)) == 4
    for function in functions:
        for _ in range(100):  # the interpreter rewrites the code that it has run
            function(torch.ones(()))
    assert [told(function) for function in functions] == before


def test_values_that_hold_themselves_or_their_module():
    loop = [1]
    loop.append(loop)
    space = types.SimpleNamespace()
    space.own = space
    assert told(loop) != told([1])
    assert told(space) == told(space)
    model = tiny("llama")
    fingerprint = model_fingerprint(model)
    for layer in model.model.layers:
        layer.parent = [model]
        layer.method = layer.self_attn.extra_repr
    assert model_fingerprint(model) == model_fingerprint(model) != fingerprint


PROCESS = """
from enum import Enum
from dpo_kernels.integrations.fingerprint_values import Values
def told(value):
    parts = []
    Values(lambda data: parts.append(bytes(data)), None).value("held", value)
    return b"".join(parts)
kind = Enum("kind", "a b")
sets = {"some", "words", "without", "an", "order"}, {kind.a: 1, kind.b: {2}}
print(told((sets, lambda x: x in {"some", "words", "without"}, lambda: sets, object())))
"""


def test_every_process_finds_the_same(capfd):
    subprocess.run([sys.executable, "-c", PROCESS], check=True)  # with strings hashed by another seed
    exec(compile(PROCESS, "<string>", "exec"), {"__name__": "__main__"})
    first, second = capfd.readouterr().out.splitlines()
    assert first == second


DROPOUTS = (
    "dropout attn_pdrop layerdrop drop_path_rate attention_dropout pos_drop hidden_dropout_prob dropout_rate "
    "attn_dropout_p activation_dropout"
)
ACTING = (
    "token_dropout normalize_router_prob_before_dropping xdrope_section drop_vision_last_layer drop_tokens token_drop"
)


def test_dropout_is_told_from_what_acts_in_evaluation():
    model = tiny("llama")
    fingerprint = model_fingerprint(model)
    for name in (*DROPOUTS.split(), *ACTING.split()):
        assert is_dropout(name) == (name in DROPOUTS.split())
        for holder in (model.model.layers[0], model.config):
            setattr(holder, name, 0.5)
            assert (model_fingerprint(model) == fingerprint) == is_dropout(name), name
            delattr(holder, name)


def test_a_dropout_of_a_class_of_its_own_is_counted():
    class Doubled(nn.Dropout):
        def forward(self, x):
            return 2 * x

    model = tiny("gpt2")
    fingerprint = model_fingerprint(model)
    model.transformer.drop = nn.Dropout(0.9)
    assert model_fingerprint(model) == fingerprint
    model.transformer.drop = Doubled()
    assert model_fingerprint(model) != fingerprint


# --- classes ----------------------------------------------------------------------------------------------------------


def test_classes_of_two_modules_are_two():
    classes = [type("Norm", (), {"__module__": module}) for module in ("some.modeling_a", "some.modeling_b")]
    assert told(classes[0]()) != told(classes[1]())


MODELING = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from .helping import BY

class Norm(torch.nn.Identity):
    def forward(self, x):
        return x * BY

class OwnForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.norm = Norm()
"""


def test_code_that_comes_with_a_model_is_counted(tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    weights, found = tiny("llama").state_dict(), []
    for folder, helping in (("one", "BY = 1"), ("two", "BY = 2"), ("three", "BY = 1")):
        source = tmp_path / folder / "mine"
        source.mkdir(parents=True)
        (source / "modeling_own.py").write_text(MODELING)
        (source / "helping.py").write_text(helping)
        own = dynamic_module_utils.get_class_from_dynamic_module("modeling_own.OwnForCausalLM", str(source))
        torch.manual_seed(0)
        model = own(tiny("llama").config).eval()
        model.load_state_dict(weights, strict=False)
        found.append(model_fingerprint(model))
    assert found[0] == found[2] != found[1]
