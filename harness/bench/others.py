"""Other libraries' kernels on the same layers, as a second opinion. Never a default: their arithmetic is theirs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from ditbench.harness.bench.candidates import COMPILED, Candidate, compiled, in_modes
from ditbench.harness.build.build import float_copy, set_submodule
from ditbench.harness.common.errors import UserError
from ditbench.harness.quant.target import Target


def torchao_int8(target: Target, device: torch.device, modes: tuple[str, ...]) -> Iterator[Candidate]:
    """torchao's int8 weights per channel and dynamic int8 activations per token.

    Compiled by blocks, and by single layers as well: torch 2.13's Inductor writes C++ for the CPU that does not compile where
    layers round one tensor each for itself, as q, k and v do.

    Raises:
        UserError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise UserError("bench --others torchao: pip install torchao") from error

    model = float_copy(target, dtype=torch.bfloat16, device=device)
    wanted = set(target.layers)
    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda _, name: name in wanted)
    candidates = list(in_modes("torchao int8", model, target, modes))
    if COMPILED in modes:
        by_layer = compiled(model, target.layers)
        candidates.append(replace(candidates[0], label="torchao int8 by layer", mode=COMPILED, model=by_layer))
    for candidate in candidates:
        yield replace(candidate, backend="torchao", held_bytes=None)  # its tensors give the size they stand for


def gemlite_int8(target: Target, device: torch.device, modes: tuple[str, ...]) -> Iterator[Candidate]:
    """gemlite's Triton kernels: int8 weights per channel, dynamic int8 activations per token. Never run here yet.

    Raises:
        UserError: gemlite is not installed, or the device is not CUDA (it cannot be imported without).
    """
    if device.type != "cuda":
        raise UserError(f"bench --others gemlite: gemlite runs on CUDA, the device is {device}")
    try:
        from gemlite.helper import A8W8_int8_dynamic
    except ImportError as error:
        raise UserError("bench --others gemlite: pip install gemlite") from error

    model = float_copy(target, dtype=torch.bfloat16, device=device)
    theirs = A8W8_int8_dynamic(device=str(device), dtype=torch.bfloat16)
    for name in target.layers:
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear):
            set_submodule(model, name, theirs.from_linear(layer, del_orig=False))
    for candidate in in_modes("gemlite int8", model, target, modes):
        yield replace(candidate, backend="gemlite")


OTHERS = {"torchao": torchao_int8, "gemlite": gemlite_int8}
