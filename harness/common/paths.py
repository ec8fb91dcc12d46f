"""Where the packaged data lie: beside the packages, both in a checkout and in an installed wheel; and a user's configurations."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

from ditbench.harness.common.errors import UserError
from ditbench.harness.common.plugins import folder_of, points

HARNESS = Path(__file__).resolve().parents[1]
CONF = HARNESS.parent / "conf"
MODELS = "ditbench.models"  # entry points: model families and configurations of other packages
PAPERS = CONF.parent / "results" / "papers"  # reported numbers, shipped; a user's own results lie in ./results/runs

_own: ContextVar[tuple[Path, ...]] = ContextVar("a user's folders of configurations", default=())


def options(group: str, beside: Iterable[Path] = ()) -> list[Path]:
    """The files of a configuration group that can be chosen; those whose names begin with _ are what others share.

    beside: more folders like `conf/`; those of `configurations_in` and of other packages are looked at anyway.
    """
    folders = dict.fromkeys((CONF, *configurations_outside(), *beside))
    found = (path for folder in folders for path in _files(folder, group) if not path.stem.startswith("_"))
    return sorted(found, key=lambda path: path.stem)


def own_configurations() -> tuple[Path, ...]:
    """The folders of `configurations_in`, absolute."""
    return _own.get()


def configurations_outside() -> tuple[Path, ...]:
    """The user's folders, then those of installed packages."""
    return tuple(dict.fromkeys((*own_configurations(), *_of_packages())))


@cache
def _of_packages() -> tuple[Path, ...]:
    """The folder `conf` beside each module that is an entry point of `ditbench.models`. One that cannot be used is said once."""
    found = []
    for point in points(MODELS):
        folder = folder_of(point)
        if folder is None or not (folder / CONF.name).is_dir():
            continue
        try:
            found.append(checked(folder / CONF.name, f"model {point.name!r} of {point.module}"))
        except UserError as error:
            print(f"ditbench: {error}; its configurations are left out", file=sys.stderr, flush=True)
    return tuple(found)


@contextmanager
def configurations_in(folders: Iterable[Path | str]) -> Iterator[None]:
    """Take the configurations of these folders, too, inside the block: FOLDER/model/mine.yaml is model=mine.

    Raises:
        UserError: see `checked`.
    """
    token = _own.set(tuple(checked(folder) for folder in folders))
    try:
        yield
    finally:
        _own.reset(token)


def checked(folder: Path | str, told_by: str = "--config-dir") -> Path:
    """A folder of configurations, absolute. told_by: what the user wrote it in.

    Raises:
        UserError: there is no such folder, none of a configuration's groups is in it, or a name in it is taken.
    """
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise UserError(f"{told_by} {folder}: there is no such folder")
    groups = sorted(each.name for each in CONF.iterdir() if each.is_dir())
    if not any((path / group).is_dir() for group in groups):
        raise UserError(
            f"{told_by} {folder}: none of {', '.join(groups)} is a folder in it; a model is model/NAME.yaml there"
        )
    for group in groups:
        here = {each.stem for each in _files(CONF, group)}
        taken = [each for each in _files(path, group) if each.stem in here and path != CONF]
        if taken:
            raise UserError(f"{taken[0]}: there is a {group} of that name already; give the file another")
    return path


def _files(folder: Path, group: str) -> list[Path]:
    return sorted((folder / group).glob("*.yaml"))


def no_folder(path: str | Path) -> str:
    """Why no folder can be there, nor be made there; empty if nothing is against it. Whether it may be written is not asked."""
    try:
        path = Path(path).expanduser().absolute()
        existing = next(each for each in (path, *path.parents) if each.is_symlink() or each.exists())
        existing.stat()  # of a link that leads round
        return "" if existing.is_dir() else f"{existing} is no folder (Not a directory)"
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: ~nobody
        return str(getattr(error, "strerror", None) or error)
