"""Where the packaged data lie: beside the packages, both in a checkout and in an installed wheel."""

from pathlib import Path

CONF = Path(__file__).resolve().parent.parent / "conf"
PAPERS = CONF.parent / "results" / "papers"  # reported numbers, shipped; a user's own results lie in ./results/runs
