"""Fitted states: what a method learned, kept under the hash of all that made it. The recipe is made of it anew, every time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ditbench.harness.calibration.lazy import LazyCalibration
from ditbench.harness.calibration.recording import Calibration, without_data
from ditbench.harness.calibration.salient import ALL, SALIENT, salient
from ditbench.harness.common.artifacts import obtain
from ditbench.harness.common.code_identity import STATE, code_identity
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import canonical_sha256, read_json, write_json
from ditbench.harness.common.memory import PeakMemory, peak_memory
from ditbench.harness.common.tensor_files import save_tensors
from ditbench.harness.fitting import registry
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.spec import Bits
from ditbench.harness.quant.target import Target
from ditbench.harness.stages.config import RunConfig
from ditbench.harness.stages.loaded import left_alone

KIND = "state"  # of artifact
TENSORS, SAVED = "state.safetensors", "saved.json"


@dataclass(frozen=True)
class Fitted:
    """state: tensors by name, on the CPU. saved_s: the seconds that the cache saved while it was fitted, by what. memory: what was held
    then, in the process that fitted it.
    """

    state: dict[str, Tensor]
    saved_s: dict[str, float]
    memory: PeakMemory


def fitted(
    config: RunConfig, target: Target, recording: Calibration, bits: Bits
) -> tuple[ModelRecipe, dict[str, Tensor]]:
    """The method's state, fitted or found, and the recipe that it makes of it.

    Raises:
        UserError: the method refuses, or gives what no method may, or changed the float model.
    """
    method = registry.method(config.method)
    key = key_of(config, target, recording, bits)
    address = recording.derived(KIND, key, f"the state of {config.method} {bits.label}")
    with left_alone(target.transformer, config.method):
        kept = obtain(address, lambda: _fit(config, target, recording.with_own_notes(), bits), _write, _read)
        recording.saved(f"{KIND} {key}", kept.saved_s)
        if recording.saved_s[f"{KIND} {key}"] > 0:
            recording.fits[key] = kept.value.memory
        for what, seconds in kept.value.saved_s.items():
            recording.saved(what, seconds)
        state = kept.value.state
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)  # what `apply` draws may not depend on whether `fit` ran before
            recipe = method.apply(target, state, bits, config.params)
        registry.check_recipe(config.method, recipe, target)
    return recipe, state


def with_attention_given(target: Target, recipe: ModelRecipe) -> ModelRecipe:
    """The method's recipe, and what the protocol itself puts on attention."""
    return replace(recipe, attention={**recipe.attention, **target.attention_given})


def key_of(config: RunConfig, target: Target, recording: Calibration, bits: Bits) -> str:
    """Of all that makes a state. The model and its device are in the recording's key; a method's choice of what it calibrates
    on is in its source.
    """
    return canonical_sha256(
        {
            "recording": recording.key,
            "method": config.raw["method"],
            "source": registry.source_sha256(config.method),
            "bits": asdict(bits),
            "seed": config.seed,
            "target": [target.layers, target.attention],
            "device": config.device.type,
            "code": code_identity(*STATE),
        }
        | chosen(config)
    )


def chosen(config: RunConfig) -> dict[str, list[Any]]:
    """What keys say of the rows that a method is fitted on; nothing where it is all of them."""
    section = config.section("calibration")
    return {} if section["select"] == ALL else {"chosen": [section["select"], section["keep"]]}


def _fit(config: RunConfig, target: Target, recording: Calibration, bits: Bits) -> Fitted:
    """A method may choose what it calibrates on; its layers are still judged on the whole recording."""
    method = registry.method(config.method)
    if config.section("calibration")["n"] == 0:
        recording = without_data(recording, _who(config, bits))
    select = getattr(method, "select_calibration", None)
    salient_rows = config.section("calibration")["select"] == SALIENT
    if (select is not None or salient_rows) and isinstance(recording, LazyCalibration):
        recording = recording.recorded
    calibration = recording
    if salient_rows:
        if select is not None:
            raise UserError(
                f"method {config.method} chooses itself what it is calibrated on; set calibration.select={ALL}"
            )
        channels = getattr(getattr(target.transformer, "config", None), "in_channels", None)
        calibration = salient(recording, config.section("calibration")["keep"], channels)
    elif select is not None:
        calibration = select(recording, config.params, config.seed)
    with torch.random.fork_rng(devices=[]), peak_memory(config.device) as memory:
        torch.manual_seed(config.seed)
        state = method.fit(target, calibration, bits, config.params)
    registry.check_state(config.method, state)
    on_cpu = {name: tensor.cpu() for name, tensor in state.items()}  # where it is kept, wherever a plugin made it
    return Fitted(on_cpu, recording.saved_s, memory)


def _who(config: RunConfig, bits: Bits) -> str:
    static = bits.act is not None and not bits.act.dynamic
    return f"method {config.method}" + (" with static activations (bits.act.dynamic=false)" if static else "")


def _write(fitted: Fitted, folder: Path) -> None:
    save_tensors(_apart(fitted.state), folder / TENSORS)
    write_json(folder / SAVED, {"saved_s": fitted.saved_s, "memory": asdict(fitted.memory)})


def _read(folder: Path) -> Fitted:
    saved = read_json(folder / SAVED)
    return Fitted(load_file(folder / TENSORS), saved["saved_s"], PeakMemory(**saved["memory"]))


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors wants them: contiguous, no two of them in one memory."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in state.items():
        found[name] = tensor.contiguous()
        memory = found[name].untyped_storage().data_ptr()
        if memory in taken:
            found[name] = found[name].clone()
        taken.add(memory)
    return found
