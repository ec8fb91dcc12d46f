"""The store of samples: a folder that is filled piece by piece, by one process or by several, and read in batches.

    <cache>/samples/<key>/store.json      what is asked for: n, rows of a piece, kind of files, whether latents are kept
    <cache>/samples/<key>/samples.jsonl   one line a sample: its file, label or prompt, seed
    <cache>/samples/<key>/000000.webp     one image a sample, lossless; a video is 000000.mkv, H.264 without loss in RGB
    <cache>/samples/<key>/latents/0.safetensors   of a piece, where latents are kept
    <cache>/samples/<key>/pieces/0.json   a piece is drawn: size and SHA-256 of its files, the batch it was drawn in, seconds

A piece counts once its own .json is there, which is written last. Who draws it holds its claim, which ends with the process. Files
are checked against their SHA-256 as they are read; a piece with a damaged file is named, and drawn again by the next run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import Timeout
from safetensors.torch import load, save
from torch import Tensor

from ditbench.harness.common.artifacts import (
    FORMAT,
    Address,
    Damaged,
    check,
    check_bytes,
    claimed,
    lock_of,
    manifest_content,
    read_manifest,
    write_bytes,
)
from ditbench.harness.common.watch import say
from ditbench.harness.samples.conditions import Conditions
from ditbench.harness.samples.pixels import ENDINGS, decoded, encoded
from ditbench.harness.samples.rows_on_disk import RowsOnDisk
from ditbench.harness.samples.samples import Prompt, Samples

T = TypeVar("T")
R = TypeVar("R")
KIND = "samples"
INDEX, LINES, PIECES, LATENTS = "store.json", "samples.jsonl", "pieces", "latents"
THREADS = 2  # that encode and decode at once


@cache
def threads(process: int) -> ThreadPoolExecutor:
    """One pool for all pieces of a process: new threads for each would leave memory of their own behind, piece by piece."""
    return ThreadPoolExecutor(THREADS)


def for_each(do: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """What `do` gives of each, in their order. Each thread takes its share at once: to hand over a small image takes longer
    than to read it. An error is raised when all threads have come to an end.
    """
    size = max(1, -(-len(items) // THREADS))
    shares = [items[start : start + size] for start in range(0, len(items), size)]
    pool = threads(os.getpid())
    done = [pool.submit(lambda share=share: [do(item) for item in share]) for share in shares]
    try:
        return [given for share in done for given in share.result()]
    finally:
        wait(done)  # where one failed: nobody writes on when the claim is given up


@dataclass(frozen=True)
class Piece:
    number: int
    rows: range


class SampleStore:
    """Made or continued by `open_store`; `found_store` is for readers."""

    def __init__(self, folder: Path, index: Mapping[str, Any], lock_folder: Path) -> None:
        self.folder, self.index, self._cache = folder, index, lock_folder

    def __len__(self) -> int:
        return int(self.index["n"])

    @property
    def key(self) -> str:
        return self.folder.name

    @property
    def pieces(self) -> list[Piece]:
        return [self.piece(number) for number in range(-(-len(self) // self.index["piece"]))]

    def piece(self, number: int) -> Piece:
        start = number * self.index["piece"]
        return Piece(number, range(start, min(start + self.index["piece"], len(self))))

    @property
    def lines_file(self) -> str:
        return LINES

    def has(self, piece: Piece) -> bool:
        return self._note(piece).exists()

    def missing(self) -> list[Piece]:
        return [piece for piece in self.pieces if not self.has(piece)]

    @contextmanager
    def claim(self, piece: Piece) -> Iterator[bool]:
        """Whether the piece is ours to draw: nobody else draws it, and nobody has."""
        lock = lock_of(self._cache, f"{KIND}-{self.key}-{piece.number}")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield not self.has(piece)
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    def publish(self, piece: Piece, pixels_N: Tensor, latents_N: Tensor | None, fps: float, **how: Any) -> None:
        """Write the piece's samples, then its note. pixels_N: uint8, images (B, H, W, 3) or videos (B, F, H, W, 3), on the CPU.

        how: what else its note says of how it was drawn, such as batch and seconds.
        """
        kind = "video" if pixels_N.ndim == 5 else "image"

        def write(place: int) -> tuple[str, dict[str, Any]]:
            name = f"{piece.rows[place]:06d}{ENDINGS[kind]}"
            return name, write_bytes(self.folder / name, encoded(pixels_N[place], fps))

        files = dict(for_each(write, range(len(pixels_N))))
        if self.index["latents"]:
            assert latents_N is not None
            name = f"{LATENTS}/{piece.number}.safetensors"
            (self.folder / LATENTS).mkdir(exist_ok=True)
            files[name] = write_bytes(self.folder / name, save({"latents": latents_N.float().contiguous()}))
        note = self._note(piece)
        note.parent.mkdir(exist_ok=True)
        shape = list(pixels_N.shape[1:])
        latent_shape = None if latents_N is None else list(latents_N.shape[1:])
        values = {"format": FORMAT, "shape": shape, "latent_shape": latent_shape, "fps": fps} | how | {"files": files}
        write_bytes(note, manifest_content(values))

    def note(self, piece: Piece) -> dict[str, Any]:
        """What is written of a drawn piece. Raises Damaged."""
        return read_manifest(self._note(piece))

    def drop_damaged(self) -> int:
        """Take back every piece that is not what was written, and say which file it was; how many."""
        dropped = 0
        for piece in self.pieces:
            try:
                for name, entry in self.note(piece)["files"].items():
                    check(self.folder / name, entry)
            except FileNotFoundError:
                continue
            except Damaged as damage:
                say(f"{damage}; samples {piece.rows.start}–{piece.rows.stop - 1} are drawn again")
                self._note(piece).unlink(missing_ok=True)
                dropped += 1
        return dropped

    def samples(self) -> Samples:
        """All of them, read when they are asked for.

        Raises:
            FileNotFoundError: a piece is not drawn yet. Damaged: the index is.
        """
        first = self.note(self.pieces[0])
        lines = self._lines()
        labels = [line["label"] for line in lines]
        return Samples(
            StoredRows(self, tuple(first["shape"]), torch.uint8, self._pixels_of),
            None if labels[0] is None else torch.tensor(labels),
            StoredRows(self, tuple(first["latent_shape"]), torch.float32, self._latents_of)
            if self.index["latents"]
            else None,
            tuple(Prompt(**line["prompt"]) for line in lines) if lines[0]["prompt"] is not None else (),
            first["fps"],
            tuple(line["seed"] for line in lines),
        )

    def of(self, piece: Piece) -> Samples:
        """Those of one drawn piece, in memory."""
        note, lines = self.note(piece), self._lines()[piece.rows.start : piece.rows.stop]
        return Samples(
            self._pixels_of(piece, piece.rows),
            None if lines[0]["label"] is None else torch.tensor([line["label"] for line in lines]),
            self._latents_of(piece, piece.rows) if self.index["latents"] else None,
            tuple(Prompt(**line["prompt"]) for line in lines) if lines[0]["prompt"] is not None else (),
            note["fps"],
        )

    def content_of(self, row: int) -> bytes:
        """The file of one sample, as it was written: a lossless WebP, or a video.

        Raises:
            FileNotFoundError: its piece is not drawn, or the file is gone. Damaged: it is not what was written.
        """
        piece = self.piece(row // self.index["piece"])
        name = next(name for name in self.note(piece)["files"] if name.startswith(f"{row:06d}."))
        return check_bytes(self.folder / name, self.note(piece)["files"][name])

    def about(self) -> list[dict[str, Any]]:
        """Of every sample its label or prompt, and its seed. Raises Damaged."""
        return self._lines()

    def _lines(self) -> list[dict[str, Any]]:
        content = check_bytes(self.folder / LINES, self.index["lines"])
        return [json.loads(line) for line in content.decode().splitlines()]

    def _note(self, piece: Piece) -> Path:
        return self.folder / PIECES / f"{piece.number}.json"

    def _pixels_of(self, piece: Piece, rows: Sequence[int]) -> Tensor:
        files = [(name, entry) for name, entry in self.note(piece)["files"].items() if not name.startswith(LATENTS)]

        def read(row: int) -> Tensor:
            name, entry = files[row - piece.rows.start]
            return decoded(check_bytes(self.folder / name, entry), self.folder / name)

        return torch.stack(for_each(read, rows))

    def _latents_of(self, piece: Piece, rows: Sequence[int]) -> Tensor:
        name = f"{LATENTS}/{piece.number}.safetensors"
        latents_N = load(check_bytes(self.folder / name, self.note(piece)["files"][name]))["latents"]
        return latents_N[[row - piece.rows.start for row in rows]]


class StoredRows(RowsOnDisk):
    """Rows of a store, read piece by piece: uint8 pixels or float32 latents."""

    def __init__(
        self,
        store: SampleStore,
        shape: Sequence[int],
        dtype: torch.dtype,
        read_piece: Callable[[Piece, Sequence[int]], Tensor],
    ) -> None:
        self.store, size = store, store.index["piece"]

        def read(rows: Sequence[int]) -> Tensor:
            of_pieces = groupby(rows, lambda row: row // size)
            return torch.cat([read_piece(store.piece(number), list(its_rows)) for number, its_rows in of_pieces])

        super().__init__((len(store), *shape), dtype, read, at_once=size)


def open_store(
    address: Address,
    wanted: Conditions,
    piece: Callable[[], int],
    latents: bool,
    seeds: Sequence[int | None] | None = None,
) -> SampleStore:
    """The store at that address, made if it is not there, in pieces of so many rows; one that is there keeps the size of its own.

    seeds: of the noise, if it is not all as wanted; None where it is not known.

    Raises:
        UserError: it is not there and the cache cannot be written.
    """
    index = address.folder / INDEX
    if not _whole(index):
        with claimed(address):
            if not _whole(index):
                address.folder.mkdir(parents=True, exist_ok=True)
                lines = "".join(
                    json.dumps(line) + "\n" for line in _described(wanted, wanted.seeds if seeds is None else seeds)
                )
                values = {"format": FORMAT, "kind": KIND, "key": address.key, "title": address.title, "n": len(wanted)}
                values |= {"made_from": dict(address.made_from), "piece": piece(), "latents": latents}
                values |= {"lines": write_bytes(address.folder / LINES, lines.encode())}
                _drop_other_pieces(address.folder, values["piece"], len(wanted))
                write_bytes(index, manifest_content(values))
    return found_store(address.folder, address.cache)


def _drop_other_pieces(folder: Path, size: int, n: int) -> None:
    """Notes of pieces that were drawn in another size, before the index was damaged: by their rows they would pair samples wrongly."""
    for note in (folder / PIECES).glob("*.json"):
        try:
            rows = {int(name[:6]) for name in json.loads(note.read_text())["files"] if not name.startswith(LATENTS)}
        except (ValueError, LookupError, TypeError):
            rows = set()
        first = int(note.stem) * size
        if rows != set(range(first, min(first + size, n))):
            note.unlink(missing_ok=True)


def found_store(folder: Path, cache: Path | None = None) -> SampleStore:
    """A store that is there. Raises FileNotFoundError, Damaged."""
    return SampleStore(folder, read_manifest(folder / INDEX), cache or folder.parents[1])


def _whole(index: Path) -> bool:
    try:
        values = read_manifest(index)
        check(index.parent / LINES, values["lines"])
        return True
    except FileNotFoundError:
        return False
    except Damaged as damage:
        say(f"{damage}; written again")
        return False


def _described(wanted: Conditions, seeds: Sequence[int | None]) -> Iterator[dict[str, Any]]:
    for row, seed in enumerate(seeds):
        label = None if wanted.labels_N is None else int(wanted.labels_N[row])
        prompt = asdict(wanted.prompts[row]) if wanted.prompts else None
        yield {"sample": row, "label": label, "prompt": prompt, "seed": seed}
