"""Images of a folder or of an .npz file as rows that are read when they are asked for; nothing holds the set."""

from __future__ import annotations

import math
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from ditbench.eval.image_files import IMAGE_ENDINGS, OTHER_ENDINGS, read_rgb
from ditbench.harness.common.errors import UserError
from ditbench.harness.samples.rows_on_disk import RowsOnDisk

MEMBER = "arr_0.npy"
THREADS = 4  # that decode at once
EXPECTED = "expected an ADM-style .npz with arr_0 of uint8 (N, H, W, 3)"


def folder_rows(path: Path) -> RowsOnDisk:
    """All images below path in the order of their relative names, as RGB; they must be of one size.

    Raises:
        UserError: there are none, or images of other kinds among them. On reading: one is no image that `read_rgb` takes, or of another size than the first.
    """
    everything = sorted(path.rglob("*"))
    if other := next((file for file in everything if file.suffix.lower() in OTHER_ENDINGS), None):
        raise UserError(
            f"{other}: expected images of {', '.join(sorted(IMAGE_ENDINGS))} only, came another kind; "
            "convert it to 8-bit RGB or take it away: leaving it out would be another reference set"
        )
    files = [file for file in everything if file.suffix.lower() in IMAGE_ENDINGS]
    if not files:
        raise UserError(f"{path}: expected images ({', '.join(sorted(IMAGE_ENDINGS))}), came none; give another folder")
    shape = read_rgb(files[0]).shape

    def read_one(row: int) -> Tensor:
        image = read_rgb(files[row])
        if image.shape != shape:
            raise UserError(
                f"{files[row]}: expected {shape[:2]} like {files[0].name}, came {image.shape[:2]}; "
                "resize the images beforehand: how that is done moves FID, so it is not done here"
            )
        return torch.from_numpy(image)

    def read(rows: Sequence[int]) -> Tensor:
        with ThreadPoolExecutor(THREADS) as pool:
            return torch.stack(list(pool.map(read_one, rows)))

    return RowsOnDisk((len(files), *shape), torch.uint8, read)


def npz_rows(path: Path) -> RowsOnDisk:
    """The images of an ADM-style .npz, as its bytes lie in the file; a compressed one is unpacked into a temporary file first.

    Raises:
        UserError: it is no such file, or not whole (its checksum is looked at here).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if MEMBER not in archive.namelist():
                raise UserError(f"{path}: {EXPECTED}, came the arrays {[Path(n).stem for n in archive.namelist()]}")
            member = archive.getinfo(MEMBER)
            with archive.open(member) as stream:
                shape, header_bytes = _images_at(stream, path)
                if header_bytes + math.prod(shape) != member.file_size:
                    raise ValueError(f"{member.file_size - header_bytes} bytes for an array of {shape}")
                if member.compress_type == zipfile.ZIP_STORED:
                    while stream.read(2**24):  # to its end, where the checksum is compared
                        pass
                    return _mapped(path, _data_offset(path, member) + header_bytes, shape)
                with tempfile.TemporaryFile() as unpacked:  # gone once nothing is mapped from it
                    shutil.copyfileobj(stream, unpacked, 2**24)
                    return _mapped(unpacked, 0, shape)
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path}: {EXPECTED}, came {type(error).__name__}: {error}; fetch the file again or give another"
        ) from error


def _images_at(stream: IO[bytes], path: Path) -> tuple[tuple[int, ...], int]:
    """Shape of the array whose .npy begins here, and the bytes of its header."""
    version = np.lib.format.read_magic(stream)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = read_header[version](stream) if version in read_header else ((), False, None)
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape or fortran:
        order = " in Fortran order" if fortran else ""
        raise UserError(f"{path}: {EXPECTED}, came {dtype} {shape}{order}; convert it to uint8 RGB, 0–255")
    return shape, stream.tell()


def _data_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: after its own header, which says how long its name and its extra field are."""
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        name_bytes, extra_bytes = np.frombuffer(file.read(4), dtype="<u2").tolist()
    return member.header_offset + 30 + name_bytes + extra_bytes


def _mapped(file: Path | IO[bytes], offset: int, shape: tuple[int, ...]) -> RowsOnDisk:
    images_NHWC = np.memmap(file, np.uint8, "r", offset, shape)
    return RowsOnDisk(shape, torch.uint8, lambda rows: torch.from_numpy(images_NHWC[rows]))
