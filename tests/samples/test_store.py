"""The store of samples: written in pieces by one process or several, continued after a kill, read in batches."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import drawing
import numpy as np
import pytest
import torch
from drawing import draw_all, painted, process_that_draws, store_in
from PIL import Image

from ditbench.harness.common.artifacts import Address, Damaged, write_bytes
from ditbench.harness.samples.conditions import Conditions
from ditbench.harness.samples.samples import Prompt
from ditbench.harness.samples.store import for_each, found_store, open_store

N = 7  # three pieces of two, one of one


@pytest.fixture
def whole(tmp_path):
    store = store_in(tmp_path, N)
    draw_all(store, N)
    return store


def test_samples_are_read_as_they_were_drawn(whole):
    samples = whole.samples()
    expected = painted(tuple(range(N)))
    assert samples.pixels.shape == (N, 8, 8, 3) and samples.pixels.dtype == torch.uint8 and len(samples) == N
    assert [int(image[0, 0, 0]) for image in samples.pixels] == list(range(N))
    torch.testing.assert_close(torch.cat(list(samples.latents.split(3))), expected.latents)
    assert samples.labels_N.tolist() == [0, 1, 2, 0, 1, 2, 0] and samples.prompts == ()


@pytest.mark.parametrize("rows", [[6, 0, 3], [2], [], [-1]])
def test_any_rows_are_read_in_the_order_asked_for(whole, rows):
    expected = [range(N)[row] for row in rows]
    assert whole.samples().pixels[rows][:, 0, 0, 0].tolist() == expected
    assert whole.samples().pixels[torch.tensor(rows, dtype=torch.int64)][:, 0, 0, 0].tolist() == expected


def test_a_mask_a_slice_and_one_row_are_read(whole):
    pixels = whole.samples().pixels
    assert pixels[torch.arange(N) % 3 == 1][:, 0, 0, 0].tolist() == [1, 4]
    assert pixels[1:6:2][:, 0, 0, 0].tolist() == [1, 3, 5] and int(pixels[4][0, 0, 0]) == 4
    assert [len(batch) for batch in pixels.split(3)] == [3, 3, 1]


@pytest.mark.parametrize("shape", [(16, 24, 3), (5, 16, 24, 3), (3, 15, 17, 3)], ids=["image", "video", "odd video"])
def test_images_and_videos_are_kept_without_loss(tmp_path, shape):
    pixels = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prompts = tuple(Prompt(f"prompt {row}", {"tag": row}) for row in range(3))
    store = open_store(
        Address(tmp_path, "samples", "c" * 32, "noise"), Conditions((1, 2, 3), prompts=prompts), lambda: 2, False
    )
    for piece in store.missing():
        store.publish(piece, pixels[piece.rows.start : piece.rows.stop], None, 12.5)
    samples = store.samples()
    assert torch.equal(samples.pixels[:], pixels)
    assert samples.prompts == prompts and samples.latents is None and samples.fps == 12.5


def test_writing_a_piece_does_not_look_through_the_samples_that_are_there(tmp_path, monkeypatch):
    """It would take longer for each sample, the more there are."""
    store = store_in(tmp_path, N)
    looked, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path=".": looked.append(str(path)) or scandir(path))
    store.publish(store.pieces[1], torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.zeros(2, 2, 2, 2), 8.0)
    assert store.has(store.pieces[1]) and str(store.folder) not in looked


def test_who_fails_waits_for_the_other_thread_so_that_nobody_writes_on():
    done = []

    def write(item):
        if item == 0:
            raise OSError(errno.ENOSPC, "full")
        time.sleep(0.2)
        done.append(item)

    with pytest.raises(OSError, match="full"):
        for_each(write, [0, 1, 2, 3])
    assert done == [2, 3]


def test_a_disk_that_fills_up_leaves_no_half_of_a_file(tmp_path, monkeypatch):
    def half(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(tmp_path / "000000.webp", b"a picture")
    assert list(tmp_path.iterdir()) == []


def test_nobody_sees_half_of_a_file_while_it_is_written(tmp_path, monkeypatch):
    """Others read the folder meanwhile: an older file of that name stays whole until the new one is."""
    path, seen, write = tmp_path / "000000.webp", [], Path.write_bytes
    path.write_bytes(b"an older picture")
    monkeypatch.setattr(
        Path,
        "write_bytes",
        lambda part, content: (write(part, content[:4]), seen.append(path.read_bytes()), write(part, content)),
    )
    write_bytes(path, b"a newer picture")
    assert seen == [b"an older picture"] and path.read_bytes() == b"a newer picture"


def test_what_is_written_again_leaves_a_link_to_the_old_file_alone(tmp_path):
    """Folders are copied by links, and a file may be another user's."""
    path, copy = tmp_path / "000000.webp", tmp_path / "copy.webp"
    path.write_bytes(b"an older picture")
    os.link(path, copy)
    path.chmod(0o444)
    write_bytes(path, b"a newer picture")
    assert copy.read_bytes() == b"an older picture" and path.read_bytes() == b"a newer picture"


@pytest.mark.parametrize("moment", ["half of a file is written", "a file is whole but has no name", "all but the note"])
def test_a_kill_while_a_piece_is_written_leaves_nothing_that_counts_and_nothing_behind(tmp_path, moment):
    def killed_in_the_second_piece() -> None:
        store, write, take_name = store_in(tmp_path, N), Path.write_bytes, Path.replace

        def written(path: Path, content: bytes) -> None:
            if moment == "half of a file is written" and "000003" in path.name:
                write(path, content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, content)

        def named(path: Path, target: Path) -> None:
            if moment == "a file is whole but has no name" and target.name == "000003.webp":
                os.kill(os.getpid(), signal.SIGKILL)
            if moment == "all but the note" and target.name == "1.json":
                os.kill(os.getpid(), signal.SIGKILL)
            take_name(path, target)

        Path.write_bytes, Path.replace = written, named
        draw_all(store, N)

    process = multiprocessing.get_context("fork").Process(target=killed_in_the_second_piece)
    process.start()
    process.join(timeout=120)
    store = store_in(tmp_path, N)
    assert process.exitcode == -signal.SIGKILL and [piece.number for piece in store.missing()] == [1, 2, 3]
    assert all(
        Image.open(path).size == (8, 8) and np.array(Image.open(path)) is not None
        for path in store.folder.glob("*.webp")
    )
    draw_all(store, N)
    assert [int(image[0, 0, 0]) for image in store.samples().pixels] == list(range(N))
    assert list(store.folder.rglob("*.part")) == []


@pytest.mark.parametrize("name", ["000003.webp", "latents/1.safetensors"])
@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_file_cut_short_is_named_and_only_its_piece_drawn_again(whole, tmp_path, name, kept, capsys):
    """What a machine that lost its power may leave, though the note was written after it."""
    path = whole.folder / name
    os.truncate(path, int(path.stat().st_size * kept))
    with pytest.raises(Damaged, match=path.name):
        list(whole.samples().pixels), list(whole.samples().latents)
    log = tmp_path / "log"
    draw_all(whole, N, log)
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["1"]
    assert path.name in capsys.readouterr().err
    assert [int(image[0, 0, 0]) for image in whole.samples().pixels] == list(range(N))


def test_other_tools_read_it_without_us(whole):
    images = sorted(whole.folder.glob("*.webp"))
    assert len(images) == N and np.array(Image.open(images[5])).shape == (8, 8, 3)
    lines = [json.loads(line) for line in (whole.folder / "samples.jsonl").read_text().splitlines()]
    assert lines[5] == {"sample": 5, "label": 2, "prompt": None, "seed": 5}


def test_a_store_that_is_there_keeps_the_size_of_its_pieces(tmp_path, monkeypatch):
    store_in(tmp_path, N)
    monkeypatch.setattr(drawing, "PIECE", 5)
    assert [len(piece.rows) for piece in store_in(tmp_path, N).pieces] == [2, 2, 2, 1]


def test_a_piece_is_claimed_by_one_only_and_never_once_it_is_drawn(tmp_path):
    store, other = store_in(tmp_path, N), store_in(tmp_path, N)
    first = store.pieces[0]
    with store.claim(first) as ours, other.claim(first) as theirs:
        assert ours and not theirs
    with other.claim(first) as theirs:
        assert theirs, "it was given up without being drawn"
    draw_all(store, N)
    with other.claim(first) as theirs:
        assert not theirs


@pytest.mark.parametrize("name", ["000003.webp", "latents/1.safetensors", "pieces/1.json"])
def test_a_flipped_bit_is_named_and_only_its_piece_drawn_again(whole, tmp_path, name, capsys):
    path = whole.folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(Damaged, match=path.name):
        list(whole.samples().pixels), list(whole.samples().latents)
    log = tmp_path / "log"
    draw_all(whole, N, log)
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["1"]
    assert f"{path.name}" in capsys.readouterr().err
    assert [int(image[0, 0, 0]) for image in whole.samples().pixels] == list(range(N))


@pytest.mark.parametrize("name", ["store.json", "samples.jsonl"])
def test_a_damaged_index_is_named_and_written_again_and_the_pieces_stay(whole, tmp_path, name, capsys):
    (whole.folder / name).write_text("{")
    with pytest.raises(Damaged, match=name):
        found_store(whole.folder).samples()
    log = tmp_path / "log"
    draw_all(store_in(tmp_path, N), N, log)
    assert not log.exists() and name in capsys.readouterr().err


def test_an_index_written_again_in_pieces_of_another_size_pairs_no_sample_with_another(whole, tmp_path, monkeypatch):
    (whole.folder / "store.json").write_text("{")
    monkeypatch.setattr(drawing, "PIECE", 1)
    again = store_in(tmp_path, N)
    draw_all(again, N)
    assert [int(image[0, 0, 0]) for image in again.samples().pixels] == list(range(N))


def test_ten_kills_cost_at_most_a_piece_each(tmp_path):
    n, drawn = 60, random.Random(0)
    log = tmp_path / "log"
    log.touch()
    for _ in range(10):
        before = len(log.read_text().splitlines())
        process = process_that_draws(tmp_path, n, log)
        while len(log.read_text().splitlines()) < before + 2 and process.is_alive():
            time.sleep(0.01)
        time.sleep(drawn.uniform(0, drawing.SECONDS))
        process.kill()
        process.join()
    process = process_that_draws(tmp_path, n, log)
    process.join(timeout=120)
    assert process.exitcode == 0
    times = Counter(line.split()[0] for line in log.read_text().splitlines())
    assert len(times) == n // drawing.PIECE and sum(times.values()) <= n // drawing.PIECE + 10
    assert [int(image[0, 0, 0]) for image in store_in(tmp_path, n).samples().pixels] == list(range(n))
    assert list((tmp_path / "samples" / ("b" * 32)).glob("**/*.part*")) == []


@pytest.mark.parametrize("count", [2, 4])
def test_processes_that_draw_the_same_share_the_pieces(tmp_path, count):
    n = 40
    processes = [process_that_draws(tmp_path, n, tmp_path / "log") for _ in range(count)]
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * count
    drawn = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert Counter(piece for piece, _ in drawn) == {str(piece): 1 for piece in range(n // drawing.PIECE)}
    assert [int(image[0, 0, 0]) for image in store_in(tmp_path, n).samples().pixels] == list(range(n))
