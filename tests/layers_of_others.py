"""Layers as other libraries quantize them, where diffusers makes none without a GPU: for tests and for bench/external_rows.py."""

from __future__ import annotations

import torch
from torch import nn


def of_bitsandbytes(linear: nn.Linear, bits: int) -> nn.Module:
    """bitsandbytes' own layer, int8 or nf4, of the same weights. The module has to be installed."""
    import bitsandbytes.nn as kinds

    shape = linear.in_features, linear.out_features, linear.bias is not None
    if bits == 8:
        made = kinds.Linear8bitLt(*shape, has_fp16_weights=False)
        made.weight = kinds.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        made = kinds.Linear4bit(*shape, compute_dtype=torch.float32, quant_type="nf4")
        made.weight = kinds.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    made.bias = linear.bias
    return made.to("cpu")  # which quantizes
