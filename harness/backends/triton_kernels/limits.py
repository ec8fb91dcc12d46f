"""What the Triton kernels ask of a recipe and a device; imports no triton."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from harness.backends.triton_kernels.storage import whole_zero_points
from harness.quant.quantizers import ActQuant, QuantizedWeight

LARGEST_WIDTH = 33_000  # C · 255² < 2³¹: sums of products of codes fit int32


def device_lacks(name: str, device: torch.device, capability: tuple[int, int] = (8, 0)) -> str | None:
    """What is missing to launch a kernel there; capability: the oldest chip (8.0 Ampere, 8.9 Ada, 9.0 Hopper)."""
    if device.type != "cuda":
        return f"{name} runs on CUDA devices, the device is {device}"
    if find_spec("triton") is None:
        return f"{name} needs triton, which comes with torch's CUDA wheels on Linux"
    found = torch.cuda.get_device_capability(device)
    if found < capability:
        return f"{name} needs compute capability {'.'.join(map(str, capability))}, this device has {'.'.join(map(str, found))}"
    return None


def weight_lacks(name: str, weight: QuantizedWeight) -> str | None:
    if weight.codes_OC.shape[1] > LARGEST_WIDTH:
        return f"{name} sums in int32, which {weight.codes_OC.shape[1]} input channels could overflow"
    if not whole_zero_points(weight.zero_point_OG):
        return f"{name} takes zero points that are whole numbers"
    return None


def act_lacks(name: str, act: ActQuant) -> str | None:
    if act.spec.granularity not in ("per_token", "per_tensor"):
        return f"{name} takes activations per_token or per_tensor, these are {act.spec.granularity}"
    return None
