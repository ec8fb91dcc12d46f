"""Where the packaged data lie: beside the packages, both in a checkout and in an installed wheel; and a user's configurations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from ditbench.harness.common.errors import UserError

HARNESS = Path(__file__).resolve().parents[1]
CONF = HARNESS.parent / "conf"
PAPERS = CONF.parent / "results" / "papers"  # reported numbers, shipped; a user's own results lie in ./results/runs

_own: ContextVar[tuple[Path, ...]] = ContextVar("a user's folders of configurations", default=())


def options(group: str, beside: Iterable[Path] = ()) -> list[Path]:
    """The files of a configuration group that can be chosen; those whose names begin with _ are what others share.

    beside: more folders like `conf/`; those of `configurations_in` are looked at anyway.
    """
    folders = dict.fromkeys((CONF, *own_configurations(), *beside))
    found = (path for folder in folders for path in _files(folder, group) if not path.stem.startswith("_"))
    return sorted(found, key=lambda path: path.stem)


def own_configurations() -> tuple[Path, ...]:
    """The folders of `configurations_in`, absolute."""
    return _own.get()


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
