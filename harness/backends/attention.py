"""softmax(q kᵀ · scale + mask) v in bfloat16 on x86 CPUs with AVX512-BF16, by our own kernel; torch's everywhere else.

Torch's kernel takes about twice as long there (`vnni_kernels/attention.cpp` keeps keys and values packed for vdpbf16ps). Both round q,
k, v and probabilities to bfloat16 and sum in float32: each lies as near to the exact result as the other, at single roundings.
It is no part of a recipe, and the same whichever backend runs the linear layers: a simulated model and a real one give the same bits.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ditbench.harness.backends import vnni_extension


@cache
def lacks() -> str | None:
    """Why this machine cannot run the kernel."""
    if not torch.cpu._is_avx512_bf16_supported():
        return "attention in bfloat16 needs a CPU with AVX512-BF16"
    return vnni_extension.cpu_lacks()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As `F.scaled_dot_product_attention`, which runs what the kernel does not: q (B, N, T, D), k and v (B, N, S, D).

    For machines of which `lacks` says nothing.
    """
    if not dropout_p and not is_causal and takes(query, key, value, attn_mask):
        mask = None if attn_mask is None else _added(attn_mask, (*query.shape[:3], key.shape[2]))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        return torch.ops.ditbench_vnni.attention(q, k, v, mask, scale).transpose(1, 2)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel computes this: bfloat16 on the CPU, heads alike and of even size, and no gradient is wanted."""
    tensors = [query, key, value, *([] if mask is None else [mask])]
    return (
        all(x.device.type == "cpu" for x in tensors)
        and all(x.dtype == torch.bfloat16 and x.dim() == 4 for x in (query, key, value))
        and key.shape == value.shape == (*query.shape[:2], key.shape[2], query.shape[3])
        and query.shape[-1] % 2 == 0
        and query.numel() > 0
        and key.numel() > 0
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
    )


def _added(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask of what may be seen, or of what is added to the scores, as float32 of this shape; broadcast rows are not copied."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(mask.logical_not(), -torch.inf)
    mask = mask.float()
    if mask.shape[-1] != shape[-1] or mask.stride(-1) != 1:
        mask = mask.expand(*mask.shape[:-1], shape[-1]).contiguous()
    return mask.expand(shape)
