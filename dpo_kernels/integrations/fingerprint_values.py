"""Python values and tensors as bytes, for the fingerprint of a model: equal where they compute the same.

The bytes are the same in every process. A function counts by its code, what it closes over and the plain globals that
it reads. An object counts by its class and its attributes. Objects of ``BY_CLASS`` and of C code count by their class
only.
"""

import functools
import hashlib
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Keys of configurations that no forward of a causal model reads, or not in evaluation mode. Loading, saving, trainers
# and tokenizers change them.
NOT_COMPUTED_WITH = {
    "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "output_router_logits", "router_aux_loss_coef", "id2label", "label2id",
    "bos_token_id", "eos_token_id", "pad_token_id", "gradient_checkpointing", "problem_type", "auto_map",
}  # fmt: skip
# Names of dropout as transformers and timm spell them. Dropout does nothing in evaluation mode, except ESM's
# token_dropout.
DROPOUT = re.compile(
    r"(?<!token_)dropouts?$|^dropout_|dropout_(p|prob|rate|ratio|value)$|(layer_?|path_?|p|^|(?<!token)_)drop$"
    r"|drop_?path|drop_(\w+_)?(prob|rate)$"
)
# Types whose ``repr`` says all.
PLAIN = (bool, int, float, complex, str, bytes, range, torch.dtype, torch.Size, type(None), type(...))
# Packages whose objects hold what running and loading leaves in them, such as caches and handles. The last is a class
# of bitsandbytes.
BY_CLASS = {"torch", "triton", "transformers", "peft", "accelerate", "logging", "threading", "weakref", "MatmulLtState"}
REMOTE = "transformers_modules"  # the package in which transformers puts code that comes with a model


def is_dropout(name: str) -> bool:
    """Say whether a name is that of a dropout, which does nothing in evaluation mode.

    Args:
        name: of an attribute or of a key of a configuration.

    Returns:
        True for a dropout.

    Example:
        >>> is_dropout("attention_dropout"), is_dropout("hidden_size")
        (True, False)

    """
    return DROPOUT.search(name) is not None


def computed_with(value: Any) -> Any:
    """Leave out of a configuration what no forward reads, and out of the configurations inside it too.

    Args:
        value: a configuration as a mapping, or any other value.

    Returns:
        A dictionary, or the value itself if it is not a mapping.

    Example:
        >>> computed_with({"hidden_size": 16, "use_cache": True, "attention_dropout": 0.1})
        {'hidden_size': 16}

    """
    if not isinstance(value, Mapping):
        return value
    return {
        name: computed_with(v)
        for name, v in value.items()
        if name not in NOT_COMPUTED_WITH and not is_dropout(str(name))
    }


class Values:
    """A walk over values that gives bytes to ``add``, and the modules that it meets to ``module``.

    Args:
        add: takes bytes, or what can be read as bytes.
        module: takes a path and a module.

    Example:
        >>> parts = []
        >>> Values(parts.append, lambda path, module: None).value("scale", 0.5)
        >>> parts
        [b'scale 0.5;']

    """

    def __init__(self, add: Callable[[Any], None], module: Callable[[str, Any], None]) -> None:
        self.add, self.module = add, module
        # Where each thing was first met, by its id. The things are kept, so that no id is used twice.
        self.first: dict[int, tuple[str, Any]] = {}
        self.inside: set[int] = set()  # ids of containers that are being read, since one may hold itself
        self.remote: dict[str, str] = {}

    def met(self, path: str, thing: Any) -> bool:
        """Say whether a thing was read before, and add where if so."""
        first, _ = self.first.setdefault(id(thing), (path, thing))
        if known := first != path:
            self.add(f"{path} is {first};".encode())
        return known

    def value(self, path: str, value: Any) -> None:
        """Add whatever a module or a configuration may hold."""
        if isinstance(value, Tensor):
            self.tensor(path, value)
        elif isinstance(value, nn.Module):
            self.module(path, value)
        elif isinstance(value, np.generic | np.ndarray):
            self.array(path, np.asarray(value))
        elif isinstance(value, Enum):  # this comes before the plain types, since an Enum may be one of them
            self.add(f"{path} {self.class_name(type(value))} {value.name};".encode())
            self.value(f"{path}.value", value.value)
        elif isinstance(value, PLAIN):
            self.add(f"{path} {value!r};".encode())
        elif isinstance(value, Mapping | Sequence | Set):
            self.container(path, value)
        elif callable(getattr(value, "to_dict", None)) and not isinstance(value, type):  # a configuration
            self.add(f"{path} {type(value).__qualname__};".encode())
            self.value(path, computed_with(value.to_dict()))
        elif not self.met(path, value):
            self.thing(path, value)

    def container(self, path: str, value: Any) -> None:
        """Add a mapping, a sequence or a set, in an order that every process finds."""
        self.add(f"{path} {len(value)};".encode())
        if id(value) in self.inside:
            return
        self.inside.add(id(value))
        if isinstance(value, Mapping):
            for number, name in enumerate(sorted(value, key=_order)):
                if not isinstance(name, str):
                    self.value(f"{path}.key {number}", name)
                self.value(f"{path}.{name if isinstance(name, str) else number}", value[name])
        elif isinstance(value, Set):
            for one in sorted(self.bytes_of(path, one) for one in value):
                self.add(one)
        else:
            for number, one in enumerate(value):
                self.value(f"{path}.{number}", one)
        self.inside.discard(id(value))

    def bytes_of(self, path: str, value: Any) -> bytes:
        """Return what a value would give to ``add``. It is used to sort what has no order."""
        parts: list[bytes] = []
        add, self.add = self.add, lambda data: parts.append(bytes(data))
        try:
            self.value(path, value)
        finally:
            self.add = add
        return b"".join(parts)

    def thing(self, path: str, value: Any) -> None:
        """Add a function or an object that is met for the first time."""
        value = getattr(value, "_torchdynamo_orig_callable", value)  # a compiled function is the function
        name = self.class_name(value if hasattr(value, "__qualname__") else type(value))
        self.add(f"{path} {name};".encode())
        if isinstance(value, functools.partial):
            for part in ("func", "args", "keywords"):
                self.value(f"{path}.{part}", getattr(value, part))
        elif isinstance(value, types.MethodType):
            self.value(f"{path}.func", value.__func__)
            self.value(f"{path}.self", value.__self__)
        elif isinstance(value, types.FunctionType):
            self.function(path, value)
        elif hasattr(value, "__wrapped__"):  # functools.cache makes such objects
            self.value(f"{path}.wrapped", value.__wrapped__)
        elif not isinstance(value, type) and BY_CLASS.isdisjoint(
            (type(value).__module__.split(".")[0], type(value).__qualname__)
        ):
            self.attributes(path, value)

    def attributes(self, path: str, value: Any) -> None:
        """Add what an object holds."""
        held = dict(getattr(value, "__dict__", {}))
        for kind in type(value).__mro__:
            slots = vars(kind).get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else slots:
                if slot not in ("__dict__", "__weakref__") and hasattr(value, slot):
                    held[slot] = getattr(value, slot)
        for name in sorted(held):
            if "cache" not in name and not is_dropout(name):
                self.value(f"{path}.{name}", held[name])

    def function(self, path: str, function: types.FunctionType) -> None:
        """Add a Python function as what it computes."""
        self.value(f"{path}.defaults", (function.__defaults__, function.__kwdefaults__))
        for code in _codes(function.__code__):
            self.add(f"{path} {code.co_names} {len(code.co_code)};".encode())
            self.add(code.co_code)
            self.value(f"{path}.constants", [c for c in code.co_consts if not isinstance(c, types.CodeType)])
            for name in code.co_names:
                if isinstance(held := function.__globals__.get(name), PLAIN):
                    self.value(f"{path}.{name}", held)
        for number, cell in enumerate(function.__closure__ or ()):
            try:
                inside = cell.cell_contents
            except ValueError:  # the cell is not yet filled
                continue
            self.value(f"{path}.closure.{number}", inside)

    def class_name(self, kind: Any) -> str:
        """Return the name of a class or function after the last part of its module's name; the rest may be a path."""
        module = str(getattr(kind, "__module__", None))
        if module not in self.remote:
            self.remote[module] = _source(module) if module.startswith(f"{REMOTE}.") else ""
        return f"{module.rsplit('.', 1)[-1]}.{kind.__qualname__}{self.remote[module]}"

    def array(self, path: str, array: "np.ndarray[Any, Any]") -> None:
        """Add an array or a number of numpy."""
        if array.dtype.hasobject:
            self.value(path, array.tolist())
            return
        self.add(f"{path} {array.dtype.str} {array.shape};".encode())
        self.add(array.tobytes())

    def tensor(self, path: str, tensor: Tensor) -> None:
        """Add a tensor by its numbers. If it wraps other tensors, add theirs."""
        name = path.strip(".")
        if tensor.device.type == "meta":
            raise ValueError(
                f"model: {name} is on the meta device, so that its numbers cannot be told: load the model whole, or "
                "offload it with accelerate, from which they can be had"
            )
        tensor = tensor.detach()
        kind: Any = type(tensor)
        if hasattr(tensor, "full_tensor"):  # every process asks for the whole of a DTensor
            self.tensor(path, tensor.full_tensor())
            return
        if kind is not Tensor and hasattr(kind, "__tensor_flatten__"):
            names, context = kind.__tensor_flatten__(tensor)
            self.add(f"{path} {self.class_name(kind)} {tensor.dtype} {tuple(tensor.shape)};".encode())
            for inner in names:
                self.tensor(f"{path}.{inner}", getattr(tensor, inner))
            self.value(f"{path}.context", context)
            return
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
            raise TypeError(f"model: {name} is not a dense tensor, but {tensor.layout}, {tensor.dtype}: make it dense")
        if kind is not Tensor and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise TypeError(
                f"model: {name} is a {kind.__name__}, a kind of tensor that does not tell which numbers it holds (it "
                "has no __tensor_flatten__): load the model with plain tensors"
            )
        tensor = tensor.as_subclass(Tensor)
        self.add(f"{path} {tensor.dtype} {tuple(tensor.shape)};".encode())
        self.add(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _order(key: Any) -> str:
    """Return by what a key is sorted. Keys that would show their address keep the order that they have."""
    return str(key) if isinstance(key, (*PLAIN, Enum)) else type(key).__qualname__


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a function's code and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _source(module: str) -> str:
    """Hash the files of code that came with a model. Where they cannot be read, return the module's whole name."""
    from transformers.dynamic_module_utils import get_relative_import_files

    try:
        file = str(sys.modules[module].__file__)
        files = [file, *sorted({*get_relative_import_files(file)} - {file})]
        return " " + hashlib.blake2b(b"\0".join(Path(one).read_bytes() for one in files), digest_size=16).hexdigest()
    except (KeyError, OSError):
        return f" {module}"
