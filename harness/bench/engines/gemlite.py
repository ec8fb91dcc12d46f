"""gemlite's Triton kernels: int8 weights per channel, dynamic int8 activations per token. Never run here yet."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from ditbench.harness.bench.candidates import called, in_modes
from ditbench.harness.bench.engines.base import Rival, Work, lacks
from ditbench.harness.build.build import float_copy, set_submodule

NAME = "gemlite"


def unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":  # it cannot be imported without
        return f"gemlite runs on CUDA, the device is {device}"
    return lacks(("gemlite",), "gemlite")


def rivals(work: Work) -> Iterator[Rival]:
    from gemlite.helper import A8W8_int8_dynamic

    model = float_copy(work.target, dtype=torch.bfloat16, device=work.device)
    theirs = A8W8_int8_dynamic(device=str(work.device), dtype=torch.bfloat16)
    for name in work.layers:
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear):
            set_submodule(model, name, theirs.from_linear(layer, del_orig=False))
    for each in in_modes("gemlite int8", model, work.target, work.modes):
        yield Rival(each.label, each.mode, partial(called, each.model, work.device), each.held_bytes)
