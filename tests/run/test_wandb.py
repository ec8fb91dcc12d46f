"""An offline run is read back from W&B's own file: what a dashboard would show is what the record says."""

from __future__ import annotations

import errno
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ditbench.harness import run as running
from ditbench.harness.cli import main
from ditbench.harness.common.errors import UserError
from ditbench.harness.records import tracking
from ditbench.harness.records.record import Record
from ditbench.harness.records.tracking import log, mode, values

pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")


@pytest.fixture(scope="module")
def logged(tmp_path_factory, tiny) -> Path:
    """A sweep of two runs with the W&B tracker, offline."""
    folder = tmp_path_factory.mktemp("logged")
    rest = [argument for argument in tiny if not argument.startswith("tracker")]
    more = ("tracker.mode=offline", "name=widths", f"results_dir={folder}", "bits=w8a8,w3a4")
    assert main(["run", "-m", *rest, *more]) == 0
    return folder


@pytest.fixture(scope="module")
def pairs(logged, read_records) -> list[tuple[dict[str, Any], dict[str, Any], Path]]:
    """[(record, what W&B holds, folder of the W&B files)] of both runs."""
    found = []
    for name, record in read_records(logged).items():
        (file,) = (logged / "runs" / "widths" / name).glob("wandb/offline-run-*/run-*.wandb")
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
        not in next(logged for record, logged, _ in pairs if record["bits"]["label"] == "W3A4")["summary"]
    )


def test_both_sample_grids_are_logged_as_images(pairs):
    for record, logged, folder in pairs:
        for name in ("grid", "float_grid"):
            entry = logged["summary"][f"samples/{name}"]
            assert entry["_type"] == "image-file"
            ours = folder.parents[1] / record["artifacts"][name]
            assert (folder / "files" / entry["path"]).read_bytes() == ours.read_bytes()


def test_the_layer_table_has_every_row(pairs):
    for record, logged, folder in pairs:
        entry = logged["summary"]["layers"]
        assert entry["_type"] == "table-file" and entry["nrows"] == len(record["layers"]) == 30
        table = json.loads((folder / "files" / entry["path"]).read_text())
        assert table["columns"] == ["layer", "sqnr_db", "backend", "weight_bits", "act_bits"]
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
    assert sorted(logged["name"] for _, logged, _ in pairs) == ["tiny-dit rtn W3A4", "tiny-dit rtn W8A8"]
    assert len({logged["run_id"] for _, logged, _ in pairs}) == 2
    for record, logged, _ in pairs:
        assert logged["run_id"].startswith(record["run_id"])


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
def test_a_tracker_that_is_off_does_not_even_start_wandb(
    swept, read_records, tmp_path, monkeypatch, tracker, environment
):
    monkeypatch.setattr("wandb.init", lambda **_: pytest.fail("wandb.init was called"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    record = Record(**without_hash(next(iter(read_records(swept).values()))), folder=tmp_path)
    log(tracker | {"project": None, "entity": None}, record)
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
    monkeypatch.setattr(tracking, "_gave_up", False)
    return lambda *arguments: run("tracker=wandb", "tracker.mode=offline", *arguments)


def test_a_record_is_published_before_the_tracker_hears_of_it_and_nothing_that_it_does_undoes_that(
    tracked, tmp_path, read_records, monkeypatch, capsys
):
    seen = []

    def unreachable(**settings):
        seen.append((set(read_records(tmp_path)), Path(settings["dir"]).name))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("wandb.init", unreachable)
    assert tracked("-m", "bits=w8a8,w4a4") == 0
    first, _ = read_records(tmp_path)
    assert seen == [({first}, first)], "published before, and not tried again for the second run"
    assert capsys.readouterr().err.count("not tracked") == 1


def test_an_interruption_while_tracking_costs_no_record(tracked, tmp_path, read_records, monkeypatch):
    def interrupt(**settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("wandb.init", interrupt)
    assert tracked() == 130
    assert [each["status"] for each in read_records(tmp_path).values()] == ["ok"]


def test_a_failed_run_is_a_failed_wandb_run_with_its_reason(tracked, tmp_path, read_records, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(running, "calibrate", fail)  # before the bits are counted
    assert tracked("bits=w4a8") == 3
    assert "not tracked" not in capsys.readouterr().err
    ((name, record),) = read_records(tmp_path).items()
    assert record["status"] == "failed" and record["error"].startswith("out of memory: MemoryError in test_wandb.py")
    (file,) = (tmp_path / "runs" / "default" / name).glob("wandb/offline-run-*/run-*.wandb")
    logged = contents(file)
    assert logged["exit_code"] == 1 and logged["name"] == "tiny-dit rtn W4A8"
    assert logged["summary"]["status"] == "failed" and logged["summary"]["error"] == record["error"]


def test_a_finished_run_ends_well_in_wandb_too(pairs):
    for _, logged, _ in pairs:
        assert logged["exit_code"] == 0 and logged["summary"]["status"] == "ok"


def test_a_server_that_does_not_answer_is_waited_for_no_longer_than_said(swept, read_records, monkeypatch):
    import wandb

    asked = {}

    def init(**settings):
        asked.update(settings)
        raise wandb.errors.CommError("no answer")

    monkeypatch.setattr(tracking, "_gave_up", False)
    monkeypatch.setattr("wandb.init", init)
    record = Record(**without_hash(next(iter(read_records(swept).values()))), folder=swept)
    tracker = {"kind": "wandb", "mode": "online", "project": "p", "entity": None}
    with pytest.raises(wandb.errors.CommError):
        log(tracker, record)
    assert asked["settings"].init_timeout == tracking.INIT_S <= 30
    log(tracker, record)  # given up: init is not called again, and nothing is raised


def test_auto_goes_online_only_with_a_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert mode("auto") == "offline" and mode("online") == "online"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert mode("auto") == "online" and mode("offline") == "offline"
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    assert mode("auto") == "online"


def test_a_skipped_metric_is_left_out_and_not_logged_as_zero(swept, read_records):
    stored = next(iter(read_records(swept).values()))
    record = Record(**without_hash(stored))
    record.metrics = {"psnr": stored["metrics"]["psnr"] | {"value": None, "ci95": None, "status": "skipped"}}
    assert not [name for name in values(record) if name.startswith("metrics/")]


def contents(file: Path) -> dict[str, Any]:
    """config, history, summary, group, project, name, id and exit code out of a .wandb file."""
    found: dict[str, Any] = {"config": {}, "history": {}, "summary": {}}
    for data in leveldb_log(file.read_bytes()):
        message = pb.Record()
        message.ParseFromString(data)
        kind = message.WhichOneof("record_type")
        if kind == "run":
            run = message.run
            found |= {"group": run.run_group, "project": run.project, "name": run.display_name, "run_id": run.run_id}
            found["config"] |= {item.key: json.loads(item.value_json) for item in run.config.update}
        elif kind == "exit":
            found["exit_code"] = message.exit.exit_code
        elif kind in ("history", "summary"):
            items = message.history.item if kind == "history" else message.summary.update
            for item in items:
                insert(found[kind], [item.key] if item.key else list(item.nested_key), json.loads(item.value_json))
    return found


def without_hash(stored: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in stored.items() if name != "sha256"}


def insert(into: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        into = into.setdefault(key, {})
    into[path[-1]] = value


def leveldb_log(data: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: a 7-byte header, then LevelDB's log format (blocks of 32 KiB; pieces of a record
    are full 1, first 2, middle 3, last 4). wandb 0.31 has no Python reader of its own any more.
    """
    assert data[:4] == b":W&B"
    place, parts = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""
