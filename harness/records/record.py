"""Records: one JSON file per run, written once, never edited; a run's folder appears whole or not at all.

    <results_dir>/runs/<experiment>/<run_id>/record.json      the first attempt
    <results_dir>/runs/<experiment>/<run_id>.2/record.json    again (after a failure, or with --force)
    …/<run_id>/metrics/<metric>.json                          a metric that was computed later (ditbench vbench)

`run_id` is the hash of everything that can change a number (`harness.stages.identity`). Fields get added, never renamed;
old records stay readable.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import write_json

SCHEMA = 1
_HOST = socket.gethostname()
_ATTEMPT = re.compile(r"^(?P<run_id>[0-9a-f]{12})(?:\.(?P<attempt>\d+))?$")


@dataclass
class Record:
    """The result of one run.

    metrics: {name: {value, ci95, n, better, paired, noise_floor, status, reason, passport}}; `value` is None when
        `status` is "skipped" (it cannot run here) or "failed" (it broke).
    efficiency: {kind, backend, device, latency_ms{median, p10, p90}, baseline_latency_ms{…}, speedup, model_bytes,
        baseline_model_bytes, compression, peak_memory_bytes, …}; `kind` is "measured" (an integer kernel, or the
        16-bit reference, ran on this device) or "simulated" (then latency, speedup and peak memory are None).
    bits: {label, weight_bits_effective, act_bits_effective, mac_share_quantized, float_layers, …}.
    """

    run_id: str
    status: str  # ok | failed | skipped
    config: dict[str, Any]
    method: str
    model: str
    experiment: str
    schema: int = SCHEMA
    error: str | None = None
    bits: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    efficiency: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    timings_s: dict[str, float] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)  # name → path relative to the record's folder
    made_from: dict[str, Any] = field(default_factory=dict)  # artifact → its key in the cache, or a list of keys
    folder: Path | None = None  # where it was read from; not stored


def experiment_folder(results_dir: Path, experiment: str) -> Path:
    return Path(results_dir) / "runs" / experiment


@contextmanager
def run_folder(results_dir: Path, experiment: str, run_id: str) -> Iterator[Path]:
    """A scratch folder that becomes `<run_id>` (or the next free `<run_id>.N`) when the block ends well.

    An interrupted run leaves only a hidden `.…part` folder, which the next attempt of the same run removes.
    """
    home = experiment_folder(results_dir, experiment)
    home.mkdir(parents=True, exist_ok=True)
    for stale in home.glob(f".{run_id}.part-{_HOST}-*"):  # of this machine: another one's process ids mean nothing here
        if not _alive(int(stale.name.rsplit("-", 1)[1])):
            shutil.rmtree(stale, ignore_errors=True)
    part = home / f".{run_id}.part-{_HOST}-{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        while True:
            target = home / _next_name(home, run_id)
            try:
                os.rename(part, target)  # fails if another process took the name meanwhile: never overwrites
                break
            except OSError:
                if not target.exists():
                    raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write(record: Record, folder: Path) -> None:
    values = asdict(record)
    values.pop("folder")
    write_json(folder / "record.json", values)


def add_metric(folder: Path, name: str, entry: dict[str, Any]) -> Path:
    """File a metric of a recorded run, as `Record.metrics` holds one, in a file of its own that `read` finds.

    Raises:
        UserError: the run has that metric already.
    """
    path = folder / "metrics" / f"{name}.json"
    if name in read(folder / "record.json").metrics:
        raise UserError(f"{folder}: {name} is recorded already; nothing is overwritten, run again with --force instead")
    write_json(path, entry)
    return path


def read(path: Path) -> Record:
    """The record in a record.json, with the metrics that were filed beside it later.

    Raises:
        UserError: unreadable JSON, not a record, or written by a newer ditbench.
    """
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable record ({error}); move that folder away to go on") from error
    schema = values.get("schema") if isinstance(values, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:  # asked first: a newer record may have other fields
        raise UserError(
            f"{path}: record schema {schema} is newer than this ditbench reads ({SCHEMA}); "
            "upgrade ditbench, or point results_dir elsewhere"
        )
    required = {"schema", "run_id", "status", "config", "method", "model", "experiment"}
    missing = required - set(values) if isinstance(values, dict) else required
    if missing or not isinstance(schema, int):
        what = f"without {', '.join(sorted(missing))}" if missing else f"schema {schema!r}"
        raise UserError(f"{path}: not a ditbench record ({what}); move that folder away to go on")
    for name, entry in values.get("metrics", {}).items():
        if not isinstance(entry, dict):
            raise UserError(f"{path}: metric {name} is {entry!r}, expected its value with n; move that folder away")
    known = set(Record.__dataclass_fields__) - {"folder"}
    record = Record(**{name: value for name, value in values.items() if name in known}, folder=path.parent)
    record.metrics = _later_metrics(path.parent / "metrics") | record.metrics
    return record


def _later_metrics(home: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(home.rglob("*.json")):
        try:
            found[path.relative_to(home).with_suffix("").as_posix()] = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not a readable metric ({error}); move that file away to go on") from error
    return found


def attempts(results_dir: Path, experiment: str, run_id: str) -> list[Record]:
    """Every finished attempt of one run, oldest first."""
    home = experiment_folder(results_dir, experiment)
    found = []
    for folder in home.glob(f"{run_id}*"):
        match = _ATTEMPT.match(folder.name)
        if match and match["run_id"] == run_id and (folder / "record.json").exists():
            found.append((int(match["attempt"] or 1), read(folder / "record.json")))
    return [record for _, record in sorted(found, key=lambda pair: pair[0])]


def finished(results_dir: Path, experiment: str, run_id: str) -> Record | None:
    """The newest attempt that ended ok, if any."""
    ok = [record for record in attempts(results_dir, experiment, run_id) if record.status == "ok"]
    return ok[-1] if ok else None


def read_all(results_dir: Path, experiment: str | None = None) -> list[Record]:
    """The newest attempt of every run (an ok one before a failed one), of one experiment or of all."""
    root = Path(results_dir) / "runs"
    homes = [root / experiment] if experiment else sorted(p for p in root.glob("*") if p.is_dir())
    records: list[Record] = []
    for home in homes:
        run_ids = {m["run_id"] for p in home.glob("*") if (m := _ATTEMPT.match(p.name))}
        for run_id in sorted(run_ids):
            tries = attempts(results_dir, home.name, run_id)
            ok = [record for record in tries if record.status == "ok"]
            records += (ok or tries)[-1:]
    return records


def _next_name(home: Path, run_id: str) -> str:
    if not (home / run_id).exists():
        return run_id
    attempt = 2
    while (home / f"{run_id}.{attempt}").exists():
        attempt += 1
    return f"{run_id}.{attempt}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()
