"""The samples of a recorded run: in the store that its record names, or in an images.npz of an older record."""

from __future__ import annotations

from pathlib import Path

from ditbench.harness.common.artifacts import Damaged
from ditbench.harness.common.errors import UserError
from ditbench.harness.generation.generate import load_samples
from ditbench.harness.records.record import Record
from ditbench.harness.samples.samples import Samples
from ditbench.harness.samples.store import found_store


def samples_of(record: Record) -> Samples:
    """What the run drew, read when asked for.

    Raises:
        UserError: they were deleted, or are damaged.
    """
    assert record.folder is not None, "it was read from a folder"
    if "samples" not in record.artifacts:
        return load_samples(record.folder / record.artifacts["images"])
    return samples_at(store_of(record), record)


def store_of(record: Record) -> Path:
    """The folder of the run's store."""
    assert record.folder is not None
    return (record.folder / record.artifacts["samples"]).resolve()


def samples_at(folder: Path, record: Record) -> Samples:
    """What a store holds that a record was made from. Raises UserError."""
    try:
        return found_store(folder).samples()
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: the samples of run {record.run_id} are not there; the run's own command draws them again"
        ) from error
    except Damaged as damage:
        raise UserError(f"{damage}; the command of run {record.run_id} with --force draws it again") from damage
