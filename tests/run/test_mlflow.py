"""A run told to MLflow, read back from its SQLite file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ditbench.harness.cli import main
from ditbench.harness.records import record as records
from ditbench.harness.records import tracking

pytest.importorskip("mlflow", reason="the extra ditbench[mlflow] is not installed")
pytest.importorskip("sqlalchemy", reason="the extra ditbench[mlflow] is not installed")


@pytest.fixture(scope="module")
def told(tmp_path_factory, tiny) -> tuple[Path, dict[str, Any], Any]:
    """The results of one run, its record, and the one run that MLflow has."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("mlflow")
    tracking._gave_up.discard("mlflow")
    arguments = [*(each for each in tiny if not each.startswith("tracker")), "tracker=mlflow", "tracker.mode=offline"]
    assert main(["run", *arguments, "name=mine", f"results_dir={folder}"]) == 0
    (path,) = folder.glob("runs/mine/*/record.json")
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/runs/mine/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    return folder, json.loads(path.read_text()), run


def test_mlflow_has_the_records_numbers_and_configuration(told):
    _, record, run = told
    assert (run.info.status, run.info.run_name) == ("FINISHED", "tiny-dit rtn W8A8 seed 0")
    assert run.data.tags["ditbench.attempt"] == record["run_id"] and run.data.tags["status"] == "ok"
    for name, entry in record["metrics"].items():
        assert run.data.metrics[f"metrics/{name}"] == entry["value"]
        assert run.data.metrics[f"metrics/{name}/n"] == entry["n"]
    assert run.data.params["protocol.n"] == "4"
    assert run.data.params["run.weights_sha256"] == record["env"]["weights_sha256"]
    assert "live/stage" in run.data.tags


def test_its_pictures_and_tables_are_files_beside_the_runs(told):
    folder, _, run = told
    files = folder / "runs" / "mine" / "mlflow" / run.info.run_id / "artifacts"
    assert (files / "samples" / "grid.png").is_file() and (files / "samples" / "beside_float" / "00.png").is_file()
    table = json.loads((files / "per_sample.json").read_text())
    assert table["columns"][:3] == ["sample", "prompt", "psnr"] and len(table["data"]) == 4


def test_what_continues_an_attempt_continues_its_run(told):
    from mlflow import MlflowClient

    folder, record, run = told
    home = folder / "runs" / "mine"
    (folder / "export").mkdir()
    (folder / "export" / "recipe.json").write_text("{}")
    tracking.keep(records.read(home / record["run_id"] / "record.json"), folder / "export", "mine", "quantized-model")
    client = MlflowClient(tracking_uri=f"sqlite:///{home}/mlflow.db")
    (again,) = client.search_runs([run.info.experiment_id])
    assert again.info.run_id == run.info.run_id and again.info.status == "FINISHED"
    assert [each.path for each in client.list_artifacts(run.info.run_id, "quantized-model/mine")] == [
        "quantized-model/mine/recipe.json"
    ]
