"""``dataclass`` as the standard one, in less time: importing the package defines over 40 classes.

The standard decorator compiles seven methods anew for each class. Here ``__init__`` alone is compiled, and the others
are closures.
"""

import dataclasses
import operator
import reprlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:

    def dataclass(*, frozen: bool, eq: bool = True) -> Callable[[type], type]:
        """Return a decorator that does what ``dataclasses.dataclass`` does with these options.

        Fields that are ``InitVar`` or only keywords are not for it. A class with a data class among its bases gets the
        standard decorator.
        """

        def define(cls: type) -> type:
            if any(map(dataclasses.is_dataclass, cls.__bases__)):
                return dataclasses.dataclass(frozen=frozen, eq=eq)(cls)
            defined = dataclasses.dataclass(init=False, eq=False, repr=False)(cls)
            methods = {"__init__": _constructor(defined), "__repr__": _repr}
            if eq:
                methods |= _comparisons(defined, frozen)
            if frozen:
                methods |= {"__setattr__": _set_if_no_field, "__delattr__": _delete_if_no_field}
                defined.__dataclass_params__.frozen = True  # torch.compile and subclasses read it
            for name, method in methods.items():
                if name not in cls.__dict__:
                    setattr(cls, name, method)
            return defined

        return define


# The default value of an argument that a factory makes. torch.compile knows the standard decorator's, and no other.
_MADE = dataclasses._HAS_DEFAULT_FACTORY  # type: ignore[attr-defined]


def _constructor(cls: type[Any]) -> Callable[..., None]:
    """Compile ``__init__``. Its default values and factories are globals of its own."""
    fields = dataclasses.fields(cls)
    given: dict[str, Any] = {"_MADE": _MADE}
    parameters, values = ["self"], []
    for field in fields:
        name, default = field.name, f"_{field.name}"
        made = field.default_factory is not dataclasses.MISSING
        optional = made or field.default is not dataclasses.MISSING
        given[default] = field.default_factory if made else field.default
        if field.init:
            parameters.append(f"{name}={'_MADE' if made else default}" if optional else name)
            values.append(f"{name}={default}() if {name} is _MADE else {name}" if made else f"{name}={name}")
        elif optional:
            values.append(f"{name}={default}()" if made else f"{name}={default}")
    then = "; self.__post_init__()" if hasattr(cls, "__post_init__") else ""
    exec(f"def __init__({', '.join(parameters)}): self.__dict__.update({', '.join(values)}){then}", given)
    constructor: Callable[..., None] = given["__init__"]
    constructor.__module__, constructor.__qualname__ = cls.__module__, f"{cls.__qualname__}.__init__"
    constructor.__annotations__ = {field.name: field.type for field in fields if field.init} | {"return": None}
    return constructor


def _set_if_no_field(self: Any, name: str, value: object) -> None:
    _refuse_a_field(self, name, "assign to")
    object.__setattr__(self, name, value)


def _delete_if_no_field(self: Any, name: str) -> None:
    _refuse_a_field(self, name, "delete")
    object.__delattr__(self, name)


def _refuse_a_field(self: Any, name: str, what: str) -> None:
    """Raise, except for another attribute of a subclass that is no data class itself."""
    if "__dataclass_fields__" in type(self).__dict__ or name in self.__dataclass_fields__:
        raise dataclasses.FrozenInstanceError(f"cannot {what} field {name!r}")


@reprlib.recursive_repr()
def _repr(self: Any) -> str:
    shown = ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self) if field.repr)
    return f"{type(self).__qualname__}({shown})"


def _comparisons(cls: type, frozen: bool) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(cls) if field.compare]

    def one_by_one(self: Any) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in names)

    # The getter takes a third of the time, and returns a tuple only if there are several names.
    values = operator.attrgetter(*names) if len(names) > 1 else one_by_one

    def equal(self: Any, other: object) -> bool:
        return values(self) == values(other) if other.__class__ is self.__class__ else NotImplemented

    def hashed(self: Any) -> int:
        return hash(values(self))

    return {"__eq__": equal, "__hash__": hashed if frozen else None}
