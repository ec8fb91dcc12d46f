"""Samples as files that other programs open, without loss: WebP images, and videos of H.264 in RGB."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ditbench.harness.common.artifacts import Damaged

IMAGE = "WEBP"
ENDINGS = {"image": ".webp", "video": ".mkv"}
# Of photographs a sixth less than PNG, in half the time (quality is effort here: more of it saves another twentieth in seven times).
LOSSLESS_IMAGE = {"lossless": True, "quality": 0, "method": 2, "exact": True}
LOSSLESS_VIDEO = {
    "qp": "0",
    "preset": "slow",
}  # of libx264rgb; of camera moves over photographs a quarter of raw frames


def encoded(pixels: Tensor, fps: float) -> bytes:
    """One sample, uint8, as a file: an image (H, W, 3) or a video (F, H, W, 3)."""
    content = io.BytesIO()
    if pixels.ndim == 3:
        Image.fromarray(pixels.numpy()).save(content, format=IMAGE, **LOSSLESS_IMAGE)
        return content.getvalue()
    import av  # only where there are videos

    with av.open(content, "w", format="matroska") as file:
        stream = file.add_stream("libx264rgb", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt, stream.options = *pixels.shape[1:3], "rgb24", LOSSLESS_VIDEO
        for frame in pixels.numpy():
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return content.getvalue()


def decoded(content: bytes, path: Path) -> Tensor:
    """The sample that a file holds, as it was. path: named if it cannot be read.

    Raises:
        Damaged: it is no such file.
    """
    try:
        return _image(content) if path.suffix == ENDINGS["image"] else frames(content)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise Damaged(f"{path}: cannot be read ({type(error).__name__})") from error


def _image(content: bytes) -> Tensor:
    with Image.open(io.BytesIO(content), formats=[IMAGE]) as image:  # else Pillow asks every format that it knows
        return torch.from_numpy(np.array(image))


def frames(content: bytes) -> Tensor:
    """uint8 (F, H, W, 3) of whatever video PyAV reads. Raises ValueError, OSError: it reads none."""
    import av

    try:
        with av.open(io.BytesIO(content)) as file:
            return torch.from_numpy(np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]))
    except av.FFmpegError as error:  # some of them are nothing that Python knows
        raise ValueError(str(error)) from error
