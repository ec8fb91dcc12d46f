"""Generation: one row of noise per sample, the same for every method, in any batch size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from eval.base import ImageSet
from harness.errors import UserError
from harness.files import atomic_path
from harness.models.base import Conditions, Correction, LoadedModel, Sampler
from harness.progress import progress as progress_bar
from harness.seeds import sample_seeds


def conditions(model: LoadedModel, n: int, seed: int, labels: str = "balanced") -> Conditions:
    """n labels and seeds. labels: "balanced" (0, 1, 2, … in turn) or "random" (drawn with the seed).

    Raises:
        UserError: n < 1.
    """
    if n < 1:
        raise UserError(f"protocol.n must be at least 1 image, got {n}")
    classes = model.adapter.num_classes(model.transformer)
    if labels == "balanced":
        drawn = torch.arange(n) % classes
    elif labels == "random":
        drawn = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))
    else:
        raise UserError(f"protocol.labels={labels!r}; expected balanced or random")
    return Conditions(drawn, sample_seeds(seed, n, stream="generate"))


@torch.no_grad()
def generate(
    model: LoadedModel,
    transformer: nn.Module,
    wanted: Conditions,
    sampler: Sampler,
    *,
    batch_size: int,
    correct: Correction | None = None,
    title: str = "generate",
) -> ImageSet:
    """Draw all samples with the given transformer (float or quantized).

    Raises:
        UserError: the samples contain NaN or infinity.
    """
    latents, images = [], []
    with progress_bar(total=len(wanted) * sampler.steps, desc=title, unit="img·step") as progress:
        for start in range(0, len(wanted), batch_size):
            part = wanted.rows(start, min(start + batch_size, len(wanted)))
            drawn = model.adapter.sample(
                model.pipe,
                transformer,
                part,
                sampler,
                on_call=lambda step, inputs, rows=len(part): progress.update(rows),
                correct=correct,
            )
            if not bool(drawn.isfinite().all()):
                raise UserError(f"{title}: NaN or infinity in the samples {start}–{start + len(part) - 1}")
            latents.append(drawn)
            images.append(to_uint8(model.adapter.decode(model.pipe, drawn)))
    return ImageSet(torch.cat(images), wanted.labels_N, torch.cat(latents))


def to_uint8(images_N3HW: Tensor) -> Tensor:
    """[−1, 1] → uint8 (N, H, W, 3), rounded to nearest (as DiT's clamp(127.5 x + 128) does)."""
    return ((images_N3HW + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def save_images(images: ImageSet, path: Path) -> None:
    """ADM's .npz format (arr_0: uint8 NHWC, arr_1: labels), with the latents beside them."""
    with atomic_path(path) as part, part.open("wb") as file:
        np.savez_compressed(
            file,
            arr_0=images.images_NHWC.numpy(),
            arr_1=images.labels_N.numpy() if images.labels_N is not None else np.zeros(0),
            latents=images.latents_NChw.numpy() if images.latents_NChw is not None else np.zeros(0),
        )


def load_images(path: Path) -> ImageSet:
    with np.load(path) as arrays:
        return ImageSet(*(torch.from_numpy(arrays[name]) for name in ("arr_0", "arr_1", "latents")))


def save_grid(images: ImageSet, path: Path, columns: int = 10, rows: int = 4, cell: int = 64) -> None:
    """A PNG of the first columns × rows samples, small images enlarged without smoothing."""
    shown = images.images_NHWC[: columns * rows].numpy()
    scale = max(1, cell // shown.shape[1])
    shown = shown.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = shown.shape[1:3]
    canvas = np.zeros((-(-len(shown) // columns) * height, min(columns, len(shown)) * width, 3), np.uint8)
    for index, image in enumerate(shown):
        top, left = index // columns * height, index % columns * width
        canvas[top : top + height, left : left + width] = image
    with atomic_path(path) as part:
        Image.fromarray(canvas).save(part, format="PNG")
