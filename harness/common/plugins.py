"""Methods, metrics and models of other packages, found by their entry points. One that is broken is named and left out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ditbench.harness.common.errors import UserError, first_words


class Broken(dict[str, str]):
    """{name of an entry point: which plugin it is, where it lies, what is wrong with it and what to do}."""

    def error(self, name: str, otherwise: UserError) -> UserError:
        """What to say when the name is asked for and is not known."""
        return UserError(self[name]) if name in self else otherwise


def load_plugins(
    group: str,
    kind: str,
    take: Callable[[str, Any], None],
    broken: Broken,
    undo: Callable[[], None] = lambda: None,
) -> None:
    """Load every entry point of the group and hand it over, by its name. One that cannot be loaded, or that `take` refuses
    with any error, goes into `broken` and is said in a line on stderr.

    kind: what an entry point of this group is called in that line. undo: what a broken one may have left behind.
    """
    for point in points(group):
        try:
            take(point.name, point.load())
        except (Exception, SystemExit) as error:
            undo()
            line = f"{kind} {point.name!r} of {_whose(point)} is left out: {_why(error)}; mend it{_or_uninstall(point)}"
            broken[point.name] = " ".join(line.split())
            print(f"ditbench: {broken[point.name]}", file=sys.stderr, flush=True)


def points(group: str) -> Iterator[EntryPoint]:
    yield from sorted(entry_points(group=group), key=lambda point: (point.name, point.value))


def folder_of(point: EntryPoint) -> Path | None:
    """Of the package, or beside the file, that an entry point names, which is not imported (a package around it is)."""
    try:
        spec = find_spec(point.module)
    except Exception:  # whatever its parent package does when it is imported
        return None
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _why(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    where = f"{error.filename}:{error.lineno}: " if isinstance(error, SyntaxError) and error.filename else ""
    return f"it cannot be imported: {where}{type(error).__name__}: {first_words(error)}"


def _whose(point: EntryPoint) -> str:
    """The module, and its file where there is one."""
    try:
        spec = find_spec(point.module)
    except Exception:  # whatever its parent package does when it is imported
        spec = None
    return f"{point.module} ({spec.origin})" if spec is not None and spec.origin else point.module


def _or_uninstall(point: EntryPoint) -> str:
    return f", or `pip uninstall {point.dist.name}`" if point.dist is not None else ""
