"""Generation: one row of noise per sample, the same for every method, in any batch size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import atomic_path
from ditbench.harness.common.progress import progress as progress_bar
from ditbench.harness.models.base import Correction, LoadedModel, Sampler
from ditbench.harness.samples.conditions import PROMPTS, Conditions
from ditbench.harness.samples.samples import Prompt, Samples
from ditbench.harness.samples.seeds import sample_seeds


def conditions(
    model: LoadedModel, n: int, seed: int, labels: str = "balanced", prompts: Sequence[Prompt] = ()
) -> Conditions:
    """n labels or prompts, and seeds. labels: "balanced" (0, 1, 2, … in turn) or "random" (drawn with the seed).

    Prompts are taken in turn; a second round over them has other seeds.

    Raises:
        UserError: n < 1, or a model that is told by prompts got none.
    """
    if n < 1:
        raise UserError(f"protocol.n must be at least 1 image, got {n}")
    seeds = sample_seeds(seed, n, stream="generate")
    if model.adapter.CONDITION == PROMPTS:
        if not prompts:
            raise UserError(
                f"model {model.spec.name} is told by prompts what to draw; set protocol.prompts to a set or file"
            )
        return Conditions(seeds, prompts=tuple(prompts[index % len(prompts)] for index in range(n)))
    classes = model.adapter.num_classes(model.transformer)
    if labels == "balanced":
        drawn = torch.arange(n) % classes
    elif labels == "random":
        drawn = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))
    else:
        raise UserError(f"protocol.labels={labels!r}; expected balanced or random")
    return Conditions(seeds, drawn)


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
) -> Samples:
    """Draw all samples with the given transformer (float or quantized), on its device; they are kept on the CPU.

    Raises:
        UserError: the samples contain NaN or infinity.
    """
    latents, pixels = [], []
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
            if not bool(drawn.latents.isfinite().all()):
                raise UserError(f"{title}: NaN or infinity in the samples {start}–{start + len(part) - 1}")
            assert drawn.pixels is not None, "sample decodes unless told not to"
            latents.append(drawn.latents.cpu())
            pixels.append(to_uint8(drawn.pixels).cpu())
    return Samples(torch.cat(pixels), wanted.labels_N, torch.cat(latents), wanted.prompts)


def to_uint8(pixels: Tensor) -> Tensor:
    """[−1, 1], (N, 3, H, W) or (N, F, 3, H, W) → uint8 with the channels last, rounded to nearest (as DiT's clamp(127.5 x + 128) does)."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).contiguous()


def save_samples(samples: Samples, path: Path) -> None:
    """ADM's .npz format (arr_0: uint8 NHWC or NFHWC, arr_1: labels), with latents and prompts beside them."""
    arrays = {
        "arr_0": samples.pixels.numpy(),
        "arr_1": np.zeros(0) if samples.labels_N is None else samples.labels_N.numpy(),
        "latents": np.zeros(0) if samples.latents is None else samples.latents.numpy(),
        "prompts": np.array([json.dumps(asdict(prompt)) for prompt in samples.prompts], dtype=np.str_),
        "fps": np.float64(samples.fps),
    }
    with atomic_path(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)


def load_samples(path: Path) -> Samples:
    with np.load(path) as arrays:
        pixels, labels, latents = (torch.from_numpy(arrays[name]) for name in ("arr_0", "arr_1", "latents"))
        prompts = tuple(Prompt(**json.loads(line)) for line in arrays["prompts"].tolist())
        return Samples(
            pixels, labels if len(labels) else None, latents if len(latents) else None, prompts, float(arrays["fps"])
        )


def save_grid(samples: Samples, path: Path, columns: int = 10, rows: int = 4, cell: int = 64) -> None:
    """A PNG of the first samples, small ones enlarged without smoothing: columns × rows images, or one video per row."""
    pixels = samples.pixels
    if samples.is_video:
        frames = torch.linspace(0, pixels.shape[1] - 1, min(columns, pixels.shape[1])).round().long()
        shown, columns = torch.cat([pixels[row][frames] for row in range(min(rows, len(pixels)))]), len(frames)
    else:
        shown = pixels[: columns * rows]
    with atomic_path(path) as part:
        Image.fromarray(_tiled(shown.numpy(), columns, cell)).save(part, format="PNG")


def save_animation(samples: Samples, path: Path, columns: int = 6, rows: int = 2, cell: int = 96) -> None:
    """A GIF of the first columns × rows videos side by side, in a loop at their own speed."""
    frames = samples.videos_NFHWC[: columns * rows].numpy().swapaxes(0, 1)
    tiles = (Image.fromarray(_tiled(frame, columns, cell)) for frame in frames)  # as they are written
    with atomic_path(path) as part:
        next(tiles).save(
            part, format="GIF", save_all=True, append_images=tiles, duration=round(1000 / samples.fps), loop=0
        )


def _tiled(images_NHWC: np.ndarray, columns: int, cell: int) -> np.ndarray:
    """One picture of all, row by row; images smaller than a cell are enlarged by a whole factor."""
    scale = max(1, cell // images_NHWC.shape[1])
    shown = images_NHWC.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = shown.shape[1:3]
    canvas = np.zeros((-(-len(shown) // columns) * height, min(columns, len(shown)) * width, 3), np.uint8)
    for index, image in enumerate(shown):
        top, left = index // columns * height, index % columns * width
        canvas[top : top + height, left : left + width] = image
    return canvas
