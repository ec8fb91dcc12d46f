"""Which backend runs which format on which device here, and why not."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ditbench.harness.backends.base import MachineLacks, known_backends
from ditbench.harness.common.devices import kinds_here
from ditbench.harness.common.text_table import table
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.spec import FORMATS, bits_of


def format_matrix(indent: int = 0) -> str:
    rows: list[Sequence[str]] = []
    for label in FORMATS:
        for device in kinds_here():
            able, lacks = _on(label, device)
            why = "; ".join(lacks) or f"no backend runs {label} on {device.type}"
            rows.append((label, device.type, ", ".join(able) or "simulated", "" if able else why))
    return table(("format", "device", "runs on", "why not"), rows, indent=indent)


def machine_lacks() -> list[tuple[MachineLacks, list[str]]]:
    """What would make kernels run here that do not: each with its formats. Only what some command mends."""
    found: dict[MachineLacks, list[str]] = {}
    for label in FORMATS:
        for device in kinds_here():
            for lack in _on(label, device)[1]:
                if lack.mend:
                    found.setdefault(lack, []).append(label)
    return list(found.items())


def _on(label: str, device: torch.device) -> tuple[list[str], list[MachineLacks]]:
    """The real backends that run the format there, and why others do not that would on a machine with more."""
    real = [b for b in known_backends().values() if b.KIND == "measured"]
    said = [(b, b.unsupported(example_recipe(label), device)) for b in real]
    return [b.NAME for b, why in said if why is None], [why for _, why in said if isinstance(why, MachineLacks)]


def example_recipe(label: str) -> LayerRecipe:
    bits = bits_of(label)
    weight = None if bits.weight is None else quantize_weight(torch.eye(16), bits.weight)
    return LayerRecipe(weight=weight, act=None if bits.act is None else ActQuant(bits.act))
