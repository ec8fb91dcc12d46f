"""The samples of a recorded run: in the store that its record names, or in an images.npz of an older record."""

from __future__ import annotations

import re
from pathlib import Path

from ditbench.harness.common.artifacts import Damaged
from ditbench.harness.common.errors import UserError
from ditbench.harness.generation.generate import load_samples
from ditbench.harness.records.record import Record, artifact
from ditbench.harness.samples.samples import Samples
from ditbench.harness.samples.store import KIND, found_store

KEY = re.compile("[0-9a-f]{32}")


def samples_of(record: Record) -> Samples:
    """What the run drew, read when asked for.

    Raises:
        UserError: they were deleted, or are damaged.
    """
    if "samples" in record.made_from:
        return samples_at(store_of(record, record.made_from["samples"]), record)
    return load_samples(artifact(record, "images"))


def store_of(record: Record, key: str) -> Path:
    """The folder of a store that the record names: in the cache beside its results, or in the one that its run was given."""
    if not KEY.fullmatch(key):
        raise UserError(f"{record.folder}: its record names samples {key!r}, which is no key; run it again")
    assert record.folder is not None, "it was read from a folder"
    beside = record.folder.parents[2] / "cache" / KIND / key
    return beside if beside.is_dir() else Path(str(record.config.get("cache_dir"))).expanduser() / KIND / key


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
