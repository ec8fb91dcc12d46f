"""Where the artifacts of a run would lie, as far as that is known before it: what a plan asks of the cache.

The keys are those of the stages that make the artifacts.
"""

from __future__ import annotations

from pathlib import Path

from ditbench.harness.calibration import recording
from ditbench.harness.common.artifacts import Damaged
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting import registry
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.quant.spec import MixedBits
from ditbench.harness.samples.store import INDEX, found_store
from ditbench.harness.stages.config import RunConfig
from ditbench.harness.stages.evaluate import SEED_STRIDE
from ditbench.harness.stages.keys import quantized_key, samples_address


def recording_at(config: RunConfig, model: LoadedModel) -> Path | None:
    """None: it is not known, since the model is not told what to draw."""
    key = _recording_key(config, model)
    return None if key is None else config.cache_dir / recording.KIND / key


def float_samples_at(config: RunConfig, model: LoadedModel, seed: int, dtype: str) -> Path | None:
    try:
        return samples_address(config, model, seed=seed, dtype=dtype).folder
    except UserError:
        return None


def samples_at(config: RunConfig, model: LoadedModel) -> Path | None:
    """Of the quantized model; None: its key rests on what is not known yet (mixed precision's plan, the files
    of what somebody else quantized)."""
    key = _recording_key(config, model)
    if key is None or isinstance(config.bits, MixedBits) or config.method == registry.EXTERNAL:
        return None
    of = quantized_key(config, model, key, {})
    dtype = config.section("generate")["dtype"]
    return samples_address(config, model, seed=config.seed, dtype=dtype, of=of, recording=key).folder


def noise_seeds(config: RunConfig) -> list[int]:
    """Seeds of the sets that the noise floor rests on; the first is the run's own."""
    extra = config.section("generate")["noise_floor_seeds"]
    return [config.seed + SEED_STRIDE * k for k in range(extra + 1)] if extra else []


def is_there(folder: Path | None) -> bool | None:
    """Whole. None: unknown."""
    return None if folder is None else missing_share(folder) == 0.0


def missing_share(folder: Path) -> float:
    """The part of an artifact that is still to be made: of a set of samples by pieces, of others all or nothing."""
    if not (folder / INDEX).exists():
        return 0.0 if folder.exists() and any(folder.iterdir()) else 1.0
    try:
        store = found_store(folder)
    except (OSError, Damaged):
        return 1.0
    return sum(len(piece.rows) for piece in store.missing()) / len(store)


def _recording_key(config: RunConfig, model: LoadedModel) -> str | None:
    section = config.section("calibration")
    try:
        return recording.key_of(
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
