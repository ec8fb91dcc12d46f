"""What is drawn and scored: prompts, and the images or videos that came of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

FPS = 8.0  # frames per second of videos


class OtherKind(Exception):
    """Images were asked for where there are videos, or the other way round; a metric of them is skipped with this reason."""


class Rows(Protocol):
    """Values of samples, one row each, read some at a time: a tensor, or rows of a store on disk (`samples/store.py`)."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def ndim(self) -> int: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Tensor]: ...

    def __getitem__(self, wanted: int | slice | Sequence[int] | Tensor) -> Tensor: ...

    def split(self, size: int) -> Iterable[Tensor]: ...


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file: the text, and what else the file says of it (GenEval's tag and include, VBench's dimension)."""

    text: str
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Samples:
    """What was generated, in memory or on disk: whoever reads them takes batches of rows, never the set.

    pixels: uint8 0–255, images (N, H, W, 3) or videos (N, F, H, W, 3). labels_N: int64. latents: float32 (N, …).
    prompts: one per sample, or none. fps: frames per second of videos. seeds: of each sample's noise, None where it is not known; () if
    nobody noted them.
    """

    pixels: Rows
    labels_N: Tensor | None = None
    latents: Rows | None = None
    prompts: tuple[Prompt, ...] = ()
    fps: float = FPS
    seeds: tuple[int | None, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def is_video(self) -> bool:
        return self.pixels.ndim == 5

    @property
    def images_NHWC(self) -> Rows:
        """Raises OtherKind: these are videos."""
        if self.is_video:
            raise OtherKind("a metric of images; these are videos")
        return self.pixels

    @property
    def videos_NFHWC(self) -> Rows:
        """Raises OtherKind: these are images, or videos of one frame."""
        if not self.is_video or self.pixels.shape[1] < 2:
            raise OtherKind("a metric of videos; these are images" if not self.is_video else "videos of one frame")
        return self.pixels
