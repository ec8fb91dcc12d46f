"""Where the artifacts of a run would lie, as far as that is known before it: what a plan asks of the cache.

A thin layer: the keys are those of the stages that make the artifacts.
"""

from __future__ import annotations

from pathlib import Path

from ditbench.harness.calibration import recording
from ditbench.harness.common.errors import UserError
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.stages import float_model
from ditbench.harness.stages.config import RunConfig


def recording_at(config: RunConfig, model: LoadedModel) -> Path | None:
    """None: it is not known, since the model is not told what to draw."""
    section = config.section("calibration")
    try:
        key = recording.key_of(
            model,
            config.protocol.sampler,
            section["n"],
            config.seed,
            batch_size=section["batch_size"],
            device=config.device,
            prompts=config.calibration_prompts,
        )
    except UserError:
        return None
    return config.cache_dir / "calibration" / key


def float_samples_at(config: RunConfig, model: LoadedModel, seed: int, dtype: str) -> Path | None:
    return config.cache_dir / "float" / float_model._key(config, model, seed, dtype)


def samples_at(config: RunConfig, model: LoadedModel) -> Path | None:
    """Of the quantized model; None: nothing is kept, or its key rests on what is not known yet."""
    return None


def noise_seeds(config: RunConfig) -> list[int]:
    """Seeds of the sets that the noise floor rests on; the first is the run's own."""
    extra = config.section("generate")["noise_floor_seeds"]
    return [config.seed + float_model.SEED_STRIDE * k for k in range(extra + 1)] if extra else []


def is_there(folder: Path | None) -> bool | None:
    """None: unknown."""
    return None if folder is None else folder.exists() and any(folder.iterdir())


def missing_share(folder: Path | None) -> float:
    """Of a set of samples, the part that is still to be drawn."""
    return 0.0 if is_there(folder) else 1.0
