"""Large files are hashed once for as long as they stay what they were."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ditbench.harness.common import file_hashes
from ditbench.harness.common.file_hashes import files_sha256

LONG_AGO_NS = time.time_ns() - 10**12


@pytest.fixture
def read(monkeypatch, tmp_path) -> list[Path]:
    """Files that were read; every file counts as large."""
    found: list[Path] = []
    whole = file_hashes.file_sha256
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_hashes, "LARGE", 0)
    monkeypatch.setattr(file_hashes, "file_sha256", lambda path: found.append(path) or whole(path))
    return found


@pytest.fixture
def made(tmp_path) -> Callable[..., Path]:
    def make(content: bytes, mtime_ns: int = LONG_AGO_NS) -> Path:
        path = tmp_path / "weights.safetensors"
        path.write_bytes(content)
        os.utime(path, ns=(mtime_ns, mtime_ns))
        return path

    return make


def sha256(path: Path) -> str:
    return files_sha256([path])[path]


def test_a_large_file_is_read_once(read, made):
    path = made(b"weights")
    assert sha256(path) == sha256(path) == hashlib.sha256(b"weights").hexdigest()
    assert len(read) == 1


def test_a_small_file_is_read_every_time(read, made, monkeypatch):
    monkeypatch.setattr(file_hashes, "LARGE", 8)
    assert sha256(made(b"weights")) == sha256(made(b"weights")) and len(read) == 2


@pytest.mark.parametrize("mtime_ns", [LONG_AGO_NS, LONG_AGO_NS + 1], ids=["same mtime", "another mtime"])
def test_other_bytes_of_the_same_length_are_noticed(read, made, mtime_ns):
    sha256(made(b"weights"))
    assert sha256(made(b"WEIGHTS", mtime_ns)) == hashlib.sha256(b"WEIGHTS").hexdigest()


def test_a_file_that_was_written_just_now_is_not_remembered(read, made):
    path = made(b"weights", time.time_ns())
    assert sha256(path) == sha256(path) and len(read) == 2


def test_a_damaged_note_is_not_believed(read, made, tmp_path):
    path = made(b"weights")
    before = sha256(path)
    (note,) = (tmp_path / "cache" / "ditbench" / "hashes").iterdir()
    note.write_text(note.read_text().replace(before, "0" * 64))
    assert sha256(path) == before and len(read) == 2


def test_nothing_is_remembered_where_nothing_can_be_written(read, made, tmp_path):
    (tmp_path / "cache").write_text("a file")
    path = made(b"weights")
    assert sha256(path) == sha256(path) and len(read) == 2
