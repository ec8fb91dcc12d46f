"""Reference sets: the real images that a generated set is compared with."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ditbench.eval.base import Reference
from ditbench.eval.data import REFERENCE, names_of, need_file
from ditbench.harness.common.errors import UserError, unknown_name
from ditbench.harness.common.files import atomic_path

IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
DIGITS = "digits-1797"


def load_reference(name_or_path: str | Path | None) -> Reference | None:
    """A known or fetched set by its name, an ADM-style .npz (`arr_0`: uint8 (N, H, W, 3)) or a folder of images; None for none."""
    if name_or_path is None or str(name_or_path) in ("", "none"):
        return None
    if str(name_or_path) == DIGITS:
        return _digits()
    path = Path(name_or_path)
    if str(path) in names_of(REFERENCE):
        path = need_file(str(path))
    if path.is_dir():
        return _reference(path.name, _read_folder(path))
    if path.is_file():
        return _reference(path.name, _read_npz(path))
    if len(path.parts) == 1 and not path.suffix:
        raise unknown_name("reference", str(name_or_path), (DIGITS, *names_of(REFERENCE)))
    raise UserError(f"{path}: no such file or folder; expected {DIGITS}, an .npz file or a folder of images")


@cache
def _digits() -> Reference:
    """All 1,797 real digits, three equal channels, 16×16. Cached, so that their features are computed once."""
    from ditbench.harness.models.zoo import digits

    images_N1HW = digits.load("all").images_N1HW
    images_NHW = ((images_N1HW[:, 0] + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return _reference(DIGITS, images_NHW[..., None].repeat(1, 1, 1, 3))


def _reference(name: str, images_NHWC: Tensor) -> Reference:
    return Reference(name, images_NHWC, images_sha256(images_NHWC))


def images_sha256(images_NHWC: Tensor) -> str:
    return hashlib.sha256(images_NHWC.cpu().contiguous().numpy().data).hexdigest()


def write_reference(images_NHWC: Tensor, path: Path) -> None:
    """An ADM-style .npz: `arr_0`, uint8 (N, H, W, 3), as ADM's evaluator and load_reference read it."""
    if images_NHWC.dtype != torch.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[-1] != 3:
        raise ValueError(
            f"{path}: expected uint8 images (N, H, W, 3), came {images_NHWC.dtype} {tuple(images_NHWC.shape)}"
        )
    with atomic_path(path) as part, part.open("wb") as file:
        np.savez(file, arr_0=images_NHWC.cpu().numpy())


def _read_npz(path: Path) -> Tensor:
    expected = "expected an ADM-style .npz with arr_0 of uint8 (N, H, W, 3)"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if "arr_0" not in getattr(arrays, "files", ()):
                raise UserError(f"{path}: {expected}, came the arrays {list(getattr(arrays, 'files', []))}")
            images = arrays["arr_0"]
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path}: {expected}, came {type(error).__name__}: {error}; fetch the file again or give another"
        ) from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) == 0:
        raise UserError(f"{path}: {expected}, came {images.dtype} {images.shape}; convert it to uint8 RGB, 0–255")
    return torch.from_numpy(images)


def _read_folder(path: Path) -> Tensor:
    """All images below path in the order of their relative names, as RGB; they must be of one size."""
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_ENDINGS)
    if not files:
        raise UserError(f"{path}: expected images ({', '.join(sorted(IMAGE_ENDINGS))}), came none; give another folder")
    images = [_read_image(file) for file in files]
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            raise UserError(
                f"{file}: expected {images[0].shape[:2]} like {files[0].name}, came {image.shape[:2]}; "
                "resize the images beforehand: how that is done moves FID, so it is not done here"
            )
    return torch.from_numpy(np.stack(images))


def _read_image(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as image:
            return np.array(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise UserError(f"{file}: expected an image, came {type(error).__name__}: {error}; replace it") from error
