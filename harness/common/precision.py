"""What float32 means on a device: float32."""

from __future__ import annotations

import torch


def compute_float32_in_float32() -> None:
    """From here on the process multiplies and convolves float32 in float32: no TF32, no bfloat16 in its place.

    torch convolves in TF32 on CUDA unless told not to; a setting of the environment (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE) or
    of whoever imports us may say so of products. What a fit, an observer, a simulated layer or a judge computes in
    float32 is meant so. Not undone at the end: torch's two ways of saying it cannot be read back when somebody used both.
    """
    for general in (torch.backends, torch.backends.cudnn):
        general.fp32_precision = "none"  # nothing to inherit
    torch.set_float32_matmul_precision("highest")  # CUDA's products, and those of oneDNN on the CPU and XPU
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.mkldnn.conv.fp32_precision = "ieee"


def float32_precision() -> str:
    """How float32 is computed now: "float32", or what stands in its place for products or convolutions, such as "tf32"."""
    cuda, on_cuda, elsewhere = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
    kinds = (cuda, on_cuda.conv, on_cuda.rnn, elsewhere.matmul, elsewhere.conv)
    found = [kind.fp32_precision for kind in kinds]
    return ", ".join(sorted({each for each in found if each not in ("ieee", "none")})) or "float32"
