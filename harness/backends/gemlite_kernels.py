"""W8A8 and W4A16 by gemlite's Triton kernels, on the codes and scales of our weights.

For whoever ships with gemlite and wants its kernels in the table. Never chosen by itself (`backend=gemlite`), and not yet run on a device:
gemlite cannot be imported without one. What its kernels are handed is held against their algebra (`tests/backends/test_gemlite.py`).

- W8A8: int8 weights per channel. It quantizes tokens itself, by max|x| / 127 in float32 as our recipes do without `clip`, but rounds halves
  away from zero where ours go to the even, and no token's scale is below 10⁻⁶. The result is float32.
- W4A16: codes of 4 bits in 32-bit words, (code - zero point) · scale in float32, rounded to bf16 and multiplied by bf16 activations; where a
  scale is a whole channel's, it follows the sums. The result is bf16.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ditbench.harness.backends.base import Kernel
from ditbench.harness.backends.integers import not_even, not_w8a8
from ditbench.harness.backends.others import library_lacks
from ditbench.harness.quant.quantizers import LookupWeight, QuantizedWeight
from ditbench.harness.quant.recipe import LayerRecipe

NAME = "gemlite"
KIND = "measured"
PRIORITY = -1
SUMMARY = "W8A8 and W4A16 by gemlite (pip install gemlite) on CUDA; only when asked for; not yet run on a device"
LANES = 32  # input channels, and those of a group, come in multiples of it: the least that its kernels multiply at once
SIGN = 8  # its codes of 4 bits have no sign: ours from -7 to 7 are moved up, and so is their zero point


def unsupported(recipe: LayerRecipe, device: torch.device) -> str | None:
    problem = _not_w4a16(recipe) if recipe.act is None else not_w8a8(NAME, recipe)
    if problem:
        return problem
    assert isinstance(recipe.weight, QuantizedWeight)
    if recipe.act is not None and recipe.act.clip != 1.0:
        return f"{NAME} quantizes tokens by their largest value; this layer keeps {recipe.act.clip:g} of it"
    if (channels := recipe.weight.codes_OC.shape[1]) % LANES:
        return f"{NAME} takes input channels in multiples of {LANES}, these are {channels}"
    if device.type != "cuda":
        return f"{NAME} runs on CUDA devices, the device is {device}"
    return lacks()


def _not_w4a16(recipe: LayerRecipe) -> str | None:
    weight = recipe.weight
    if weight is None or isinstance(weight, LookupWeight):
        return f"{NAME} takes integers as weights; these are {'in float' if weight is None else 'looked up in a table'}"
    if problem := not_even(NAME, weight.spec):
        return problem
    if weight.spec.bits != 4 or weight.spec.granularity not in ("per_group", "per_channel"):
        return f"{NAME} takes W4A16, weights per group or channel; this is {weight.spec.told}, A16"
    size = _group_size(weight)
    if weight.spec.granularity == "per_group" and (size < LANES or size & (size - 1)):
        return f"{NAME} takes groups of {LANES}, 64, 128, … channels, these have {size}"
    return None


@cache
def lacks() -> str | None:
    return library_lacks(NAME, "gemlite", _library)


def make_kernel(recipe: LayerRecipe, weight_OC: Tensor) -> Kernel:
    assert isinstance(recipe.weight, QuantizedWeight)
    return GemliteKernel(recipe.weight, is_w8a8=recipe.act is not None)


class GemliteKernel(Kernel):
    """What gemlite's own layer packs, as buffers of ours. settings: how its kernels are to read them."""

    packed: Tensor
    scales_GO: Tensor
    zeros: Tensor
    meta_scale: Tensor

    def __init__(self, weight: QuantizedWeight, is_w8a8: bool) -> None:
        super().__init__()
        layer = _w8a8(weight) if is_w8a8 else _w4a16(weight)
        self.dtype = torch.float32 if is_w8a8 else torch.bfloat16
        for name, tensor in zip(("packed", "scales_GO", "zeros", "meta_scale"), layer.get_tensor_args(), strict=True):
            self.register_buffer(name, tensor.detach())
        self.settings = [int(each) for each in layer.get_meta_args()]

    def forward(self, x: Tensor, step: Tensor | None) -> Tensor:
        tensors = [self.packed, self.scales_GO, self.zeros, self.meta_scale]
        product = _library().forward_functional(x.to(self.dtype).contiguous(), None, tensors, self.settings)
        return product if self.dtype == torch.float32 else product.to(x.dtype)


def _w8a8(weight: QuantizedWeight) -> Any:
    """gemlite's layer of int8 codes, a scale for each output."""
    core = _library()
    outputs, channels = weight.codes_OC.shape
    layer = core.GemLiteLinearTriton(
        8,
        group_size=channels,
        in_features=channels,
        out_features=outputs,
        input_dtype=core.DType.INT8,
        output_dtype=core.DType.FP32,
        scaled_activations=True,
    )
    return layer.pack(weight.codes_OC.to(torch.int8).contiguous(), weight.scale_OG[:, :1].float(), None)


def _w4a16(weight: QuantizedWeight) -> Any:
    """gemlite's layer of codes 0 … 15, scales and zero points for each group of an output."""
    core = _library()
    outputs, channels = weight.codes_OC.shape
    layer = core.GemLiteLinearTriton(
        4,
        group_size=_group_size(weight),
        in_features=channels,
        out_features=outputs,
        input_dtype=core.DType.BF16,
        output_dtype=core.DType.BF16,
        scaled_activations=False,
    )
    signed, zero_point = weight.spec.symmetric, weight.zero_point_OG
    codes_OC = (weight.codes_OC.to(torch.int16) + SIGN * signed).to(torch.uint8).contiguous()
    zeros = SIGN if zero_point is None else zero_point.float().contiguous()
    return layer.pack(codes_OC, weight.scale_OG.float().contiguous(), zeros, fma_mode=False)


def _group_size(weight: QuantizedWeight) -> int:
    return weight.codes_OC.shape[1] // weight.scale_OG.shape[1]


@cache
def _library() -> Any:
    """Raises ImportError: this gemlite has no such layer."""
    from gemlite import core
    from gemlite.core import DType, GemLiteLinearTriton, forward_functional  # noqa: F401

    return core
