"""Where the artifacts of a run would lie, as far as that is known before it: what a plan asks of the cache."""

from __future__ import annotations

from pathlib import Path

from ditbench.harness.common.artifacts import Damaged
from ditbench.harness.common.errors import UserError
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.quant.spec import MixedBits
from ditbench.harness.samples.store import KIND, found_store
from ditbench.harness.stages.config import RunConfig
from ditbench.harness.stages.evaluate import SEED_STRIDE
from ditbench.harness.stages.keys import quantized_key, samples_address
from ditbench.harness.stages.quantize import recording_key


def recording_at(config: RunConfig, model: LoadedModel) -> Path | None:
    """None: it is not known, since the model is not told what to draw."""
    try:
        return config.cache_dir / "recording" / recording_key(config, model)
    except UserError:
        return None


def float_samples_at(config: RunConfig, model: LoadedModel, seed: int, dtype: str) -> Path | None:
    return samples_address(config, model, seed=seed, dtype=dtype).folder


def samples_at(config: RunConfig, model: LoadedModel) -> Path | None:
    """Of the quantized model; None: its key rests on what is not known yet."""
    recording = recording_at(config, model)
    if recording is None or isinstance(config.bits, MixedBits):
        return None
    of, dtype = quantized_key(config, model, recording.name, {}), config.section("generate")["dtype"]
    return samples_address(config, model, seed=config.seed, dtype=dtype, of=of).folder


def noise_seeds(config: RunConfig) -> list[int]:
    """Seeds of the sets that the noise floor rests on; the first is the run's own."""
    extra = config.section("generate")["noise_floor_seeds"]
    return [config.seed + SEED_STRIDE * k for k in range(extra + 1)] if extra else []


def is_there(folder: Path | None) -> bool | None:
    """Whether it is there, and whole if it is a set of samples; None: unknown."""
    if folder is None:
        return None
    return missing_share(folder) == 0.0 if folder.parent.name == KIND else folder.exists()


def missing_share(folder: Path | None) -> float:
    """Of a set of samples, the part that is still to be drawn."""
    if folder is None:
        return 1.0
    try:
        store = found_store(folder)
    except (FileNotFoundError, Damaged):
        return 1.0
    return sum(len(piece.rows) for piece in store.missing()) / len(store)
