"""`written(...)`: one method's quantized small DiT, and its export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ditbench.harness.build.build import build
from ditbench.harness.build.export import save_quantized
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.fitting import registry
from ditbench.harness.generation.generate import conditions, generate
from ditbench.harness.models.base import LoadedModel, Sampler
from ditbench.harness.models.schedule import schedule_of
from ditbench.harness.quant.accounting import account
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.spec import Bits
from ditbench.harness.quant.target import Target
from ditbench.harness.samples.samples import Samples


@dataclass(frozen=True)
class Written:
    """target, recipe: what was exported; folder: where; described: its recipe.json; size: the record's byte counts."""

    target: Target
    recipe: ModelRecipe
    folder: Path
    described: dict[str, Any]
    size: dict[str, Any]
    dtype: torch.dtype

    def built(self, backend: str = "auto") -> nn.Module:
        return build(self.target, self.recipe, dtype=self.dtype, backend=backend)


def write_export(
    folder: Path, target: Target, calibration: Calibration, model: LoadedModel, method: str, bits: Bits, **params: Any
) -> Written:
    """sampler, among params: the one that was calibrated with, whose schedule is exported."""
    module, dtype = registry.method(method), getattr(torch, params.pop("dtype", "bfloat16"))
    sampler = params.pop("sampler", None)
    schedule = None if sampler is None else schedule_of(model, sampler)
    state = module.fit(target, calibration, bits, module.Params(**params))
    recipe = module.apply(target, state, bits, module.Params(**params))
    described = save_quantized(folder, target, recipe, dtype=dtype, about={"method": method}, schedule=schedule)
    _, size = account(target, recipe, model.macs, bits.label)
    return Written(target, recipe, folder, described, size, dtype)


@pytest.fixture(scope="session")
def write() -> Callable[..., Written]:
    return write_export


@pytest.fixture(scope="session")
def written(tmp_path_factory, small_model, small_calibration) -> Callable[..., Written]:
    """written(method, bits, scope, **params): on the small DiT; the same arguments give the same folder."""

    @cache
    def once(method: str, bits: Bits, scope: str = "blocks", **params: Any) -> Written:
        target = small_model.target(scope, attention=method in ("ptq4dit", "repq"))
        folder = tmp_path_factory.mktemp(method) / "export"
        return write_export(folder, target, small_calibration, small_model, method, bits, **params)

    return once


@pytest.fixture
def drawn(small_sampler: Sampler) -> Callable[..., Samples]:
    """drawn(model, transformer): three images and their latents."""
    return lambda model, transformer: generate(
        model, transformer, conditions(model, 3, seed=0), small_sampler, batch_size=2
    )
