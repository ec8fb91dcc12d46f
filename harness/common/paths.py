"""Where the packaged data lie: beside the packages, both in a checkout and in an installed wheel."""

from pathlib import Path

HARNESS = Path(__file__).resolve().parents[1]
CONF = HARNESS.parent / "conf"
PAPERS = CONF.parent / "results" / "papers"  # reported numbers, shipped; a user's own results lie in ./results/runs


def options(group: str) -> list[Path]:
    """The files of a configuration group that can be chosen; those whose names begin with _ are what others share."""
    found = (path for path in (CONF / group).glob("*.yaml") if not path.stem.startswith("_"))
    return sorted(found, key=lambda path: path.stem)
