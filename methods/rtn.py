"""RTN: round to nearest with min-max ranges, no transform (the baseline of every PTQ paper).

    asymmetric   s = (max − min) / (2^b − 1),  z = −round(min / s),  q = clamp(round(x / s) + z, 0, 2^b − 1)
    symmetric    s = max|x| / (2^(b−1) − 1),   q = clamp(round(x / s), ±(2^(b−1) − 1))

Ranges always contain zero. Granularity, symmetry and whether activations are dynamic come from `bits`.

Departs from the paper: nothing; there is none.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.fitting.forms import PUBLISHED, Form
from ditbench.harness.fitting.rounding import nearest, static_ranges
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.spec import Bits
from ditbench.harness.quant.target import Target


@dataclass(frozen=True)
class Params:
    """Nothing to choose."""


FORMS = {PUBLISHED: Form()}  # so that a sweep of published forms has its baseline


def fit(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, Tensor]:
    return static_ranges(target, bits, calibration)


def apply(target: Target, state: dict[str, Tensor], bits: Bits, params: Params) -> ModelRecipe:
    return nearest(target, bits, state)
