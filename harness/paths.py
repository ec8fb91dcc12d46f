"""Where the packaged data lie: beside the packages, both in a checkout and in an installed wheel."""

from pathlib import Path

CONF = Path(__file__).resolve().parent.parent / "conf"
