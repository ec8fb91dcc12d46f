"""MLflow: a run per attempt, in the server that MLFLOW_TRACKING_URI names, else in <experiment>/mlflow.db with files beside it.

`mlflow ui --backend-store-uri sqlite:///results/runs/<experiment>/mlflow.db` opens it (of the whole package `mlflow`; here its small part
is enough). Numbers are metrics, text is tags, pictures and tables are files.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ditbench.harness.common.errors import UserError
from ditbench.harness.records.trackers.base import Card, Movie, Picture, Table, Value

PACKAGE, EXTRA = "mlflow", "mlflow"
ATTEMPT = "ditbench.attempt"
SERVER = "MLFLOW_TRACKING_URI"
LONGEST = {"param": 6000, "tag": 5000}  # characters that MLflow takes
AT_ONCE = 100  # parameters


def is_on(settings: Mapping[str, Any]) -> bool:
    if settings["mode"] == "online" and not os.environ.get(SERVER):
        raise UserError(f"tracker=mlflow tracker.mode=online needs a server: set {SERVER}, or leave tracker.mode out")
    return True


def begin(settings: Mapping[str, Any], card: Card) -> MlflowRun:
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)  # a new database is a page of lines
    from mlflow import MlflowClient

    said = os.environ.get(SERVER) if settings["mode"] != "offline" else None
    client = MlflowClient(tracking_uri=said or f"sqlite:///{card.home.resolve() / 'mlflow.db'}")
    experiment = _experiment(client, card, None if said else (card.home.resolve() / "mlflow").as_uri())
    found = client.search_runs([experiment], filter_string=f"tags.`{ATTEMPT}` = '{card.id}'", max_results=1)
    if found:
        client.update_run(found[0].info.run_id, status="RUNNING")
        return MlflowRun(client, found[0].info.run_id, found[0].info.start_time / 1000)
    tags = {ATTEMPT: card.id, "job_type": card.job_type, "tags": ", ".join(card.tags)}
    run = client.create_run(experiment, run_name=card.title, tags=tags)
    _log_configuration(client, run.info.run_id, card.config)
    return MlflowRun(client, run.info.run_id, run.info.start_time / 1000)


class MlflowRun:
    """MLflow's step is the number of seconds since the run was first seen."""

    def __init__(self, client: Any, run_id: str, first_seen_s: float) -> None:
        self.client, self.run_id, self.first_seen_s = client, run_id, first_seen_s

    def log(self, values: Mapping[str, Value]) -> None:
        from mlflow.entities import Metric, RunTag

        now_s = time.time()
        step = int(now_s - self.first_seen_s)
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        texts = {name: value for name, value in values.items() if isinstance(value, str)}
        metrics = [Metric(_name(name), float(value), int(1000 * now_s), step) for name, value in numbers.items()]
        for start in range(0, max(len(metrics), 1), AT_ONCE):
            tags = [RunTag(_name(name), text[: LONGEST["tag"]]) for name, text in texts.items()] if not start else []
            self.client.log_batch(self.run_id, metrics=metrics[start : start + AT_ONCE], tags=tags)
        for name, value in values.items():
            if name not in numbers and name not in texts:
                self._file(_name(name), value)

    def artifact(self, name: str, folder: Path, kind: str) -> None:
        self.client.log_artifacts(self.run_id, str(folder), f"{_name(kind)}/{_name(name)}")

    def finish(self, status: str, error: str | None) -> None:
        self.client.set_tag(self.run_id, "status", status)
        if error:
            self.client.set_tag(self.run_id, "error", error[: LONGEST["tag"]])
        ended = {"ok": "FINISHED", "failed": "FAILED"}.get(status, "KILLED")
        self.client.set_terminated(self.run_id, ended)

    def _file(self, name: str, value: Any) -> None:
        if isinstance(value, Picture):
            image = Image.open(value.image) if isinstance(value.image, Path) else value.image
            self.client.log_image(self.run_id, image, artifact_file=f"{name}.png")
        elif isinstance(value, Movie):
            self.client.log_artifact(self.run_id, str(value.path), str(Path(name).parent))
        elif isinstance(value, Table):
            rows = [[cell.caption if isinstance(cell, Picture) else cell for cell in row] for row in value.rows]
            self.client.log_dict(self.run_id, {"columns": list(value.columns), "data": rows}, f"{name}.json")
        else:
            for index, each in enumerate(value):
                self._file(f"{name}/{index:02d}", each)


def _experiment(client: Any, card: Card, files: str | None) -> str:
    """Its id; of processes that begin at once one makes it."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(card.group)
    if found is None:
        try:
            return client.create_experiment(card.group, artifact_location=files)
        except MlflowException:
            found = client.get_experiment_by_name(card.group)
            if found is None:
                raise
    return found.experiment_id


def _log_configuration(client: Any, run_id: str, config: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    params = [Param(_name(name), str(value)[: LONGEST["param"]]) for name, value in _flat(config)]
    for start in range(0, len(params), AT_ONCE):
        client.log_batch(run_id, params=params[start : start + AT_ONCE])


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        name = f"{prefix}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return found


def _name(name: str) -> str:
    """With the characters that MLflow takes."""
    return re.sub(r"[^\w./ -]", "_", name)
