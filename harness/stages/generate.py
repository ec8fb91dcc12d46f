"""Draw the quantized model's samples, and keep what a run leaves beside its record."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ditbench.harness.common.tensor_files import save_hashed
from ditbench.harness.fitting import registry
from ditbench.harness.generation.generate import conditions, save_animation, save_grid, save_samples
from ditbench.harness.generation.generate import generate as drawn_with
from ditbench.harness.measurement.layer_errors import ErrorAtlas
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.records import sample_values
from ditbench.harness.samples.samples import Samples
from ditbench.harness.stages.config import RunConfig
from ditbench.harness.stages.identity import title
from ditbench.harness.stages.quantize import Quantized


def generate(config: RunConfig, model: LoadedModel, quantized: Quantized) -> Samples:
    return drawn_with(
        model,
        quantized.model,
        conditions(model, config.protocol.n, config.seed, config.protocol.labels, config.protocol.prompts),
        config.protocol.sampler,
        batch_size=config.section("generate")["batch_size"],
        correct=registry.correction(config.method, quantized.state, config.params),
        title=f"generate {title(config)}",
    )


def save_artifacts(
    images: Samples,
    float_model: Samples,
    per_sample: sample_values.Values,
    atlas: ErrorAtlas | None,
    state: dict[str, Tensor],
    folder: Path,
) -> dict[str, str]:
    """Everything but the record → the record's `artifacts`: {what it is: file in the run's folder}."""
    save_samples(images, folder / "images.npz")
    save_grid(images, folder / "grid.png")
    save_grid(float_model, folder / "float_grid.png")
    saved = {"images": "images.npz", "grid": "grid.png", "float_grid": "float_grid.png"}
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
