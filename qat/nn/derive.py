"""Classes that derive from a module's own class, so that ``isinstance``, parameters, keys and hooks survive."""

from __future__ import annotations

from typing import Any

from torch import nn


class Derived(nn.Module):
    """A module whose class was exchanged in place; ``float_class`` is what it was.

    Classes made on demand have no importable name, so pickling and ``copy.deepcopy`` rebuild them.
    """

    float_class: type[nn.Module]

    def remove_quantizers(self) -> None:
        """Take off what preparing added; the class is exchanged by the caller."""
        raise TypeError(f"{type(self).__name__} does not say what it added")

    @classmethod
    def rebuild_args(cls) -> tuple[Any, ...]:
        """Function and plain arguments that return this class in another process."""
        raise TypeError(f"{cls.__name__} does not say how it is rebuilt")

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        return (_new, type(self).rebuild_args(), *reduced[2:])


def _new(make_class: Any, *args: Any) -> nn.Module:
    cls = make_class(*args)
    return cls.__new__(cls)
