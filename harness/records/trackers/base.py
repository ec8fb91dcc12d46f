"""What a tracker is: a file of this folder, and conf/tracker/<its name>.yaml. Nothing else knows it.

    PACKAGE = "wandb"                    what it needs to be installed
    EXTRA = "trackio"                    the extra of ditbench that installs it; "" if it comes with ditbench
    is_on(settings) -> bool              whether it wants to hear anything; may raise UserError: then the run does not start
    begin(settings, card) -> Tracker     may raise anything: then the run goes on without it

`settings` is the `tracker` section of a configuration. `records/tracking.py` calls all of this in a thread of its own, one call
after the other; nothing that a tracker raises, and no time that it takes, reaches the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL.Image import Image


@dataclass(frozen=True)
class Picture:
    """An image, or the file of one that does not move."""

    image: Image | Path
    caption: str = ""


@dataclass(frozen=True)
class Movie:
    """A GIF."""

    path: Path


@dataclass(frozen=True)
class Table:
    """rows: as many cells as there are columns: numbers, text, None or a `Picture`; a column has cells of one kind."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


Value = float | int | str | bool | Picture | list[Picture] | Movie | Table


@dataclass(frozen=True)
class Card:
    """What a tracker is told of a run when it begins.

    id: the name that the attempt's folder will have (<run_id>, <run_id>.2, …): a run that was killed and is started again has the
        same one, and continues what the tracker has of it.
    title: model, method, bits and what differs (seed, parameters). group: the experiment. config: the run's configuration and
        what it was run with (git, hashes, versions, n). home: the experiment's folder, which stays where it is.
    """

    id: str
    title: str
    group: str
    job_type: str
    tags: tuple[str, ...]
    config: dict[str, Any]
    home: Path


class Tracker(Protocol):
    """One run, as one tracker has it."""

    def log(self, values: Mapping[str, Value]) -> None:
        """Values of now; names with slashes (metrics/psnr) belong together."""

    def artifact(self, name: str, folder: Path, kind: str) -> None:
        """Keep the files of a folder beside the run."""

    def finish(self, status: str, error: str | None) -> None:
        """The last call. status: "ok", "failed" or "interrupted", with the reason."""
