"""A transformer of true size with random weights and the shapes it is called with: speed and memory without a download.

`random` of such a model (conf/model/*-random.yaml) has the transformer's arguments and, under `inputs`, one entry per
argument of its call: a list is a row's shape, drawn from a normal distribution; `{shape, value}` is constant; with
`shared: true` it has no row per sample; `{each: shape}` is a list of one tensor per sample; `{range: n}` is 0 … n − 1 for all
samples, of several lengths a list of such; `{several: n, each: shape}` is a list of n tensors with a row per sample; `{as_is: …}` is what stands there; null is None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

from ditbench.harness.common.errors import UserError


@dataclass(frozen=True)
class TransformerOnly:
    """Stands where a pipeline would: it has a transformer and nothing to draw with."""

    transformer: nn.Module
    inputs: Mapping[str, Any]

    @property
    def components(self) -> dict[str, nn.Module]:
        return {"transformer": self.transformer}

    def step_inputs(self, batch: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        return {name: _argument(wanted, batch, generator) for name, wanted in self.inputs.items()}


def random_transformer(name: str, arguments: Mapping[str, Any], dtype: torch.dtype) -> TransformerOnly:
    """name: of a diffusers class.

    Raises:
        UserError: the shapes of its call are missing.
    """
    arguments = dict(arguments)
    inputs = arguments.pop("inputs", None)
    if not inputs:
        raise UserError(
            f"model.random of a {name} needs `inputs`, the shapes it is called with (conf/model/*-random.yaml)"
        )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return TransformerOnly(getattr(diffusers, name)(**arguments), inputs)
    finally:
        torch.set_default_dtype(before)


def _argument(wanted: Any, batch: int, generator: torch.Generator) -> Any:
    if wanted is None:
        return None
    if isinstance(wanted, Mapping) and "as_is" in wanted:
        return wanted["as_is"]
    if isinstance(wanted, Mapping) and "range" in wanted:
        length = wanted["range"]
        return torch.arange(length) if isinstance(length, int) else [torch.arange(each) for each in length]
    if isinstance(wanted, Mapping) and "several" in wanted:
        return [torch.randn(batch, *wanted["each"], generator=generator) for _ in range(wanted["several"])]
    if isinstance(wanted, Mapping) and "each" in wanted:
        return list(torch.randn(batch, *wanted["each"], generator=generator))
    if isinstance(wanted, Mapping):
        rows = [] if wanted.get("shared") else [batch]
        return torch.full([*rows, *wanted["shape"]], wanted["value"], dtype=torch.float32)
    return torch.randn(batch, *wanted, generator=generator)
