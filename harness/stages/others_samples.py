"""A row of samples alone: drawn by somebody else, they are put into the store as they are, and scored as every row's."""

from __future__ import annotations

from pathlib import Path
from time import sleep
from typing import Any

import torch
from torch import Tensor

from ditbench.eval.image_files import read_rgb
from ditbench.harness.common.artifacts import Address
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import disk_errors_explained
from ditbench.harness.generation.generate import WAIT_S
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.samples.others import VIDEOS, Given, given
from ditbench.harness.samples.pixels import frames
from ditbench.harness.samples.samples import Samples
from ditbench.harness.samples.store import open_store
from ditbench.harness.stages.config import RunConfig
from ditbench.harness.stages.generate import Drawn, float_samples
from ditbench.harness.stages.keys import wanted
from ditbench.harness.stages.loaded import samples_in

PIECE = 64
UNKNOWN = (
    "weight_bits_effective", "weight_bits_quantized_layers", "act_bits_effective", "mac_share_quantized", "weight_format", "act_format",
)  # fmt: skip


def account() -> dict[str, Any]:
    """The record's `bits`: nothing can be known of them."""
    return {"label": "not known", "float_layers": []} | dict.fromkeys(UNKNOWN)


def take_in(config: RunConfig, model: LoadedModel, folder: Path, address: Address) -> Drawn:
    """The samples of a folder as a store: pixels as the files have them, each with the run's prompt or label, and with its seed where
    the noise is known to be the run's. Nothing is resized.

    Raises:
        UserError: a prompt or label has no sample, or a file is unreadable, or of another size than what the model draws.
    """
    conditions = wanted(config, model, config.seed)
    found, like = given(folder, conditions), float_samples(config, model, seed=config.seed).samples
    with disk_errors_explained(config.cache_dir):
        store = open_store(address, conditions, lambda: PIECE, latents=False, seeds=[each.seed for each in found])
        store.drop_damaged()
        while missing := store.missing():
            for piece in missing:
                with store.claim(piece) as ours:
                    if ours:
                        pixels_N = torch.stack([_read(found[row], like) for row in piece.rows])
                        store.publish(piece, pixels_N, None, like.fps)
            if len(store.missing()) == len(missing):
                sleep(WAIT_S)  # others take in what is left
    return Drawn(samples_in(store.folder), address.key, store.folder, {})


def _read(each: Given, like: Samples) -> Tensor:
    """uint8, an image (H, W, 3) or a video (F, H, W, 3) of the size that the model draws."""
    pixels = _frames(each.file) if each.file.suffix.lower() in VIDEOS else torch.from_numpy(read_rgb(each.file))
    if pixels.shape != like.pixels.shape[1:]:
        came, expected = ("×".join(map(str, shape[:-1])) for shape in (pixels.shape, like.pixels.shape[1:]))
        raise UserError(
            f"{each.file}: expected {expected} (height × width, of videos frames first) as the model draws, came {came}; "
            "set model.size or draw anew: resizing would change every metric, so it is not done here"
        )
    return pixels


def _frames(file: Path) -> Tensor:
    try:
        return frames(file.read_bytes())
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"{file}: expected a video, came {type(error).__name__}: {error}; replace it") from error
