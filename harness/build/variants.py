"""Modules whose forward is another one: the same kind of module, so that everything else about it stays, copies and pickles too."""

from __future__ import annotations

from typing import Any


def variant(
    kind: type[Any], forward: Any, made_by: Any, arguments: tuple[Any, ...], name: str = "forward"
) -> type[Any]:
    """The same kind with another method of that name; pickled by who makes it, since its module has no such name."""

    def reduce(self: Any, protocol: Any) -> Any:
        return _bare, (made_by, arguments), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__

    named = {"__doc__": kind.__doc__, "__module__": kind.__module__, "plain_kind": plain(kind)}
    return type(kind.__name__, (kind,), {name: forward, "__reduce_ex__": reduce, **named})


def plain(kind: type[Any]) -> type[Any]:
    """What a kind was before any variant was made of it."""
    return getattr(kind, "plain_kind", kind)


def _bare(made_by: Any, arguments: tuple[Any, ...]) -> Any:
    kind = made_by(*arguments)
    return kind.__new__(kind)
