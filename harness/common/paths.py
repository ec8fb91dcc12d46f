"""Where the packaged data lie: beside the packages, both in a checkout and in an installed wheel."""

from pathlib import Path

HARNESS = Path(__file__).resolve().parents[1]
CONF = HARNESS.parent / "conf"
PAPERS = CONF.parent / "results" / "papers"  # reported numbers, shipped; a user's own results lie in ./results/runs


def options(group: str) -> list[Path]:
    """The files of a configuration group that can be chosen; those whose names begin with _ are what others share."""
    found = (path for path in (CONF / group).glob("*.yaml") if not path.stem.startswith("_"))
    return sorted(found, key=lambda path: path.stem)


def no_folder(path: str | Path) -> str:
    """Why no folder can be there, nor be made there; empty if nothing is against it. Whether it may be written is not asked."""
    try:
        path = Path(path).expanduser().absolute()
        existing = next(each for each in (path, *path.parents) if each.is_symlink() or each.exists())
        existing.stat()  # of a link that leads round
        return "" if existing.is_dir() else f"{existing} is no folder (Not a directory)"
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: ~nobody
        return str(getattr(error, "strerror", None) or error)
