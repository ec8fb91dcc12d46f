"""Rows on disk: read by rows only, written as they come; neither a recording nor its reader holds it."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ditbench.harness.calibration import on_disk
from ditbench.harness.calibration.on_disk import ChosenRows, Spool, StoredList, TensorFiles, stored
from ditbench.harness.calibration.recorder import Recorder, read
from ditbench.harness.calibration.recording import Calibration, selected
from ditbench.harness.common.artifacts import Damaged
from ditbench.harness.common.scratch import SCRATCH, Scratch


def kept(folder: Path, *tensors: Tensor):
    files = TensorFiles(folder)
    names = [files.keep(tensor) for tensor in tensors]
    files.flush()
    return [stored(folder, name, files.places[name]) for name in names]


@pytest.mark.parametrize("wanted", [slice(1, 4), slice(None), [2], [4, 0, 0, 3], []])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.complex64, torch.complex128, torch.bool]
)
def test_rows_are_those_of_the_tensor_that_was_kept(tmp_path, wanted, dtype):
    tensor = torch.arange(30).reshape(5, 3, 2).to(dtype)
    wanted = wanted if isinstance(wanted, slice) else torch.tensor(wanted, dtype=torch.int64)
    (on,) = kept(tmp_path, tensor)
    found = on[wanted]
    assert found.dtype == dtype and torch.equal(found, tensor[wanted])


def test_what_is_read_is_a_copy(tmp_path):
    (on,) = kept(tmp_path, torch.ones(3, 2))
    on[:].zero_()
    assert torch.equal(on[:], torch.ones(3, 2))


def test_a_list_has_rows_of_their_own_shapes(tmp_path):
    rows = [torch.full((size, 2), float(size)) for size in (1, 2, 3)]
    found = StoredList(kept(tmp_path, *rows))[torch.tensor([2, 0])]
    assert [tuple(row.shape) for row in found] == [(3, 2), (1, 2)]


def test_rows_chosen_from_several_parts_come_in_the_order_asked_for(tmp_path):
    parts = kept(tmp_path, torch.tensor([0, 1, 2]), torch.tensor([10, 11]))
    chosen = ChosenRows(parts, torch.tensor([1, 0, 1, 0]), torch.tensor([1, 2, 0, 2]))
    assert chosen[:].tolist() == [11, 2, 10, 2] and chosen[torch.tensor([3, 0])].tolist() == [2, 11]
    assert chosen[torch.tensor([], dtype=torch.int64)].shape == (0,)


def recorded(folder: Path, steps: int, batches: int, file_bytes: int = 4096) -> tuple[Recorder, int]:
    """(recorder, the most bytes that it held). A call has 8 rows of 32 floats: 1 KiB."""
    recorder, most = Recorder(steps, {"x": 0}, TensorFiles(folder, file_bytes)), 0
    for batch in range(batches):
        for step in range(steps):
            recorder(step, {"x": torch.full((8, 32), float(100 * step + batch))})
            most = max(most, recorder.files.held_bytes)
    recorder.finish()
    return recorder, most


def test_what_recording_holds_does_not_grow_with_steps_and_samples(tmp_path):
    for name, (steps, batches) in {"few": (5, 1), "many": (40, 6)}.items():
        (tmp_path / name).mkdir()
        _, most = recorded(tmp_path / name, steps, batches)
        assert most < 4096
    assert sum(path.stat().st_size for path in (tmp_path / "many").iterdir()) > 200 * 1024


class Reads:
    """Bytes that are read from files: at most at once, and in all."""

    def __init__(self, monkeypatch) -> None:
        self.most = self.all = 0
        for name in ("__getitem__", "whole"):
            monkeypatch.setattr(on_disk.StoredTensor, name, self.counted(getattr(on_disk.StoredTensor, name)))

    def counted(self, read):
        def counting(*arguments):
            found = read(*arguments)
            self.most, self.all = max(self.most, found.nbytes), self.all + found.nbytes
            return found

        return counting


def test_a_reader_reads_the_rows_it_asks_for_and_no_others(tmp_path, monkeypatch):
    recorded(tmp_path, steps=40, batches=6)
    reads = Reads(monkeypatch)
    calibration = Calibration(read(tmp_path)[0], "key")
    assert calibration.num_rows(3) == 48 and calibration.num_batches(8) == 240 and reads.all == 0
    (call,) = calibration.rows(3, 2)
    assert call["x"][:, 0].tolist() == [300, 305] and reads.all == 2 * 128
    step, call = next(calibration.batches(16, steps=[7]))
    assert call.num_rows == 16 and reads.all == 2 * 128 + 2 * 1024 and reads.most == 1024


def test_rows_that_a_method_selects_are_read_when_they_are_asked_for(tmp_path, monkeypatch):
    recorded(tmp_path, steps=4, batches=6)
    reads = Reads(monkeypatch)
    everything = Calibration(read(tmp_path)[0], "key")
    some = selected(everything, [torch.arange(48).flip(0)] * 4, "backwards")
    assert some.num_rows(0) == 48 and reads.all == 0
    assert [int(x) for x in next(some.batches(8))[1]["x"][:, 0]] == [5] * 8 and reads.all == 1024


def test_a_selection_has_the_key_of_its_rows(tmp_path):
    recorded(tmp_path, steps=1, batches=1)
    whole = Calibration(read(tmp_path)[0], "key")
    one, other = (selected(whole, [torch.tensor([row])], "one row") for row in (0, 1))
    assert len({whole.key, one.key, other.key}) == 3
    assert selected(one, [torch.tensor([0])], "again").whole == "key"


def test_a_file_of_the_spool_goes_with_the_last_that_refers_to_it(tmp_path):
    spool = Spool(tmp_path)
    first, second = spool.keep(torch.ones(2, 3)), spool.keep(torch.zeros(2, 3))
    assert torch.equal(first[:], torch.ones(2, 3))
    path = first.path
    del first
    gc.collect()
    assert not path.exists() and second.path.exists()
    folder = spool.scratch.folder
    del spool, second
    gc.collect()
    assert not folder.exists()


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_uses_is_not(tmp_path):
    mine = Scratch(tmp_path)
    left = tmp_path / SCRATCH / "of-a-dead-process"
    left.mkdir()
    (left / "0.safetensors").write_bytes(b"x")
    other = Scratch(tmp_path)
    assert not left.exists() and mine.folder.exists() and other.folder.exists()
    mine.remove(), other.remove()
    assert list((tmp_path / SCRATCH).iterdir()) == [] and list((tmp_path / "locks").iterdir()) == []


def test_a_file_that_is_written_to_while_it_is_read_is_named(tmp_path):
    files = TensorFiles(tmp_path)
    name = files.keep(torch.arange(6.0).reshape(3, 2))
    files.flush()
    kept = stored(tmp_path, name, files.places[name])
    assert kept[slice(1, 2)].tolist() == [[2.0, 3.0]]
    path = tmp_path / "0.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for read_it in (lambda: kept[slice(1, 2)], kept.whole):
        with pytest.raises(Damaged, match=r"0\.safetensors: changed while it was in use"):
            read_it()
