"""An offline run is read back from W&B's own file: what a dashboard would show is what the record says."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ditbench.harness.cli import main
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


@pytest.mark.parametrize("tracker", [{"kind": "none", "mode": "offline"}, {"kind": "wandb", "mode": "disabled"}])
def test_a_tracker_that_is_off_does_not_even_start_wandb(swept, read_records, tmp_path, monkeypatch, tracker):
    monkeypatch.setattr("wandb.init", lambda **_: pytest.fail("wandb.init was called"))
    log(tracker | {"project": None, "entity": None}, Record(**next(iter(read_records(swept).values()))), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_auto_goes_online_only_with_a_key(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
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
    record = Record(**stored)
    record.metrics = {"psnr": stored["metrics"]["psnr"] | {"value": None, "ci95": None, "status": "skipped"}}
    assert not [name for name in values(record) if name.startswith("metrics/")]


def contents(file: Path) -> dict[str, Any]:
    """config, history, summary, group, project, name and id out of a .wandb file."""
    found: dict[str, Any] = {"config": {}, "history": {}, "summary": {}}
    for data in leveldb_log(file.read_bytes()):
        message = pb.Record()
        message.ParseFromString(data)
        kind = message.WhichOneof("record_type")
        if kind == "run":
            run = message.run
            found |= {"group": run.run_group, "project": run.project, "name": run.display_name, "run_id": run.run_id}
            found["config"] |= {item.key: json.loads(item.value_json) for item in run.config.update}
        elif kind in ("history", "summary"):
            items = message.history.item if kind == "history" else message.summary.update
            for item in items:
                insert(found[kind], [item.key] if item.key else list(item.nested_key), json.loads(item.value_json))
    return found


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
