"""A run can be followed while it goes on, and is one run in W&B however often it is killed and started again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from wandb_files import contents

import ditbench

SLOW = Path(__file__).with_name("slow_run.py")
LONGEST_S = 300.0
wandb = pytest.importorskip("wandb")
pytestmark = pytest.mark.skipif(
    "x_transaction_log_flush_interval" not in wandb.Settings.model_fields,
    reason="this wandb writes the file of an offline run when it has 32 KiB, or at the end",
)


def start(results: Path, arguments: tuple[str, ...], rest_s: float) -> subprocess.Popen[bytes]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment = kept | {"PYTHONPATH": str(Path(ditbench.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SLOW), str(rest_s), *arguments, f"results_dir={results}"]
    with (results / "output.txt").open("ab") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def halfway(process: subprocess.Popen[bytes], results: Path) -> dict[str, Any]:
    """What W&B has of the run when it has drawn some of its samples, and not all."""
    until = time.monotonic() + LONGEST_S
    while time.monotonic() < until and process.poll() is None:
        for file in results.glob("runs/live/wandb/offline-run-*/run-*.wandb"):
            held = contents(file) if file.stat().st_size > 4 else {"history": {}}
            now = held["history"]
            if now.get("live/stage") == "generate" and 0 < now.get("live/share", 0) < 1 and "samples/first" in now:
                return held
        time.sleep(0.1)
    pytest.fail(f"nobody could see that samples are drawn:\n{(results / 'output.txt').read_text()}")


@pytest.fixture(scope="module")
def killed_and_started_again(tmp_path_factory, tiny) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """The results, what W&B had of the run when it was killed, and what it has of both parts at the end."""
    results = tmp_path_factory.mktemp("live")
    arguments = (*tiny, "tracker=wandb", "tracker.mode=offline", "name=live", "generate.batch_size=1")
    process = start(results, arguments, rest_s=2.0)
    try:
        seen = halfway(process, results)
    finally:
        process.kill()
        process.wait()
    assert not list(results.glob("runs/live/*/record.json"))
    again = start(results, arguments, rest_s=0.0)
    assert again.wait(LONGEST_S) == 0, (results / "output.txt").read_text()
    files = sorted(results.glob("runs/live/wandb/offline-run-*/run-*.wandb"))
    return results, seen, [contents(file) for file in files]


def test_stage_progress_and_first_pictures_are_there_while_a_run_goes_on(killed_and_started_again):
    _, seen, parts = killed_and_started_again
    now = seen["history"]
    assert now["live/stage"] == "generate" and now["live/total"] == 4 * 2, "samples × steps"
    assert 0 < now["live/done"] < 8 and now["live/share"] == now["live/done"] / 8
    assert 0 < now["live/samples_per_s"] < 1, "a piece of one sample rests for two seconds"
    stages = {row.get("live/stage") for part in parts for row in part["rows"]} - {None}
    assert len(stages) >= 2, stages  # of both parts: on a busy machine the first stage is over before W&B has begun
    for name in ("samples/first_float", "samples/first"):
        assert now[name]["_type"] == "image-file"
    assert seen["looks"] >= 1, "W&B's own system metrics"
    assert "exit_code" not in seen and not [name for name in now if name.startswith("metrics/")]


def test_a_run_that_is_killed_and_started_again_is_one_wandb_run(killed_and_started_again):
    results, seen, parts = killed_and_started_again
    (path,) = results.glob("runs/live/*/record.json")
    record = json.loads(path.read_text())
    assert len(parts) == 2 and {part["run_id"] for part in parts} == {seen["run_id"]} == {record["run_id"]}
    first, second = parts
    assert "exit_code" not in first and second["exit_code"] == 0
    assert second["rows"][0]["_step"] > first["rows"][-1]["_step"], "what comes later stands behind what was"
    assert second["summary"]["metrics/psnr"] == record["metrics"]["psnr"]["value"]


def test_nothing_of_the_killed_run_is_in_the_way_of_the_next(killed_and_started_again):
    results, _, _ = killed_and_started_again
    home = results / "runs" / "live"
    assert sorted(path.name for path in home.iterdir() if path.is_dir()) == sorted(
        [*(path.parent.name for path in home.glob("*/record.json")), "wandb"]
    )
    assert not list(home.glob(".*.lock"))
