"""What is in the file that W&B writes of a run, also of one that goes on."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")


def contents(file: Path) -> dict[str, Any]:
    """config, history (the last of each value), rows (of the history, each for itself), summary, group, job type, tags, project,
    name, id, exit code, artifacts, and how often the system was looked at, out of a .wandb file.
    """
    found: dict[str, Any] = {"config": {}, "history": {}, "summary": {}, "rows": [], "looks": 0, "artifacts": []}
    for data in leveldb_log(file.read_bytes()):
        message = pb.Record()
        message.ParseFromString(data)
        kind = message.WhichOneof("record_type")
        if kind == "run":
            run = message.run
            found |= {"group": run.run_group, "project": run.project, "name": run.display_name, "run_id": run.run_id}
            found |= {"job_type": run.job_type, "tags": list(run.tags)}
            found["config"] |= {item.key: json.loads(item.value_json) for item in run.config.update}
        elif kind == "exit":
            found["exit_code"] = message.exit.exit_code
        elif kind == "artifact" or (kind == "request" and message.request.HasField("log_artifact")):
            artifact = message.artifact if kind == "artifact" else message.request.log_artifact.artifact
            paths = {entry.path for entry in artifact.manifest.contents}
            found["artifacts"].append((artifact.type, artifact.name, paths))
        elif kind == "stats":
            found["looks"] += 1
        elif kind in ("history", "summary"):
            items = message.history.item if kind == "history" else message.summary.update
            for item in items:
                insert(found[kind], [item.key] if item.key else list(item.nested_key), json.loads(item.value_json))
        if kind == "history":
            found["rows"].append({})
            for item in items:
                insert(
                    found["rows"][-1], [item.key] if item.key else list(item.nested_key), json.loads(item.value_json)
                )
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
        if place + 7 + length > len(data):
            return  # it is being written
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""
