"""An offline run is read back from W&B's own file: what a dashboard would show is what the record says."""

from __future__ import annotations

import errno
import json
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from wandb_files import contents

from ditbench.harness import run as running
from ditbench.harness.cli import main
from ditbench.harness.common.errors import UserError
from ditbench.harness.records import tracking
from ditbench.harness.records.record import Record
from ditbench.harness.records.told import numbers
from ditbench.harness.records.trackers.wandb import INIT_S, mode


@pytest.fixture(scope="module")
def logged(tmp_path_factory, tiny) -> Path:
    """A sweep of two runs with the W&B tracker, offline."""
    folder = tmp_path_factory.mktemp("logged")
    rest = [argument for argument in tiny if not argument.startswith("tracker")]
    more = ("tracker.mode=offline", "name=widths", f"results_dir={folder}", "bits=w8a8,fp8")
    assert main(["run", "-m", *rest, *more]) == 0
    return folder


@pytest.fixture(scope="module")
def pairs(logged, read_records) -> list[tuple[dict[str, Any], dict[str, Any], Path]]:
    """[(record, what W&B holds, folder of the W&B files)] of both runs."""
    found = []
    for name, record in read_records(logged).items():
        (file,) = (logged / "runs" / "widths").glob(f"wandb/offline-run-*-{name}/run-{name}.wandb")
        found.append((record, contents(file), file.parent))
    assert len(found) == 2
    return found


def test_the_whole_configuration_is_logged(pairs):
    for record, logged, _ in pairs:
        assert {name: logged["config"][name] for name in record["config"]} == record["config"]


def test_history_and_summary_hold_the_records_numbers(pairs):
    for record, logged, _ in pairs:
        for place in ("history", "summary"):
            for name, entry in record["metrics"].items():
                assert logged[place][f"metrics/{name}"] == entry["value"]
                assert logged[place][f"metrics/{name}/n"] == entry["n"] == 4
                assert logged[place][f"metrics/{name}/ci95_low"] == entry["ci95"][0]
                assert logged[place][f"metrics/{name}/ci95_high"] == entry["ci95"][1]
            assert logged[place]["efficiency/kind"] == record["efficiency"]["kind"]
            assert logged[place]["efficiency/compression"] == record["efficiency"]["compression"]
            assert logged[place]["bits/weight_bits_effective"] == record["bits"]["weight_bits_effective"]
            assert logged[place]["timings_s/generate"] == record["timings_s"]["generate"]


def test_latency_is_logged_where_it_was_measured_and_nowhere_else(pairs):
    for record, logged, _ in pairs:
        latency = record["efficiency"]["latency_ms"]
        assert logged["summary"].get("efficiency/latency_ms/median") == (latency and latency["median"])
        assert logged["summary"].get("efficiency/speedup") == record["efficiency"]["speedup"]
    assert (
        "efficiency/speedup"
        not in next(logged for record, logged, _ in pairs if record["bits"]["label"] == "FP8")["summary"]
    )


def test_both_sample_grids_are_logged_as_images(pairs):
    for record, logged, folder in pairs:
        for name in ("grid", "float_grid"):
            entry = logged["summary"][f"samples/{name}"]
            assert entry["_type"] == "image-file"
            ours = folder.parents[1] / record["run_id"] / record["artifacts"][name]
            assert (folder / "files" / entry["path"]).read_bytes() == ours.read_bytes()


def test_the_layer_table_has_every_row(pairs):
    for record, logged, folder in pairs:
        entry = logged["summary"]["layers"]
        assert entry["_type"] == "table-file" and entry["nrows"] == len(record["layers"]) == 30
        table = json.loads((folder / "files" / entry["path"]).read_text())
        assert table["columns"] == ["layer", "sqnr_db", "backend", "label", "weight_bits", "act_bits"]
        rows = {row[0]: dict(zip(table["columns"][1:], row[1:], strict=True)) for row in table["data"]}
        assert rows == record["layers"]


def test_the_error_atlas_is_logged_layer_by_step(pairs):
    for record, logged, _ in pairs:
        entry = logged["summary"]["layers_by_step"]
        steps, blocks = record["config"]["protocol"]["steps"], 5
        assert entry["nrows"] == (len(record["layers"]) + blocks) * steps


def test_the_runs_of_a_sweep_share_the_experiments_group_and_have_names_of_their_own(pairs):
    assert {logged["group"] for _, logged, _ in pairs} == {"widths"}
    assert {logged["project"] for _, logged, _ in pairs} == {"ditbench"}
    assert sorted(logged["name"] for _, logged, _ in pairs) == ["tiny-dit rtn FP8 seed 0", "tiny-dit rtn W8A8 seed 0"]
    for record, logged, _ in pairs:
        assert logged["run_id"] == record["run_id"]
        assert logged["job_type"] == "quantize"
        assert set(logged["tags"]) == {"tiny-dit", "rtn", record["bits"]["label"], "protocol:default"}


def test_the_configuration_says_what_it_was_run_with(pairs):
    for record, logged, _ in pairs:
        run = logged["config"]["run"]
        assert run["n"] == 4 and run["run_id"] == record["run_id"]
        for name in ("git", "weights_sha256", "method_sha256", "packages", "seeds"):
            assert run[name] == record["env"][name]


def test_every_metric_has_its_interval_n_and_passport_in_a_table(pairs):
    for record, logged, folder in pairs:
        rows = table(logged, folder, "metrics_table")
        assert [row["metric"] for row in rows] == list(record["metrics"])
        for row in rows:
            entry = record["metrics"][row["metric"]]
            assert [row["ci95_low"], row["ci95_high"]] == entry["ci95"] and row["n"] == entry["n"]
            assert json.loads(row["passport"]) == entry["passport"]


def test_every_sample_has_its_values_in_a_table(pairs):
    for record, logged, folder in pairs:
        rows = table(logged, folder, "per_sample")
        assert [row["prompt"] for row in rows] == [f"label {label}" for label in range(4)]
        psnr = sum(row["psnr"] for row in rows) / len(rows)
        assert psnr == pytest.approx(record["metrics"]["psnr"]["value"])


def test_samples_are_shown_beside_the_float_models_with_what_they_should_be(pairs):
    for _, logged, _ in pairs:
        entry = logged["summary"]["samples/beside_float"]
        assert entry["count"] == 4 and entry["width"] > 2 * 128 > entry["height"]
        assert all(caption.startswith("label ") for caption in entry["captions"])
        assert logged["summary"]["samples/table"]["nrows"] == 4
        assert logged["summary"]["layer_errors"]["_type"] == "image-file"


def test_the_files_of_wandb_lie_where_no_run_is_renamed_or_removed(logged, pairs):
    for record, _, folder in pairs:
        assert folder.parent == logged / "runs" / "widths" / "wandb"
        assert not list((logged / "runs" / "widths" / record["run_id"]).glob("wandb*"))
    assert not list((logged / "runs" / "widths").glob(".*.lock")), "nobody tells of anything any more"


def test_without_a_tracker_there_are_no_wandb_files(swept):
    assert not [path for path in swept.rglob("*") if "wandb" in path.name]


@pytest.mark.parametrize(
    ("tracker", "environment"),
    [
        ({"kind": "none", "mode": "offline"}, {}),
        ({"kind": "wandb", "mode": "disabled"}, {"WANDB_MODE": "offline"}),
        ({"kind": "wandb", "mode": "auto"}, {"WANDB_MODE": "disabled"}),
        ({"kind": "wandb", "mode": "auto"}, {"WANDB_DISABLED": "true", "WANDB_MODE": "online"}),
    ],
)
def test_a_tracker_that_is_off_hears_nothing(tmp_path, monkeypatch, tracker, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    record = Record("0" * 12, "failed", {}, "rtn", "tiny-dit", "default")
    with tracking.Tracked(tracker, record, torch.device("cpu")) as tracked:
        tracked.begins("0" * 12, "tiny-dit rtn", tmp_path / "scratch")
        assert tracked.thread is None
    assert list(tmp_path.iterdir()) == []


def test_the_environment_says_the_mode_only_where_the_configuration_leaves_it_open(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.delenv("WANDB_DISABLED", raising=False)
    for said, meant in (("offline", "offline"), ("dryrun", "offline"), ("online", "online"), ("DISABLED", "disabled")):
        monkeypatch.setenv("WANDB_MODE", said)
        assert mode("auto") == meant and mode("online") == "online" and mode("offline") == "offline"
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(UserError, match="WANDB_MODE is 'ofline', expected one of online, offline"):
        mode("auto")


@pytest.fixture
def tracked(run, monkeypatch):
    """tracked("bits=w8a8", …): a run with the W&B tracker on; what earlier tests gave up is forgotten."""
    monkeypatch.setattr(tracking, "_gave_up", set())
    return lambda *arguments: run("tracker=wandb", "tracker.mode=offline", *arguments)


def test_a_tracker_that_breaks_costs_no_run_and_is_not_tried_again(
    tracked, tmp_path, read_records, monkeypatch, capsys
):
    tried = []

    def unreachable(**settings):
        tried.append(settings["id"])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("wandb.init", unreachable)
    assert tracked("-m", "bits=w8a8,w4a4") == 0
    first, _ = read_records(tmp_path)
    assert tried == [first]
    assert capsys.readouterr().err.count("not tracked by wandb: OSError in test_wandb.py") == 1


def test_a_record_is_published_before_the_tracker_hears_its_numbers(tracked, tmp_path, read_records, monkeypatch):
    seen = []

    class Broken:
        def log(self, values):
            if "metrics/psnr" in values:
                seen.append(list(read_records(tmp_path)))
                raise ValueError("no such number")

        def finish(self, status, error):
            seen.append(status)

    monkeypatch.setattr(tracking, "tracker", lambda settings: SimpleNamespace(begin=lambda settings, card: Broken()))
    assert tracked() == 0
    assert seen == [list(read_records(tmp_path)), "ok"] and len(seen[0]) == 1


def test_an_interruption_while_tracking_costs_no_record(tracked, tmp_path, read_records, monkeypatch):
    class Slow:
        def log(self, values): ...

        def finish(self, status, error):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(1)

    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's job in the background ignores it from the start

    monkeypatch.setattr(tracking, "tracker", lambda settings: SimpleNamespace(begin=lambda settings, card: Slow()))
    try:
        assert tracked() == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert [each["status"] for each in read_records(tmp_path).values()] == ["ok"]


def test_a_failed_run_is_a_failed_wandb_run_with_its_reason(tracked, tmp_path, read_records, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(running, "calibrate", fail)  # before the bits are counted
    assert tracked("bits=w4a8") == 3
    assert "not tracked" not in capsys.readouterr().err
    ((name, record),) = read_records(tmp_path).items()
    assert record["status"] == "failed" and record["error"].startswith("out of memory: MemoryError in test_wandb.py")
    (file,) = (tmp_path / "runs" / "default").glob(f"wandb/offline-run-*-{name}/run-*.wandb")
    logged = contents(file)
    assert logged["exit_code"] == 1 and logged["name"] == "tiny-dit rtn W4A8 seed 0"
    assert logged["summary"]["status"] == "failed" and logged["summary"]["error"] == record["error"]


def test_a_finished_run_ends_well_in_wandb_too(pairs):
    for _, logged, _ in pairs:
        assert logged["exit_code"] == 0 and logged["summary"]["status"] == "ok"


def test_a_server_that_does_not_answer_is_waited_for_no_longer_than_said(tracked, monkeypatch, capsys):
    import wandb

    asked = {}

    def init(**settings):
        asked.update(settings)
        raise wandb.errors.CommError("no answer")

    monkeypatch.setattr("wandb.init", init)
    assert tracked("tracker.mode=online") == 0
    assert asked["mode"] == "online" and asked["resume"] == "allow"
    assert asked["settings"].init_timeout == INIT_S <= 30
    assert "no answer" in capsys.readouterr().err


def test_auto_goes_online_only_with_a_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert mode("auto") == "offline" and mode("online") == "online"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert mode("auto") == "online" and mode("offline") == "offline"
    monkeypatch.delenv("WANDB_API_KEY")
    for host in ("api.wandb.ai", "api.forge.coreweave.com"):
        (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password secret\n")
        (tmp_path / "netrc").chmod(0o600)
        assert mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    assert mode("auto") == "offline", "that key is another server's"


def test_a_skipped_metric_is_left_out_and_not_logged_as_zero(swept, read_records):
    stored = next(iter(read_records(swept).values()))
    record = Record(**without_hash(stored))
    record.metrics = {"psnr": stored["metrics"]["psnr"] | {"value": None, "ci95": None, "status": "skipped"}}
    assert not [name for name in numbers(record) if name.startswith("metrics/")]


def without_hash(stored: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in stored.items() if name != "sha256"}


def table(logged: dict[str, Any], folder: Path, name: str) -> list[dict[str, Any]]:
    held = json.loads((folder / "files" / logged["summary"][name]["path"]).read_text())
    return [dict(zip(held["columns"], row, strict=True)) for row in held["data"]]
