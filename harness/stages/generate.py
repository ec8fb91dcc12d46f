"""Draw the quantized model's samples, and keep what a run leaves beside its record."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditbench.harness.build.build import float_copy
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.common.artifacts import Address
from ditbench.harness.common.files import disk_errors_explained
from ditbench.harness.common.tensor_files import save_hashed
from ditbench.harness.fitting import registry
from ditbench.harness.generation.generate import draw, save_animation, save_grid
from ditbench.harness.generation.generate import generate as held
from ditbench.harness.measurement.layer_errors import ErrorAtlas
from ditbench.harness.models.base import Correction, LoadedModel
from ditbench.harness.models.batch_sizes import batch_of
from ditbench.harness.models.encoded_prompts import keeping
from ditbench.harness.records import sample_values
from ditbench.harness.samples.samples import Samples
from ditbench.harness.samples.store import SampleStore, open_store
from ditbench.harness.stages.config import RunConfig
from ditbench.harness.stages.identity import title
from ditbench.harness.stages.keys import keeps_latents, quantized_key, samples_address, wanted
from ditbench.harness.stages.loaded import samples_in
from ditbench.harness.stages.quantize import Quantized


@dataclass(frozen=True)
class Drawn:
    """Samples in a store, and the store's key. how: of the record's `cost`, what drawing took, whenever that was."""

    samples: Samples
    key: str
    folder: Path
    how: dict[str, Any]


def generate(config: RunConfig, model: LoadedModel, quantized: Quantized, recording: str) -> Drawn:
    """The run's samples: those that the store holds already, and the others drawn now, beside whoever does the same run."""
    of = quantized_key(config, model, recording, quantized.plan)
    dtype = config.section("generate")["dtype"]
    return drawn(
        config,
        model,
        lambda: quantized.model,
        samples_address(config, model, seed=config.seed, dtype=dtype, of=of, recording=recording),
        seed=config.seed,
        correct=registry.correction(config.method, quantized.state, config.params),
    )


def few(config: RunConfig, model: LoadedModel, quantized: Quantized) -> Samples:
    """The run's samples, held in memory and kept nowhere: for commands that compare a few."""
    return held(
        model,
        quantized.model,
        wanted(config, model, config.seed),
        config.protocol.sampler,
        batch_size=batch_of(config.section("generate")["batch_size"], model, quantized.model).size,
        correct=registry.correction(config.method, quantized.state, config.params),
        title=f"generate {title(config)}",
    )


def float_samples(config: RunConfig, model: LoadedModel, seed: int, dtype: str | None = None) -> Drawn:
    """The float model's samples with the labels and noise of a run with this seed: the reference of every paired metric and,
    with other seeds, the measure of each metric's noise floor.
    """
    dtype = dtype or config.section("generate")["reference_dtype"]
    return drawn(
        config,
        model,
        cache(
            lambda: float_copy(model.target(), dtype=getattr(torch, dtype), device=config.device, memory=config.memory)
        ),
        samples_address(config, model, seed=seed, dtype=dtype),
        seed=seed,
    )


def drawn(
    config: RunConfig,
    model: LoadedModel,
    transformer: Callable[[], nn.Module],
    address: Address,
    *,
    seed: int,
    correct: Correction | None = None,
) -> Drawn:
    conditions, asked = wanted(config, model, seed), config.section("generate")["batch_size"]
    texts = [prompt.text for prompt in conditions.prompts]
    with disk_errors_explained(config.cache_dir), keeping(model.pipe, texts, config.cache_dir):
        store = open_store(
            address, conditions, lambda: batch_of(asked, model, transformer()).size, keeps_latents(config)
        )
        draw(
            model,
            transformer,
            conditions,
            config.protocol.sampler,
            store,
            correct=correct,
            title=f"generate {address.title}",
        )
    return Drawn(samples_in(store.folder), address.key, store.folder, _how(store))


def drawing_cost(quantized: Quantized, recording: Calibration, samples: Drawn) -> dict[str, Any]:
    """What the record's `cost` says of how samples and recording were drawn: seconds, batches, how the VAE decoded, memory policy."""
    return samples.how | {"calibrated_in": recording.batch, "memory": quantized.model.memory}


def _how(store: SampleStore) -> dict[str, Any]:
    notes = [store.note(piece) for piece in store.pieces]
    ways = {json.dumps([note["batch"], note["decoded"]]): note for note in notes}.values()
    drawn = [{"batch": note["batch"], "decoded": note["decoded"]} for note in ways]
    return {"draw_s": sum(note["seconds"] for note in notes), "drawn": drawn}


def save_artifacts(
    drawn: Drawn,
    float_drawn: Drawn,
    per_sample: sample_values.Values,
    atlas: ErrorAtlas | None,
    state: dict[str, Tensor],
    folder: Path,
) -> dict[str, str]:
    """Everything but the record → the record's `artifacts`: {what it is: file in the run's folder}."""
    images, float_model = drawn.samples, float_drawn.samples
    save_grid(images, folder / "grid.png")
    save_grid(float_model, folder / "float_grid.png")
    saved = {"grid": "grid.png", "float_grid": "float_grid.png"}
    if images.is_video:
        save_animation(images, folder / "animation.gif")
        save_animation(float_model, folder / "float_animation.gif")
        saved |= {"animation": "animation.gif", "float_animation": "float_animation.gif"}
    if state:
        save_hashed(state, folder / "state.safetensors")
        saved["state"] = "state.safetensors"
    if atlas is not None:
        atlas.save(folder / "layer_errors.npz")
        saved["layer_errors"] = "layer_errors.npz"
    sample_values.save(per_sample, folder / sample_values.FILE)
    return saved | {"per_sample": sample_values.FILE}
