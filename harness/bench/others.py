"""Other libraries' kernels on the same layers, as a second opinion. Never a default: their arithmetic is theirs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from harness.bench.candidates import COMPILED, Candidate, compiled, in_modes
from harness.errors import UserError
from harness.quant.build import float_copy
from harness.quant.target import Target


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


OTHERS = {"torchao": torchao_int8}
