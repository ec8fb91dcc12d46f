"""Reference sets: the real images that a generated set is compared with, read when they are looked at."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ditbench.eval.base import Reference
from ditbench.eval.batches import READ, batches, remembered
from ditbench.eval.data import REFERENCE, names_of, need_file
from ditbench.eval.reference_files import folder_rows, npz_rows
from ditbench.harness.common.errors import UserError, unknown_name
from ditbench.harness.common.files import atomic_path
from ditbench.harness.samples.samples import Rows

DIGITS, MNIST = "digits-1797", "mnist-1000"
SHIPPED = (DIGITS, MNIST)


def load_reference(name_or_path: str | Path | None) -> Reference | None:
    """A known or fetched set by its name, an ADM-style .npz (`arr_0`: uint8 (N, H, W, 3)) or a folder of images; None for none.

    Every image is looked at once, for the set's hash, and read again by who needs it; an .npz stays where it is until then.

    Raises:
        UserError: there is none, or an image or the array cannot be used.
    """
    if name_or_path is None or str(name_or_path) in ("", "none"):
        return None
    if str(name_or_path) == DIGITS:
        return _digits()
    if str(name_or_path) == MNIST:
        return _mnist()
    path = Path(name_or_path)
    if str(path) in names_of(REFERENCE):
        path = need_file(str(path))
    if path.is_dir():
        return _reference(path.name, folder_rows(path))
    if path.is_file():
        return _reference(path.name, npz_rows(path))
    if len(path.parts) == 1 and not path.suffix:
        raise unknown_name("reference", str(name_or_path), (*SHIPPED, *names_of(REFERENCE)))
    raise UserError(
        f"{path}: no such file or folder; expected {' or '.join(SHIPPED)}, an .npz file or a folder of images"
    )


@cache
def _digits() -> Reference:
    """All 1,797 real digits, three equal channels, 16×16. Cached, so that their features are computed once."""
    from ditbench.harness.models.zoo import digits

    images_N1HW = digits.load("all").images_N1HW
    images_NHW = ((images_N1HW[:, 0] + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return _reference(DIGITS, images_NHW[..., None].repeat(1, 1, 1, 3))


@cache
def _mnist() -> Reference:
    """The 1,000 real MNIST digits, 100 a class, that small-dit was not trained on; 32×32. Cached as the digits are."""
    from ditbench.harness.models import zoo

    path = zoo.WEIGHTS / "small-dit" / zoo.REFERENCE
    if not path.exists():
        raise UserError(f"{path} is missing; reinstall ditbench or make it with `ditbench zoo train small-dit`")
    return _reference(MNIST, npz_rows(path)[:])


def _reference(name: str, images_NHWC: Rows) -> Reference:
    return Reference(name, images_NHWC, images_sha256(images_NHWC))


def images_sha256(images_NHWC: Rows) -> str:
    """Of all their bytes in order; computed once."""

    def of_all() -> str:
        digest = hashlib.sha256()
        for batch in batches(images_NHWC, READ):
            digest.update(batch.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    return remembered(images_NHWC, images_sha256, "sha256", of_all)


def write_reference(images_NHWC: Tensor, path: Path, *, compressed: bool = False) -> None:
    """An ADM-style .npz: `arr_0`, uint8 (N, H, W, 3), as ADM's evaluator and load_reference read it."""
    if images_NHWC.dtype != torch.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[-1] != 3:
        raise ValueError(
            f"{path}: expected uint8 images (N, H, W, 3), came {images_NHWC.dtype} {tuple(images_NHWC.shape)}"
        )
    with atomic_path(path) as part, part.open("wb") as file:
        (np.savez_compressed if compressed else np.savez)(file, arr_0=images_NHWC.cpu().numpy())
