"""Samples that somebody else drew: which file of a folder shows what the run asks for.

    FOLDER/…/*.png, *.mp4     images or videos, in subfolders too
    FOLDER/samples.jsonl      if it is there, a line a sample: {"file": "a.png", "prompt": "a red cube"} or {"file": "a.png", "label": 3},
                              and "seed", where the noise is that of the run (`samples/seeds.py`)

Without samples.jsonl the files, in the order of their names, are the run's samples in their order.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ditbench.harness.common.errors import UserError
from ditbench.harness.samples.conditions import Conditions
from ditbench.harness.samples.noise import GIVEN

LINES = "samples.jsonl"
IMAGES, VIDEOS = (".png", ".jpg", ".jpeg", ".webp", ".bmp"), (".mp4", ".mkv", ".webm")
EXPECTED = 'expected {"file": …} with "prompt": text or "label": a number, and perhaps "seed": a number'


@dataclass(frozen=True)
class Given:
    """seed: of the run's noise, None where it is not known."""

    file: Path
    seed: int | None = None


def files_in(folder: Path) -> list[Path]:
    """All images and videos below a folder, in the order of their relative names."""
    files = [path for path in folder.rglob("*") if path.suffix.lower() in IMAGES + VIDEOS and path.is_file()]
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def given(folder: Path, wanted: Conditions) -> list[Given]:
    """The file of every sample that is wanted, in that order.

    Raises:
        UserError: a line of samples.jsonl is none, a prompt or label has too few samples, or, without samples.jsonl, the folder has
            another number of files than samples are wanted.
    """
    if (folder / LINES).is_file():
        return _by_lines(folder, wanted)
    files = files_in(folder)
    if len(files) != len(wanted):
        raise UserError(
            f"{folder}: expected {len(wanted):,} images or videos, the run's samples in order, came {len(files):,}; "
            f"set protocol.n={len(files)}, or say in {LINES} what each file shows"
        )
    return [Given(file) for file in files]


def _by_lines(folder: Path, wanted: Conditions) -> list[Given]:
    """Of several samples of one prompt or label the first is taken first; one with the wanted seed goes before all."""
    shows: dict[str | int, deque[Given]] = defaultdict(deque)
    for number, text in enumerate((folder / LINES).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        what, each = _line(folder, text, f"{folder / LINES}, line {number}")
        shows[what].append(each)
    found = []
    for row, seed in enumerate(wanted.seeds):
        what = wanted.prompts[row].text if wanted.prompts else int(wanted.labels_N[row])  # type: ignore[index]
        left = shows[what]
        if not left:
            raise UserError(f"{folder / LINES}: no sample is left for sample {row} of the run, {what!r}")
        chosen = next((each for each in left if each.seed == seed), left[0])
        left.remove(chosen)
        is_ours = chosen.seed == seed and wanted.noise.kind != GIVEN  # a file's latents have no seed
        found.append(chosen if is_ours else Given(chosen.file))
    return found


def _line(folder: Path, text: str, at: str) -> tuple[str | int, Given]:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        line = None
    if not isinstance(line, dict) or not isinstance(line.get("file"), str):
        raise UserError(f"{at}: {EXPECTED}, came {text[:60]!r}")
    what, seed = line.get("prompt", line.get("label")), line.get("seed")
    if not (isinstance(what, str) or _is_whole(what)) or not (seed is None or _is_whole(seed)):
        raise UserError(f"{at}: {EXPECTED}, came {text[:60]!r}")
    name = PurePosixPath(line["file"])
    file = folder / name
    if name.is_absolute() or ".." in name.parts or "\0" in line["file"] or not file.is_file():
        raise UserError(f"{at}: no file {line['file']!r} in {folder}")
    return what, Given(file, seed)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
