"""Records: one JSON file per run, written once, never edited; a run's folder appears whole or not at all.

    <results_dir>/runs/<experiment>/<run_id>/record.json      the first attempt
    <results_dir>/runs/<experiment>/<run_id>.2/record.json    again (after a failure, or with --force)
    …/<run_id>/metrics/<metric>.json                          a metric that was computed later; it counts before the record's

`run_id` is the hash of everything that can change a number (`harness.stages.identity`). Fields get added, never renamed;
old records stay readable. A record carries the SHA-256 of itself and of the files beside it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditbench.harness.common.artifacts import Damaged, check, entry_of
from ditbench.harness.common.errors import UserError, reason
from ditbench.harness.common.files import is_disk_error
from ditbench.harness.common.watch import say
from ditbench.harness.records import hashed_json, schema
from ditbench.harness.records.hashed_json import NotWhole

SCHEMA = 1
# Of a model's configuration what says where files lie. What lies there is in `env.weights_sha256`, however its place is spelled.
PLACES = ("source", "config", "transformer", "lora")
ATTEMPT = re.compile(r"^(?P<run_id>[0-9a-f]{12})(?:\.(?P<attempt>\d+))?$")


class DamagedRecord(UserError):
    """A record that is not what a run wrote; the message names it."""


@dataclass
class Record:
    """The result of one run.

    metrics: {name: {value, ci95, n, better, paired, noise_floor, status, reason, passport}}; `value` is None when
        `status` is "skipped" (it cannot run here) or "failed" (it broke).
    efficiency: {kind, backend, device, latency_ms{median, p10, p90}, baseline_latency_ms{…}, speedup, baseline (what it is of),
        compiled_speedup and its like (measure.compile=true), model_bytes,
        baseline_model_bytes, compression, peak_memory_bytes, …}; `kind` is "measured" (an integer kernel, or the
        16-bit reference, was timed on this device), "simulated" or "not timed" (then latency, speedup and peak memory are None).
    bits: {label, weight_bits_effective, act_bits_effective, mac_share_quantized, float_layers, …}.
    files: {path of an artifact: {bytes, sha256}}.
    non_finite: where a number was infinite or none ("layers/proj_out/sqnr_db: inf"); null stands there.
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
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    non_finite: list[str] = field(default_factory=list)
    folder: Path | None = None  # where it was read from; not stored
    damaged: tuple[str, ...] = ()  # what beside it cannot be used, a line each; not stored
    members: tuple[Record, ...] = ()  # of a row over seeds in a report, the runs that it is made of; not stored


NOT_STORED = ("folder", "damaged", "members")


def write(record: Record, folder: Path) -> None:
    """Write record.json. What JSON cannot hold, or what there is no memory for, leaves a failed record that says so.

    Raises:
        OSError: the disk takes nothing.
    """
    values = {name: value for name, value in vars(record).items() if name not in NOT_STORED}
    try:
        text = hashed_json.text_of(_storable(values, folder))
    except Exception as error:
        if is_disk_error(error):
            raise
        why = f"the record could not be written whole: {reason(error)}"
        say(f"{folder}: {why}")
        values |= {"status": "failed", "error": f"{values['error']}; {why}" if values["error"] else why}
        try:
            text = hashed_json.text_of(_what_can_be_stored(values))
        except Exception:  # out of memory still
            bare = {name: {} if name == "config" else values[name] for name in (*schema.REQUIRED, "error")}
            text = hashed_json.text_of(bare)
    hashed_json.write(folder / "record.json", text)


def add_metric(folder: Path, name: str, entry: dict[str, Any], again: bool = False) -> Path:
    """File a metric of a recorded run, as `Record.metrics` holds one, in a file of its own that `read` finds.

    again: it counts instead of what the run has of that metric; record.json itself is never edited.

    Raises:
        UserError: the run has a value of that metric already (unless again), or its name cannot be a file's.
    """
    if not schema.inside(name):
        raise UserError(f"{folder}: metric {name!r} cannot be the name of a file; rename it")
    known = read(folder / "record.json").metrics.get(name)
    if known is not None and known.get("status") not in ("failed", "skipped") and not again:
        raise UserError(f"{folder}: {name} is recorded already; nothing is overwritten, run again with --force instead")
    path = folder / "metrics" / f"{name}.json"
    path.with_suffix(".npz").unlink(missing_ok=True)  # values per sample of the entry that this one replaces
    hashed_json.write(path, hashed_json.text_of(entry))
    return path


def read(path: Path) -> Record:
    """The record in a record.json, with the metrics that were filed beside it later.

    Raises:
        DamagedRecord: unreadable JSON, not a record, or not the one that was written.
        UserError: written by a newer ditbench.
    """
    try:
        values = hashed_json.read(path)
    except NotWhole as error:
        raise DamagedRecord(f"{path}: not a readable record ({error}); move that folder away to go on") from error
    except OSError as error:
        raise DamagedRecord(f"{path}: cannot be read ({error.strerror}); move that folder away to go on") from error
    its_schema = values.get("schema")
    if isinstance(its_schema, int) and its_schema > SCHEMA:  # asked first: a newer record may have other fields
        raise UserError(
            f"{path}: record schema {its_schema} is newer than this ditbench reads ({SCHEMA}); "
            "upgrade ditbench, or point results_dir elsewhere"
        )
    missing = [name for name in schema.REQUIRED if name not in values]
    if missing or not isinstance(its_schema, int) or isinstance(its_schema, bool) or its_schema < 1:
        what = f"without {', '.join(sorted(missing))}" if missing else f"schema {its_schema!r}"
        raise DamagedRecord(f"{path}: not a ditbench record ({what}); move that folder away to go on")
    if (odd := schema.problem(values)) is not None:
        raise DamagedRecord(f"{path}: not a ditbench record ({odd}); move that folder away to go on")
    known = set(Record.__dataclass_fields__) - set(NOT_STORED)
    record = Record(**{name: value for name, value in values.items() if name in known}, folder=path.parent)
    later, record.damaged = _later_metrics(path.parent / "metrics")
    record.metrics |= later
    return record


def artifact(record: Record, name: str) -> Path:
    """A file beside the record, whole as far as its hash says (records of before have none).

    Raises:
        UserError: there is no such file, or it is not what was written.
    """
    assert record.folder is not None, "it was read from a folder"
    if name not in record.artifacts:
        raise UserError(f"{record.folder}: the run kept no {name}; run it again with --force")
    relative = record.artifacts[name]
    path = record.folder / relative
    try:
        if relative in record.files:
            check(path, record.files[relative])
        elif not path.is_file():
            raise Damaged(f"{path}: is missing")
    except (Damaged, OSError, KeyError) as error:
        raise UserError(f"{error}; run it again with --force") from error
    return path


def failed_metrics(record: Record) -> list[str]:
    """The metrics that broke: the same command completes them. What was skipped cannot run here and is not among them."""
    return [name for name, entry in record.metrics.items() if entry.get("status") == "failed"]


def _storable(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Raises NotWhole: a field is not what `read` takes."""
    values, non_finite = hashed_json.finite(values)
    values["non_finite"] = [*values["non_finite"], *non_finite]
    for name, entry in values["metrics"].items():
        _mend_metric(name, entry)
    if (what := schema.problem(values)) is not None:
        raise NotWhole(what)
    paths = {path: folder / path for path in values["artifacts"].values()}
    values["files"] = {path: entry_of(file) for path, file in paths.items() if file.is_file()}
    return values


def _mend_metric(name: str, entry: dict[str, Any]) -> None:
    """A metric that has no finite value, or is not what a record holds (a plugin's), has failed; it costs nothing else."""
    if None in (entry.get("ci95") or ()):
        entry["ci95"] = None
    no_value = entry.get("value") is None and entry.get("status") == "ok"
    what = "its value was not finite" if no_value else schema.problem_of_metric(name, entry)
    if what is not None:
        better = entry.get("better") if entry.get("better") in schema.METRIC["better"] else "none"
        entry.clear()
        entry |= {"value": None, "ci95": None, "n": 0, "status": "failed", "reason": what, "passport": {}}
        entry |= {"better": better, "paired": False, "unit": "", "noise_floor": None}


def _what_can_be_stored(values: dict[str, Any]) -> dict[str, Any]:
    """The fields that JSON takes, one by one; those it does not take are empty."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        try:
            kept[name], _ = hashed_json.finite(value)
            if schema.problem_of_field(name, kept[name]) is not None:
                raise NotWhole
            hashed_json.text_of({name: kept[name]})
        except Exception:  # whatever it is, the other fields can be kept
            kept[name] = [] if name == "non_finite" else {}
    return kept


def _later_metrics(home: Path) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    found, damaged = {}, []
    for path in sorted(home.rglob("*.json")) if home.is_dir() else ():
        name = path.relative_to(home).with_suffix("").as_posix()
        try:
            entry = hashed_json.read(path)
            if (what := schema.problem_of_metric(name, entry)) is not None:
                raise NotWhole(what)
            found[name] = entry
        except (NotWhole, OSError) as error:
            damaged.append(f"{path}: not a readable metric ({error}); move that file away")
    return found, tuple(damaged)
