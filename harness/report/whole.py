"""The records of a report, and what could not be used: a damaged record, or a damaged file beside one, costs itself only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ditbench.harness.common.artifacts import Damaged, check
from ditbench.harness.common.errors import UserError, unknown_name
from ditbench.harness.records import sample_values
from ditbench.harness.records.attempts import experiment_folder, survey
from ditbench.harness.records.record import Record

PER_SAMPLE = ("per_sample",)
OF_A_PAGE = (*PER_SAMPLE, "layer_errors", "grid", "float_grid", "animation", "float_animation")


def whole_records(
    results_dir: Path, experiment: str | None, used: Collection[str]
) -> tuple[list[Record], tuple[str, ...]]:
    """The best attempt of every run, without those values that are damaged; and a line for all that is.

    used: the artifacts that will be read.

    Raises:
        UserError: no such experiment; no record that can be read.
    """
    if experiment and not experiment_folder(results_dir, experiment).is_dir():
        known = [folder.name for folder in (results_dir / "runs").glob("*") if folder.is_dir()]
        raise unknown_name(f"experiment in {results_dir}/runs", experiment, known)
    found = survey(results_dir, experiment)
    if not found.records and found.damaged:
        more = f" (and {len(found.damaged) - 1} more)" if len(found.damaged) > 1 else ""
        raise UserError(found.damaged[0] + more)
    if not found.records:
        raise UserError(f"{results_dir}/runs: no record to report; run a sweep first, or set results_dir=…")
    records, damaged = [], list(found.damaged)
    for record in found.records:
        lines = dict(_damage(record, used))
        damaged += lines.values()
        unread = READERS.keys() & lines.keys()  # of a picture, the page says so in its place
        if unread:
            kept = {name: path for name, path in record.artifacts.items() if name not in unread}
            record = replace(record, artifacts=kept)
        records.append(record)
    return records, tuple(damaged)


def layer_atlas(path: Path) -> dict[str, Any]:
    """The error atlas of `harness.measurement.layer_errors`: names (L,), steps (S,), sqnr_db (L, S).

    Raises:
        Exception: it is not one.
    """
    with np.load(path) as arrays:
        atlas = {name: arrays[name] for name in ("names", "steps", "sqnr_db")}
    shape = (len(atlas["names"]), len(atlas["steps"]))
    if atlas["sqnr_db"].shape != shape or not np.issubdtype(atlas["sqnr_db"].dtype, np.floating):
        raise ValueError(f"sqnr_db is {atlas['sqnr_db'].dtype} {atlas['sqnr_db'].shape}, expected numbers {shape}")
    return atlas


READERS: dict[str, Callable[[Path], Any]] = {"per_sample": sample_values.load, "layer_errors": layer_atlas}


def beside(record: Record, artifact: str) -> Any:
    """What one of READERS reads out of the file beside a record; None where there is none, or none that can be read."""
    if record.folder is None or artifact not in record.artifacts:
        return None
    path = record.folder / record.artifacts[artifact]
    try:
        return _read(artifact, path, path.stat().st_mtime_ns)
    except Exception:  # what zipfile, zlib and NumPy say of odd bytes is anything
        return None


def values_with(record: Record, metric: str) -> sample_values.Values | None:
    """The values per sample of a metric: beside the metric if it was computed later, else beside the record. None of a metric that the
    record has not (any more: its file is damaged).
    """
    if metric not in record.metrics:
        return None
    later = None if record.folder is None else record.folder / "metrics" / f"{metric}.json"
    try:
        if later is None or not later.is_file():
            return beside(record, "per_sample")
        path = later.with_suffix(".npz")
        return _read("per_sample", path, path.stat().st_mtime_ns)
    except Exception:  # there is none, or none that can be read
        return None


@lru_cache(maxsize=256)
def _read(artifact: str, path: Path, mtime_ns: int) -> Any:
    return READERS[artifact](path)


def _damage(record: Record, used: Collection[str]) -> Iterator[tuple[str, str]]:
    """(artifact, what is wrong with it) of those that are there; whoever shows one says that it is missing."""
    assert record.folder is not None, "records of a report are read from disk"
    for name in used:
        relative = record.artifacts.get(name)
        if relative is None or not (path := record.folder / relative).is_file():
            continue
        try:
            if relative in record.files:
                check(path, record.files[relative])
            elif name in READERS:
                _read(name, path, path.stat().st_mtime_ns)
        except Damaged as damage:
            yield name, f"{damage}; the report goes without it"
        except Exception as error:  # what zipfile, zlib and NumPy say of odd bytes is anything
            yield name, f"{path}: not readable ({type(error).__name__}); the report goes without it"
