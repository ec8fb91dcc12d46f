"""Modules of a model that are run by a forward of ours, and are else what they were."""

from __future__ import annotations

from typing import Any


def variant(kind: type[Any], forward: Any, made_by: Any, arguments: tuple[Any, ...]) -> type[Any]:
    """The same kind with another forward; pickled by who makes it, since its module has no such name."""

    def reduce(self: Any, protocol: Any) -> Any:
        return _bare, (made_by, arguments), self.__getstate__()

    named = {"__doc__": kind.__doc__, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), {"forward": forward, "__reduce_ex__": reduce, **named})


def _bare(made_by: Any, arguments: tuple[Any, ...]) -> Any:
    kind = made_by(*arguments)
    return kind.__new__(kind)
