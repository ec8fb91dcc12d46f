"""Image files of others as 8-bit RGB: exactly, or not at all.

How transparency is flattened, 16 bits are rounded or CMYK is printed is a choice, and it moves FID; none is made here.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ditbench.harness.common.errors import UserError
from ditbench.harness.samples.others import IMAGES

IMAGE_ENDINGS = set(IMAGES)
OTHER_ENDINGS = {
    ".avif",
    ".exr",
    ".gif",
    ".heic",
    ".jp2",
    ".jxl",
    ".pgm",
    ".ppm",
    ".tga",
    ".tif",
    ".tiff",
}  # images too
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # by content, whatever the name ends in
OPAQUE, WITH_ALPHA = ("1", "L", "P", "RGB"), ("LA", "PA", "RGBA")  # Pillow's modes of at most 8 bits a channel
PNG_DEPTH_AT = 24  # of the header: Pillow opens 16-bit RGB as mode RGB and drops the lower byte
BROKEN = (
    OSError,
    UnidentifiedImageError,
    SyntaxError,
    ValueError,
    TypeError,
    struct.error,
    Image.DecompressionBombError,
)


def read_rgb(file: Path) -> np.ndarray:
    """uint8 (H, W, 3): grey as three equal channels, a palette's colours, turned as EXIF's orientation says.

    Alpha that is 255 everywhere is dropped. Colour profiles are not applied, as torch-fidelity and clean-fid do not. Of a JPEG with
    several pictures (MPO: a phone's, with depth or gain map) the first is taken, as every viewer does.

    Raises:
        UserError: it is no image, or one with transparency, more than 8 bits a channel, several frames, or in CMYK or another space.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if problem := _problem(image, file):
                raise UserError(
                    f"{file}: expected grey, RGB or palette of 8 bits without transparency, came {problem}; "
                    "convert it to 8-bit RGB beforehand: how that is done moves FID, so it is not done here"
                )
            upright = ImageOps.exif_transpose(image)
            if upright.mode == "P":
                upright = upright.convert("RGBA")  # of a palette with alpha Pillow warns if it goes to RGB at once
            return np.array(upright.convert("RGB"))
    except BROKEN as error:
        raise UserError(f"{file}: expected an image, came {type(error).__name__}: {error}; replace it") from error


def _problem(image: Image.Image, file: Path) -> str | None:
    """What of an opened image is no 8-bit RGB, or None."""
    if image.format == "PNG" and (bits := _png_depth(file)) > 8:
        return f"{bits} bits a channel (mode {image.mode})"
    if image.mode not in OPAQUE + WITH_ALPHA:
        return f"mode {image.mode}"
    if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
        return f"{frames} frames (mode {image.mode})"
    if image.mode in WITH_ALPHA or "transparency" in image.info:
        least, _ = image.convert("RGBA").getchannel("A").getextrema()
        if least < 255:
            return f"alpha down to {least} of 255 (mode {image.mode})"
    return None


def _png_depth(file: Path) -> int:
    with file.open("rb") as content:
        return content.read(PNG_DEPTH_AT + 1)[PNG_DEPTH_AT]
