"""The examples in the docstrings of the integrations run and give what they say."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

from dpo_kernels import integrations

MODULES = sorted(
    module.name for module in pkgutil.walk_packages(integrations.__path__, f"{integrations.__name__}.", onerror=None)
)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


# Modules that need another package, by their names here.
OTHER_STACKS = {
    "axolotl": "axolotl",
    "llamafactory.dpo": "llamafactory",
    "llamafactory.kto": "llamafactory",
    "torchtitan": "torchtitan",
}


def imported(name):
    if stack := OTHER_STACKS.get(name.removeprefix(f"{integrations.__name__}.")):
        pytest.importorskip(stack, reason=f"{stack} is not installed", exc_type=ImportError)
    return importlib.import_module(name)


def public(module):
    """The functions and classes of a module, and the methods of these classes, by name."""
    found = {}
    for name, thing in vars(module).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(thing) or inspect.isfunction(thing):
            found[name] = thing
    return found


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name):
    module = imported(name)
    result = doctest.testmod(module, optionflags=OPTIONS)
    assert result.failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_and_class_has_an_example(name):
    found = public(imported(name))
    assert not [thing for thing, value in found.items() if "Example" not in (value.__doc__ or "")]
