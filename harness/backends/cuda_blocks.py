"""Formats in blocks on tensor cores, by `torch.nn.functional.scaled_mm`: NVFP4 and MXFP8 on Blackwell, FP8 in blocks on Hopper.

Activations are quantized by the functions that `simulate` calls, so codes and scales are the same; the product sums in its own order, in
float32, and leaves in float32. NVFP4's two float32 scales (a sample's, the weight's) follow it. Quantizing is plain torch, a
dozen passes over the rows: compile the model, or read the time as an upper bound.

Not yet run on a device: layouts are held against a reference on the CPU (`tests/backends/test_cuda_blocks.py`). MXFP4 is not here (torch's CUDA
product needs a build with MSLK), nor are MXFP6, INT4 and mixtures, which it does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditbench.harness.backends.base import Kernel, MachineLacks
from ditbench.harness.backends.block_layouts import of_square_blocks, rows_first, swizzled
from ditbench.harness.quant.block_scales import Scales, stored
from ditbench.harness.quant.packing import pack
from ditbench.harness.quant.quantizers import ActQuant, QuantizedWeight, UnevenQuant, blocked_activation
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.spec import E2M1, E4M3, QuantSpec

NAME = "cuda_blocks"
KIND = "measured"
PRIORITY = 20
SUMMARY = "NVFP4 and MXFP8 on Blackwell, FP8_BLOCK on Hopper, by torch's scaled_mm; not yet run on a device"
CAPABILITY = {"NVFP4": (10, None), "MXFP8": (10, None), "FP8_BLOCK": (9, 9)}  # least and largest major version
MULTIPLES = {"NVFP4": (32, 16), "MXFP8": (32, 16), "FP8_BLOCK": (128, 128)}  # of C and of O
ROWS = 16  # so many tokens at a time; fewer are filled up with zeros


def unsupported(recipe: LayerRecipe, device: torch.device) -> str | None:
    return lacks(NAME, recipe, device, tuple(CAPABILITY))


def lacks(backend: str, recipe: LayerRecipe, device: torch.device, formats: Sequence[str]) -> str | None:
    """Why the backend, which knows these formats, cannot run the recipe there."""
    weight, act = recipe.weight, recipe.act
    if not isinstance(weight, QuantizedWeight) or act is None or isinstance(act, UnevenQuant):
        return f"{backend} takes weights and activations in blocks"
    if not (weight.spec.in_blocks and act.spec.in_blocks and weight.spec.name == act.spec.name):
        return f"{backend} takes both sides in one format in blocks; these are {weight.spec.name} and {act.spec.name}"
    name = weight.spec.name
    if name not in formats or not all(_is_usual(spec) for spec in (weight.spec, act.spec)):
        return f"{backend} knows {', '.join(formats)} in their usual blocks; this is {weight.spec.told}"
    (outputs, channels), (of_channels, of_outputs) = weight.codes_OC.shape, MULTIPLES[name]
    if channels % of_channels or outputs % of_outputs:
        return (
            f"{backend} takes {name} of {of_channels}s to {of_outputs}s channels, this layer is {channels} → {outputs}"
        )
    return device_lacks(backend, name, device)


def _is_usual(spec: QuantSpec) -> bool:
    """As the hardware has it: which rule found the scales does not matter."""
    blocks = {"NVFP4": (E2M1, 16), "MXFP8": (E4M3, 32), "FP8_BLOCK": (E4M3, 128)}
    return (spec.number, spec.group_size) == blocks[spec.name] and spec.block_rows in (1, 128)


def device_lacks(backend: str, name: str, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"{backend} runs on CUDA devices, the device is {device}"
    if not hasattr(F, "scaled_mm"):
        return MachineLacks(
            f"{backend} needs torch.nn.functional.scaled_mm, which this torch lacks", "pip install -U torch"
        )
    least, most = CAPABILITY[name]
    found, _ = torch.cuda.get_device_capability(device)
    if found < least or (most is not None and found > most):
        wanted = f"{least}.x" if most == least else f"{least}.0 or newer"
        return MachineLacks(f"{backend} runs {name} on compute capability {wanted}, this device has {found}.x")
    return None


def make_kernel(recipe: LayerRecipe, weight_OC: Tensor) -> Kernel:
    assert isinstance(recipe.weight, QuantizedWeight) and recipe.act is not None
    return BlockKernel(recipe.weight, recipe.act)


class BlockKernel(Kernel):
    """Codes as the product takes them, scales as they are counted; those are laid out on first use."""

    codes: Tensor
    scale_RG: Tensor
    tensor_scale: Tensor | None

    def __init__(self, weight: QuantizedWeight, act: ActQuant) -> None:
        super().__init__()
        self.spec, self.act = weight.spec, act
        if act.scale is not None:
            self.act_scale = act.scale  # counted, and moved with us
        self.register_buffer("codes", packed(weight.codes_OC, weight.spec).view(torch.uint8))
        self.register_buffer("scale_RG", weight.scale_OG)
        self.register_buffer("tensor_scale", weight.tensor_scale)
        self._laid_out: Tensor | None = None

    def forget(self) -> None:
        self._laid_out = None

    def forward(self, x: Tensor, step: Tensor | None) -> Tensor:
        if x.dtype == torch.float64:
            raise TypeError(f"{NAME} computes in float32; build a float64 model with backend=simulate")
        x_BTC = x.float()
        codes, scales, _ = blocked_activation(x_BTC, self.act, step)
        codes_MC = stored(codes.flatten(-2)[..., : x.shape[-1]], self.act.spec).flatten(0, -2)
        y_MO = self.product(codes_MC, scales.block.flatten(0, -2))
        return (y_MO.reshape(*x.shape[:-1], -1) * self.tensor_scales(scales)).to(torch.float32)

    def product(self, codes_MC: Tensor, scale_MG: Tensor) -> Tensor:
        """Σ over the blocks of (codes · scale) by the weight's (codes · scale), float32 (M, O)."""
        rows = len(codes_MC)
        lacking = -rows % ROWS
        codes_MC = F.pad(codes_MC.view(torch.uint8), (0, 0, 0, lacking)).view(codes_MC.dtype)
        scale_MG = _with_rows(scale_MG, lacking)
        if self._laid_out is None or self._laid_out.device != self.codes.device:
            self._laid_out = (
                of_square_blocks(self.scale_RG) if self.spec.scale == "float32" else swizzled(self.scale_RG)
            )
        laid_out_M = rows_first(scale_MG) if self.spec.scale == "float32" else swizzled(scale_MG)
        return self.multiplied(packed(codes_MC, self.act.spec), laid_out_M, self._laid_out)[:rows]

    def multiplied(self, a: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
        """a, packed, by our codes; scales as they are laid out."""
        return F.scaled_mm(
            a,
            self.codes.view(product_dtype(self.spec)).t(),
            *(scale_a, recipe_of(self.act.spec)),
            *(scale_b, recipe_of(self.spec)),
            **swizzles(self.spec),
            output_dtype=torch.float32,
        )

    def tensor_scales(self, scales: Scales) -> Tensor | float:
        """Of both sides; (B, 1, …) or 1."""
        if scales.tensor is None or self.tensor_scale is None:
            return 1.0
        return scales.tensor * self.tensor_scale


def product_dtype(spec: QuantSpec) -> torch.dtype:
    return torch.float4_e2m1fn_x2 if spec.number == E2M1 else torch.float8_e4m3fn


def packed(codes_MC: Tensor, spec: QuantSpec) -> Tensor:
    """As the product takes them: e2m1 two to a byte, the first in the low half."""
    if spec.number != E2M1:
        return codes_MC.contiguous()
    return pack(codes_MC, spec.bits).view(torch.float4_e2m1fn_x2)


def recipe_of(spec: QuantSpec) -> Any:
    kinds = {16: F.ScalingType.BlockWise1x16, 32: F.ScalingType.BlockWise1x32, 128: F.ScalingType.BlockWise1x128}
    assert spec.group_size is not None
    return F.ScalingType.BlockWise128x128 if spec.block_rows == 128 else kinds[spec.group_size]


def swizzles(spec: QuantSpec) -> dict[str, Any]:
    kind = F.SwizzleType.NO_SWIZZLE if spec.scale == "float32" else F.SwizzleType.SWIZZLE_32_4_4
    return {"swizzle_a": kind, "swizzle_b": kind}


def _with_rows(scale_MG: Tensor, lacking: int) -> Tensor:
    """Of rows that are all zero."""
    if not lacking:
        return scale_MG
    if scale_MG.dtype == torch.float32:
        return F.pad(scale_MG, (0, 0, 0, lacking), value=1.0)
    return F.pad(scale_MG.view(torch.uint8), (0, 0, 0, lacking)).view(scale_MG.dtype)
