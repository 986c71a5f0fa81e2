"""``dataclass`` as the standard one, in less time: importing the package defines over 40 classes.

The standard decorator compiles ``__repr__``, ``__eq__`` and ``__hash__`` anew for each. Here all classes share them.
"""

import dataclasses
import reprlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:

    def dataclass(*, frozen: bool, eq: bool = True) -> Callable[[type], type]:
        """Return a decorator that does what ``dataclasses.dataclass`` does with these options."""

        def define(cls: type) -> type:
            own = {"__repr__": _repr}
            if eq:
                own |= {"__eq__": _eq, "__hash__": _hash if frozen else None}
            for name, method in own.items():
                if name not in cls.__dict__:
                    setattr(cls, name, method)
            return dataclasses.dataclass(frozen=frozen, eq=False, repr=False)(cls)

        return define


@reprlib.recursive_repr()
def _repr(self: Any) -> str:
    shown = ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self) if field.repr)
    return f"{type(self).__qualname__}({shown})"


def _eq(self: Any, other: object) -> bool:
    return _compared(self) == _compared(other) if other.__class__ is self.__class__ else NotImplemented


def _hash(self: Any) -> int:
    return hash(_compared(self))


def _compared(self: Any) -> tuple[Any, ...]:
    return tuple(getattr(self, field.name) for field in dataclasses.fields(self) if field.compare)
