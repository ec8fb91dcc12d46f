"""What the Triton kernels ask of a recipe and a device; imports no triton."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from ditbench.harness.backends.base import MachineLacks
from ditbench.harness.backends.integers import act_lacks
from ditbench.harness.quant.quantizers import ActQuant


def device_lacks(name: str, device: torch.device, capability: tuple[int, int] = (8, 0)) -> str | None:
    """What is missing to launch a kernel there; capability: the oldest chip (8.0 Ampere, 8.9 Ada, 9.0 Hopper)."""
    if device.type != "cuda":
        return f"{name} runs on CUDA devices, the device is {device}"
    if find_spec("triton") is None:
        return MachineLacks(f"{name} needs triton, which comes with torch's CUDA wheels on Linux", "pip install triton")
    found = torch.cuda.get_device_capability(device)
    if found < capability:
        versions = [".".join(map(str, each)) for each in (capability, found)]
        return MachineLacks(f"{name} needs compute capability {versions[0]}, this device has {versions[1]}")
    return None


def rows_lack(name: str, act: ActQuant) -> str | None:
    """Why the kernels cannot round these activations row by row."""
    if act.spec.granularity not in ("per_token", "per_tensor"):
        return f"{name} takes activations per_token or per_tensor, these are {act.spec.granularity}"
    return act_lacks(name, act)
