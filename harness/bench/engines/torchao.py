"""torchao's int8 weights per channel and dynamic int8 activations per token."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ditbench.harness.bench.candidates import COMPILED, called, in_modes
from ditbench.harness.bench.engines.base import Rival, Work, lacks
from ditbench.harness.build.build import float_copy
from ditbench.harness.build.compiled import compiled

NAME = "torchao"


def unavailable(device: torch.device) -> str | None:
    return lacks(("torchao",), "torchao")


def rivals(work: Work) -> Iterator[Rival]:
    """Compiled by blocks, and by single layers as well: torch 2.13's Inductor writes C++ for the CPU that does not compile where
    layers round one tensor each for itself, as q, k and v do.
    """
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = float_copy(work.target, dtype=torch.bfloat16, device=work.device)
    wanted = set(work.layers)
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda _, name: name in wanted)
    for each in in_modes("torchao int8", model, work.target, work.modes):
        yield Rival(each.label, each.mode, partial(called, each.model, work.device))
    if COMPILED in work.modes:
        by_layer = compiled(model, work.layers)
        yield Rival("torchao int8 by layer", COMPILED, partial(called, by_layer, work.device))
