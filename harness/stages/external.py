"""A row that somebody else quantized: their transformer in the run's protocol, or their samples. The other stages are those of every row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from ditbench.harness.common.code_identity import STATE, code_identity, package_version
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import canonical_sha256
from ditbench.harness.fitting import registry
from ditbench.harness.measurement.stored import stored
from ditbench.harness.models.base import LoadedModel
from ditbench.harness.quant.experts import Experts
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.steps import StepClock
from ditbench.harness.stages import others_samples
from ditbench.harness.stages.config import RunConfig
from ditbench.harness.stages.generate import Drawn, drawn
from ditbench.harness.stages.identity import files_of
from ditbench.harness.stages.keys import SHORT, samples_address
from ditbench.harness.stages.measure import timed
from ditbench.harness.stages.quantize import target_of


@dataclass(frozen=True)
class Theirs:
    """model: None where there are samples only. library: who quantized it, None where it does not say. sha256: of all files."""

    model: nn.Module | None
    library: str | None
    sha256: str


def loaded(config: RunConfig, model: LoadedModel) -> Theirs:
    """Their transformer, on the run's device, with a clock as every model has that is drawn with; nothing of a folder of samples.

    Raises:
        UserError: it cannot be loaded, or is of another model (`methods/external.py`).
    """
    for setting in ("stress", "lora", "fuse_qkv"):
        if getattr(config.model, setting):
            raise UserError(
                f"method=external has its weights from its own files, which model.{setting} does not reach; leave it out"
            )
    if isinstance(model.transformer, Experts):
        raise UserError(
            f"method=external loads one transformer, and {model.name} has two, one for high and one for low noise"
        )
    module, dtype = registry.method(config.method), getattr(torch, config.section("generate")["dtype"])
    if module.holds_samples(module.place_of(config.params)):
        return Theirs(None, None, files_of(config))
    theirs = module.load(model, config.params, dtype, config.device)
    recipe = ModelRecipe(layers={})
    theirs.clock = StepClock(recipe.num_steps, recipe.starts).to(config.device)
    return Theirs(theirs, module.library_of(module.place_of(config.params)), files_of(config))


def account(config: RunConfig, model: LoadedModel, theirs: Theirs) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record's `bits`, and the byte counts of its `efficiency`, from their tensors."""
    if theirs.model is None:
        return others_samples.account(), {}
    return stored(theirs.model, model.transformer, model.macs_on(config.device), theirs.library)


def generate(config: RunConfig, model: LoadedModel, theirs: Theirs) -> Drawn:
    """Their samples of the run's prompts or labels, and noise."""
    dtype = config.section("generate")["dtype"]
    of = {"files": theirs.sha256, "dtype": dtype, "device": config.device.type, "code": code_identity(*STATE)}
    of["source"], of["library"] = (
        registry.source_sha256(config.method),
        theirs.library and package_version(theirs.library),
    )
    key = canonical_sha256(of)[:SHORT]
    address = samples_address(config, model, seed=config.seed, dtype=dtype, of=key)
    if theirs.model is None:
        return others_samples.take_in(config, model, registry.method(config.method).place_of(config.params), address)
    return drawn(config, model, cache(lambda: theirs.model), address, seed=config.seed)


def measure(config: RunConfig, model: LoadedModel, theirs: Theirs) -> dict[str, Any]:
    """The record's `efficiency` without bytes: the layers as their library runs them, the float model in bf16 beside them."""
    if theirs.model is None:
        return {}
    found = timed(config, model, target_of(config, model), theirs.model, "measured")
    return found | {"backend": theirs.library or "torch"}


def cost(samples: Drawn) -> dict[str, Any]:
    """What the record's `cost` says: how samples were drawn. What quantizing took is not known here."""
    return {"fit_s": None, "peak_memory_bytes": None} | samples.how
