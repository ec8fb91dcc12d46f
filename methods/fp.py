"""The 16-bit float model: the reference that every other row is compared with. It ignores `bits`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.fitting.forms import PUBLISHED, Form
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.spec import Bits
from ditbench.harness.quant.target import Target


@dataclass(frozen=True)
class Params:
    """Nothing to choose."""


FORMS = {PUBLISHED: Form()}  # so that a sweep of published forms has its reference


def fit(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, Tensor]:
    return {}


def apply(target: Target, state: dict[str, Tensor], bits: Bits, params: Params) -> ModelRecipe:
    return ModelRecipe(layers={})
