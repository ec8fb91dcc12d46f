"""Which backend runs which format on which device here, and why not."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ditbench.harness.backends.base import known_backends
from ditbench.harness.common.devices import kinds_here
from ditbench.harness.common.text_table import table
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.spec import FORMATS, bits_of


def format_matrix() -> str:
    rows: list[Sequence[str]] = []
    for label in FORMATS:
        recipe = example_recipe(label)
        for device in kinds_here():
            real = [(b, b.unsupported(recipe, device)) for b in known_backends().values() if b.KIND == "measured"]
            able = [b.NAME for b, why in real if why is None]
            why = "; ".join(reason for _, reason in real if reason)  # each begins with the backend's name
            rows.append((label, device.type, ", ".join(able) or "simulated", "" if able else why))
    return table(("format", "device", "runs on", "why not"), rows)


def example_recipe(label: str) -> LayerRecipe:
    bits = bits_of(label)
    weight = None if bits.weight is None else quantize_weight(torch.eye(16), bits.weight)
    return LayerRecipe(weight=weight, act=None if bits.act is None else ActQuant(bits.act))
