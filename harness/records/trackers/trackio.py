"""trackio: what a run says goes to SQLite on this machine (TRACKIO_DIR, else ~/.cache/huggingface/trackio), and nowhere else.

`trackio show --project ditbench` opens the page, also while runs go on; `trackio sync` sends it to a Space. A run that continues an
attempt continues its trackio run, which has the attempt's id.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ditbench.harness.common.errors import UserError
from ditbench.harness.records.trackers.base import Card, Movie, Picture, Table, Value

PACKAGE, EXTRA = "trackio", "trackio"
PROJECT = "ditbench"


def is_on(settings: Mapping[str, Any]) -> bool:
    if settings["mode"] == "online":
        raise UserError(
            "tracker=trackio keeps runs on this machine: leave tracker.mode out, and `trackio sync` sends them"
        )
    return True


def begin(settings: Mapping[str, Any], card: Card) -> TrackioRun:
    import trackio
    from trackio import run as running

    vars(running)["print"] = lambda *words, **more: None  # it prints on stdout, where a table of runs belongs
    return TrackioRun(
        trackio.Run(
            url=None,
            project=settings["project"] or PROJECT,
            client=None,
            name=f"{card.title} {card.id}".replace("/", "-"),  # trackio has a run by its name
            run_id=card.id,
            group=card.group,
            config=_flat(card.config) | {"job_type": card.job_type, "tags": ", ".join(card.tags)},
            auto_log_gpu=trackio.gpu_available(),
            auto_log_cpu=trackio.cpu_available(),
        )
    )


class TrackioRun:
    def __init__(self, run: Any) -> None:
        self.run = run

    def log(self, values: Mapping[str, Value]) -> None:
        shown: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, list):  # trackio shows one picture under one name
                shown |= {f"{name}/{index:02d}": _shown(each) for index, each in enumerate(value)}
            else:
                shown[name] = _shown(value)
        self.run.log(shown)

    def artifact(self, name: str, folder: Path, kind: str) -> None:
        import trackio

        artifact = trackio.Artifact(name, type=kind)
        artifact.add_dir(str(folder))
        self.run.log_artifact(artifact)

    def finish(self, status: str, error: str | None) -> None:
        """trackio has no runs that failed: the status is a value, and a run that did not end well is an alert."""
        import trackio

        self.run.log({"status": status} | ({"error": error} if error else {}))
        if status != "ok":
            level = trackio.AlertLevel.ERROR if status == "failed" else trackio.AlertLevel.WARN
            self.run.alert(f"{self.run.name}: {status}", error, level)
        self.run.finish()


def _shown(value: Any) -> Any:
    import trackio

    if isinstance(value, Picture):
        return trackio.Image(value.image, caption=value.caption or None)
    if isinstance(value, Movie):
        return trackio.Video(str(value.path), format="gif")
    if isinstance(value, Table):
        rows = [[_shown(cell) for cell in row] for row in value.rows]
        return trackio.Table(columns=list(value.columns), data=rows)
    return value


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """trackio's page has one column for each name: sections become names with dots."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
