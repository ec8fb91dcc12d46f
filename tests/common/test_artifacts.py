"""Artifacts are made once, whoever needs them, and are checked when they are read."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from ditbench.harness.common import artifacts
from ditbench.harness.common.artifacts import Address, claimed, obtain
from ditbench.harness.common.errors import UserError


@pytest.fixture
def address(tmp_path):
    return Address(tmp_path / "cache", "number", "a" * 32, "a number")


class Maker:
    """Counts how often it made the value."""

    def __init__(self, value: int = 7) -> None:
        self.value, self.made = value, 0

    def get(self, address: Address | None, **more) -> int:
        return obtain(address, self._make, self._write, self._read, **more).value

    def _make(self) -> int:
        self.made += 1
        return self.value

    @staticmethod
    def _write(value: int, folder: Path) -> None:
        (folder / "number.txt").write_text(str(value))

    @staticmethod
    def _read(folder: Path) -> int:
        return int((folder / "number.txt").read_text())


def test_what_was_made_is_read_and_says_what_it_cost(address):
    maker = Maker()
    assert maker.get(address) == maker.get(address) == 7 and maker.made == 1
    manifest = json.loads((address.folder / "manifest.json").read_text())
    assert manifest["title"] == "a number" and manifest["seconds"] >= 0 and list(manifest["files"]) == ["number.txt"]
    assert obtain(address, maker._make, maker._write, maker._read).saved_s == manifest["seconds"]


def test_without_an_address_nothing_is_kept():
    maker = Maker()
    assert maker.get(None) == maker.get(None) == 7 and maker.made == 2


@pytest.mark.parametrize("file", ["number.txt", "manifest.json"])
def test_one_flipped_bit_is_named_and_the_artifact_made_again(address, file, capsys):
    Maker().get(address)
    path = address.folder / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    maker = Maker()
    assert maker.get(address) == 7 and maker.made == 1
    assert str(path) in capsys.readouterr().err
    assert maker.get(address) == 7 and maker.made == 1, "what was made in its place is whole"


@pytest.mark.parametrize("file", ["number.txt", "manifest.json"])
def test_what_lacks_a_file_is_made_again(address, file, capsys):
    Maker().get(address)
    (address.folder / file).unlink()
    maker = Maker()
    assert maker.get(address) == 7 and maker.made == 1 and str(address.folder) in capsys.readouterr().err


def test_a_value_that_is_not_worth_keeping_is_made_again(address):
    maker = Maker()
    assert maker.get(address, keep=lambda value: value > 7) == 7 and not address.folder.exists()


def test_a_failure_leaves_nothing(address):
    def fail() -> int:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        obtain(address, fail, Maker._write, Maker._read)
    assert [path for path in address.cache.rglob("*") if path.is_file()] == []


def test_what_an_interrupt_left_is_removed_by_the_next(address):
    stale = address.folder.parent / f".{address.key}.dead.part"
    stale.mkdir(parents=True)
    Maker().get(address)
    assert [path.name for path in address.folder.parent.iterdir()] == [address.key]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_is_named_before_anything_is_made(address):
    address.cache.mkdir()
    address.cache.chmod(0o500)
    maker = Maker()
    with pytest.raises(UserError, match="cache.*cannot be written"):
        maker.get(address)
    assert maker.made == 0


def test_a_cache_on_a_file_system_that_is_read_only_is_named(address, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    maker = Maker()
    with pytest.raises(UserError, match="cache .*Read-only file system.*cache_dir"):
        maker.get(address)
    assert maker.made == 0


def test_a_full_disk_costs_the_copy_and_not_the_value(address, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts, "write_manifest", full)
    assert Maker().get(address) == 7
    assert "a number is not kept (No space left on device)" in capsys.readouterr().err
    assert not address.folder.exists() and list(address.folder.parent.iterdir()) == []


def forked(target) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


def test_four_processes_that_need_the_same_make_it_once(address, tmp_path):
    log = tmp_path / "log"

    def slowly() -> int:
        with log.open("a") as file:
            file.write("made\n")
        time.sleep(0.3)
        return 7

    def ask() -> None:
        assert obtain(address, slowly, Maker._write, Maker._read).value == 7

    processes = [forked(ask) for _ in range(4)]
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 4 and log.read_text() == "made\n"
    assert list((address.cache / "locks").iterdir()) == []


def test_the_claim_of_a_killed_process_ends_with_it(address, tmp_path):
    def hold() -> None:
        with claimed(address):
            (tmp_path / "held").touch()
            time.sleep(600)

    process = forked(hold)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    start = time.monotonic()
    assert Maker().get(address) == 7 and time.monotonic() - start < 30
