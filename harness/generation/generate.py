"""Generation: one row of noise per sample, the same for every method, in any batch size."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ditbench.harness.build.build import clock_of
from ditbench.harness.common import watch
from ditbench.harness.common.batches import Batch, in_batches
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import atomic_path
from ditbench.harness.common.memory import trim
from ditbench.harness.common.progress import progress as progress_bar
from ditbench.harness.models.base import Correction, LoadedModel, Sampler
from ditbench.harness.models.decoding import decoded
from ditbench.harness.samples.conditions import PROMPTS, Conditions
from ditbench.harness.samples.noise import EACH_ITS_OWN, OWN, Noise
from ditbench.harness.samples.samples import FPS, Prompt, Samples
from ditbench.harness.samples.seeds import sample_seeds
from ditbench.harness.samples.store import Piece, SampleStore

WAIT_S = 0.5  # between looks at what others draw


def conditions(
    model: LoadedModel,
    n: int,
    seed: int,
    labels: str = "balanced",
    prompts: Sequence[Prompt] = (),
    noise: Noise = EACH_ITS_OWN,
) -> Conditions:
    """n labels or prompts, and seeds. labels: "balanced" (0, 1, 2, … in turn) or "random" (drawn with the seed).

    Prompts are taken in turn; a second round over them has other seeds. Where all samples share one noise, that of `seed` itself, or given
    latents, they have one seed.

    Raises:
        UserError: n < 1, or a model that is told by prompts got none.
    """
    if n < 1:
        raise UserError(f"protocol.n must be at least 1 image, got {n}")
    seeds = sample_seeds(seed, n, stream="generate") if noise.kind == OWN else (seed,) * n
    if model.adapter.CONDITION == PROMPTS:
        if not prompts:
            raise UserError(
                f"model {model.spec.name} is told by prompts what to draw; set protocol.prompts to a set or file"
            )
        return Conditions(seeds, prompts=tuple(prompts[index % len(prompts)] for index in range(n)), noise=noise)
    classes = model.adapter.num_classes(model.transformer)
    if labels == "balanced":
        drawn = torch.arange(n) % classes
    elif labels == "random":
        drawn = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))
    else:
        raise UserError(f"protocol.labels={labels!r}; expected balanced or random")
    return Conditions(seeds, drawn)


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
    """Draw a few samples with the given transformer (float or quantized), on its device; all are held on the CPU.

    Raises:
        UserError: the samples contain NaN or infinity.
    """
    parts = []
    with progress_bar(total=len(wanted) * sampler.steps, desc=title, unit="img·step") as progress:
        for start in range(0, len(wanted), batch_size):
            rows = range(start, min(start + batch_size, len(wanted)))
            parts.append(_drawn(model, transformer, wanted, rows, sampler, correct, title, progress.update))
    pixels, latents = (torch.cat(each) for each in zip(*parts, strict=True))
    return Samples(pixels, wanted.labels_N, latents, wanted.prompts)


def draw(
    model: LoadedModel,
    transformer: Callable[[], nn.Module],
    wanted: Conditions,
    sampler: Sampler,
    store: SampleStore,
    *,
    correct: Correction | None = None,
    title: str = "generate",
) -> None:
    """Draw what the store lacks, a piece at a time, beside whoever else draws into it; returns when nothing is missing.

    transformer: gives the model to draw with; not asked where nothing is missing.

    A piece that does not fit into memory is drawn in halves.

    Raises:
        UserError: the samples contain NaN or infinity, or one alone does not fit into memory.
    """
    store.drop_damaged()
    batch = _batch_of(store)
    total, shown = len(wanted) * sampler.steps, False
    with progress_bar(total=total, desc=title, unit="img·step") as progress:
        while missing := store.missing():
            progress.at(total - sum(len(piece.rows) for piece in missing) * sampler.steps)
            ours = 0
            for piece in missing:
                ours += _draw_piece(model, transformer, wanted, sampler, store, piece, batch, correct, title, progress)
                shown = shown or _shown(store)
            if not ours:
                sleep(WAIT_S)  # others draw what is left
        if not shown:
            _shown(store)


def _shown(store: SampleStore) -> bool:
    """Whether there is a piece by now, which whoever watches is then shown."""
    first = next((piece for piece in store.pieces if store.has(piece)), None)
    if first is not None:
        watch.pictures(lambda: store.of(first))
    return first is not None


def _draw_piece(
    model: LoadedModel,
    transformer: Callable[[], nn.Module],
    wanted: Conditions,
    sampler: Sampler,
    store: SampleStore,
    piece: Piece,
    batch: Batch,
    correct: Correction | None,
    title: str,
    progress: progress_bar,
) -> bool:
    """Whether it was ours to draw."""
    with store.claim(piece) as ours:
        if ours:
            start, drawing = perf_counter(), transformer()

            def sample(rows: range) -> tuple[Tensor, Tensor]:
                return _drawn(model, drawing, wanted, rows, sampler, correct, title, progress.update)

            device = clock_of(drawing).step.device
            drawn = [found for _, found in in_batches(piece.rows, batch, sample, what=title, device=device)]
            pixels, latents = (torch.cat(each) for each in zip(*drawn, strict=True))
            how = {
                "batch": {"size": batch.size, "halved_from": list(batch.halved_from)},
                "seconds": perf_counter() - start,
                "decoded": decoded(getattr(model.pipe, "vae", None)),
            }
            store.publish(piece, pixels, latents, FPS, **how)
            trim()
        return ours


def _batch_of(store: SampleStore) -> Batch:
    """A piece at a time, or what fitted into memory when the store was drawn into before."""
    sizes = [store.note(piece)["batch"]["size"] for piece in store.pieces if store.has(piece)]
    return Batch(min([store.index["piece"], *sizes]))


@torch.no_grad()
def _drawn(
    model: LoadedModel,
    transformer: nn.Module,
    wanted: Conditions,
    rows: range,
    sampler: Sampler,
    correct: Correction | None,
    title: str,
    seen: Callable[[int], Any],
) -> tuple[Tensor, Tensor]:
    """One batch → uint8 pixels and float32 latents, on the CPU. seen: told of the rows of each call."""
    drawn = model.adapter.sample(
        model.pipe,
        transformer,
        wanted.rows(rows.start, rows.stop),
        sampler,
        on_call=lambda step, inputs: seen(len(rows)),
        correct=correct,
    )
    if not bool(drawn.latents.isfinite().all()):
        raise UserError(f"{title}: NaN or infinity in the samples {rows.start}–{rows.stop - 1}")
    assert drawn.pixels is not None, "sample decodes unless told not to"
    return to_uint8(drawn.pixels).cpu(), drawn.latents.cpu()


def to_uint8(pixels: Tensor) -> Tensor:
    """[−1, 1], (N, 3, H, W) or (N, F, 3, H, W) → uint8 with the channels last, rounded to nearest (as DiT's clamp(127.5 x + 128) does)."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1).contiguous()


def load_samples(path: Path) -> Samples:
    """An images.npz, in which records were given their samples before there was a store: ADM's format (arr_0: uint8 NHWC or
    NFHWC, arr_1: labels), with latents, prompts and fps beside them.
    """
    with np.load(path) as arrays:
        pixels, labels, latents = (torch.from_numpy(arrays[name]) for name in ("arr_0", "arr_1", "latents"))
        prompts = tuple(Prompt(**json.loads(line)) for line in arrays["prompts"].tolist())
        return Samples(
            pixels, labels if len(labels) else None, latents if len(latents) else None, prompts, float(arrays["fps"])
        )


def save_grid(samples: Samples, path: Path, columns: int = 10, rows: int = 4, cell: int = 64) -> None:
    """`grid` as a PNG."""
    with atomic_path(path) as part:
        grid(samples, columns, rows, cell).save(part, format="PNG")


def grid(samples: Samples, columns: int = 10, rows: int = 4, cell: int = 64) -> Image.Image:
    """The first samples, small ones enlarged without smoothing: columns × rows images, or one video per row."""
    pixels = samples.pixels
    if samples.is_video:
        frames = torch.linspace(0, pixels.shape[1] - 1, min(columns, pixels.shape[1])).round().long()
        shown, columns = torch.cat([pixels[row][frames] for row in range(min(rows, len(pixels)))]), len(frames)
    else:
        shown = pixels[: columns * rows]
    return Image.fromarray(_tiled(shown.numpy(), columns, cell))


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
