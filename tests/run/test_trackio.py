"""A sweep told to trackio, read back from its SQLite file by trackio itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ditbench

pytest.importorskip("trackio", reason="the extra ditbench[trackio] is not installed")

# trackio reads TRACKIO_DIR when it is imported: whoever writes and whoever reads is a process of its own.
READ = """
import json
from trackio import Api
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps([
    {"id": run.id, "name": run.name, "config": run.config, "rows": SQLiteStorage.get_logs("ditbench", run.name),
     "alerts": SQLiteStorage.get_alerts("ditbench", run_name=run.name)}
    for run in Api().runs("ditbench")
], default=str))
"""
RUN = """
import sys
from ditbench.harness import run
from ditbench.harness.cli import main
calibrate = run.calibrate
def without_memory_at_w4a4(config, model):
    if config.bits.label == "W4A4":
        raise MemoryError
    return calibrate(config, model)
run.calibrate = without_memory_at_w4a4
sys.exit(main(sys.argv[1:]))
"""


def in_a_process(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(ditbench.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    environment |= {"TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def swept(tmp_path_factory, tiny) -> tuple[Path, str]:
    """A sweep of a run that ends well and one that fails, and what it said on stdout."""
    folder = tmp_path_factory.mktemp("trackio")
    rest = [argument for argument in tiny if not argument.startswith("tracker")]
    arguments = ["run", "-m", *rest, "tracker=trackio", "name=mine", f"results_dir={folder}", "bits=w8a8,w4a4"]
    done = in_a_process(folder, "-c", RUN, *arguments)
    assert done.returncode == 3, done.stderr
    assert "not tracked" not in done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def runs(swept) -> dict[str, dict[str, Any]]:
    """{id of a run: what trackio has of it}."""
    folder, _ = swept
    return {run["id"]: run for run in json.loads(in_a_process(folder, "-c", READ).stdout)}


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("runs/mine/*/record.json")}


def test_trackio_has_every_run_with_its_numbers_and_configuration(swept, runs):
    records = recorded(swept[0])
    assert set(runs) == set(records) and len(runs) == 2
    for its_id, record in records.items():
        run = runs[its_id]
        assert run["name"] == f"tiny-dit rtn {record['config']['bits']['label'].upper()} seed 0 {its_id}"
        assert run["config"]["protocol.n"] == 4 and run["config"]["_Group"] == "mine"
        assert run["config"]["run.weights_sha256"] == record["env"]["weights_sha256"]
        last = {name: value for row in run["rows"] for name, value in row.items()}
        assert last["status"] == record["status"]
        for name, entry in record["metrics"].items():
            assert last[f"metrics/{name}"] == entry["value"] and last[f"metrics/{name}/n"] == entry["n"]
        assert any("live/stage" in row for row in run["rows"])


def test_its_tables_hold_every_sample_and_its_pictures_lie_beside_them(swept, runs):
    folder, _ = swept
    (good,) = [run for its_id, run in runs.items() if recorded(folder)[its_id]["status"] == "ok"]
    last = {name: value for row in good["rows"] for name, value in row.items()}
    assert [row["prompt"] for row in last["per_sample"]["_value"]] == [f"label {label}" for label in range(4)]
    picture = last["samples/beside_float/00"]
    assert picture["caption"].startswith("label 0 (") and (folder / "trackio/media" / picture["file_path"]).is_file()


def test_a_run_that_failed_is_an_alert_with_its_reason(swept, runs):
    folder, _ = swept
    for its_id, record in recorded(folder).items():
        alerts = runs[its_id]["alerts"]
        if record["status"] == "ok":
            assert alerts == []
        else:
            assert [alert["text"] for alert in alerts] == [record["error"]] and "MemoryError" in record["error"]


def test_trackio_says_nothing_where_the_table_of_runs_is_printed(swept):
    _, out = swept
    assert "Trackio" not in out and "* Run" not in out and out.startswith("tiny-dit · protocol default")
