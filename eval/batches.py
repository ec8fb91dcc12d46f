"""Samples a few at a time: as many as a metric can work on within BYTES, whatever their size and however many there are.

A metric says what it holds while it works, in bytes for each of a sample's values: 4 for one copy in float32, 8 in float64,
with the uint8 pixels themselves. A sample that takes more than BYTES by itself is looked at alone; long videos frame by frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ditbench.harness.samples.samples import Rows, Samples

BYTES = 2**28  # 256 MiB
READ = 8  # an eighth of BYTES is read at once where a batch is only passed through: a store reads and joins, which takes twice that
BATCH = 512  # samples or frames at once, however small they are

_outputs: WeakIdKeyDictionary = WeakIdKeyDictionary()  # rows → {network: {output's name: (version, output)}}


def together(rows: Rows, held: int, most: int = BATCH) -> int:
    """How many rows are worked on at once where `held` bytes are held for each of their values; `most` at most, one at least."""
    return max(1, min(most, BYTES // (held * max(1, rows.shape[1:].numel()))))


def batches(rows: Rows, held: int, most: int = BATCH) -> Iterator[Tensor]:
    """Rows in order, `together` at a time."""
    yield from rows.split(together(rows, held, most))


def one_by_one(rows: Rows) -> Iterator[Tensor]:
    """One row after the other."""
    for batch in batches(rows, READ * rows.dtype.itemsize):
        yield from batch


def frames(pixels_N: Rows, held: int, most: int = BATCH) -> Iterator[Tensor]:
    """Images, or the frames of all videos, in order: (B, H, W, 3). Videos are read whole, one at least."""
    frame = pixels_N.shape[-3:]
    per_sample = pixels_N.shape[1:-3].numel()
    at_once = max(1, min(most, BYTES // (held * frame.numel())))
    waiting = torch.zeros((0, *frame), dtype=pixels_N.dtype)
    for samples in pixels_N.split(max(1, at_once // per_sample)):
        read = samples.reshape(-1, *frame)
        waiting = torch.cat([waiting, read]) if len(waiting) else read
        whole = len(waiting) - len(waiting) % at_once
        yield from waiting[:whole].split(at_once) if whole else ()
        waiting = waiting[whole:]
    if len(waiting):
        yield waiting


def neighbours(video_FHWC: Tensor, held: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Frames (P, H, W, 3) and those that follow them, as many pairs at a time as fit."""
    before, after = video_FHWC[:-1], video_FHWC[1:]
    at_once = together(video_FHWC, held)
    yield from zip(before.split(at_once), after.split(at_once), strict=True)


def remembered(rows: Rows, network: object, name: str, compute: Callable[[], Any]) -> Any:
    """compute() without gradients, unless this network's output of these very rows is known already.

    Known by the identity of both, and forgotten with them; a tensor changed in place is looked at anew.

    Raises:
        ValueError: the output has NaN or infinity, which a comparison further on would make a number of.
    """
    by_name = _outputs.setdefault(rows, WeakIdKeyDictionary()).setdefault(network, {})
    counts = isinstance(rows, Tensor) and not rows.is_inference()  # inference tensors do not count their changes
    now = rows._version if counts else 0  # type: ignore[attr-defined]
    version, output = by_name.get(name, (None, None))
    if version != now:
        with torch.no_grad():
            output = compute()
        for part in output if isinstance(output, tuple) else (output,):
            if isinstance(part, Tensor) and not bool(part.isfinite().all()):
                raise ValueError(f"NaN or infinity in what a network makes of the samples ({name})")
        by_name[name] = (now, output)
    return output


def diverged(samples: Samples | None) -> list[int]:
    """The samples whose latents are not finite, as far as latents are kept: their pixels are no picture."""
    if samples is None or samples.latents is None:
        return []
    latents = samples.latents

    def whole_N() -> Tensor:
        return torch.cat([batch.isfinite().flatten(1).all(dim=1) for batch in batches(latents, READ * 4)])

    return (~remembered(latents, diverged, "finite", whole_N)).nonzero().flatten().tolist()
