"""Tensors in safetensors files that anyone may read who may read the folder, and that carry the hash of what is in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ditbench.harness.common.artifacts import Damaged
from ditbench.harness.common.files import UNREADABLE, tensors_sha256

SHA256 = "sha256"  # in the file's metadata, of its tensors


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the file with the mode that the umask gives; safetensors alone keeps it to its owner (0600)."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    path.chmod(mode)


def save_hashed(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write the file with the SHA-256 of its tensors in its metadata. Entries may be one tensor under several names."""
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_tensors(own, path, {SHA256: tensors_sha256(own)})


def load_hashed(path: Path) -> dict[str, Tensor]:
    """What `save_hashed` wrote. A file without metadata, as it was written before there were hashes, is read as it is.

    Raises:
        Damaged: it is not what was written, cannot be read, or is not there.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file is no mapping)
    except FileNotFoundError:
        raise Damaged(f"{path}: is missing") from None
    except (*UNREADABLE, OSError, RuntimeError) as error:
        raise Damaged(f"{path}: cannot be read ({type(error).__name__})") from error
    if metadata is not None and metadata.get(SHA256) != tensors_sha256(tensors):
        raise Damaged(f"{path}: does not have the SHA-256 that it was written with")
    return tensors
