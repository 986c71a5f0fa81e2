"""``dataclass`` as the standard one, in less time: importing the package defines over 40 classes.

The standard decorator compiles ``__repr__``, ``__eq__`` and ``__hash__`` anew for each. Here they are closures.
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
        """Return a decorator that does what ``dataclasses.dataclass`` does with these options."""

        def define(cls: type) -> type:
            defined = dataclasses.dataclass(frozen=frozen, eq=False, repr=False)(cls)
            methods = {"__repr__": _repr}
            if eq:
                methods |= _comparisons(defined, frozen)
            for name, method in methods.items():
                if name not in cls.__dict__:
                    setattr(cls, name, method)
            return defined

        return define


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
