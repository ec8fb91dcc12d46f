"""How the CUDA backends store weights, and which of them they can."""

from __future__ import annotations

import torch
from torch import Tensor

from ditbench.harness.quant.quantizers import QuantizedWeight

NIBBLE = 4


def pack_halves(codes_OC: Tensor, group: int) -> Tensor:
    """Codes 0 … 15, two to a byte (O, G · ⌈group / 2⌉): byte k of a group has its channels k (low) and k + ⌈group / 2⌉."""
    codes_OGg = codes_OC.to(torch.uint8).unflatten(1, (-1, group))
    span = -(-group // 2)
    low_OGk, high_OGk = codes_OGg[..., :span], codes_OGg[..., span:]
    high_OGk = torch.nn.functional.pad(high_OGk, (0, span - high_OGk.shape[-1]))
    return (low_OGk | (high_OGk << NIBBLE)).flatten(1)


def unpack_halves(packed: Tensor, group: int, width: int) -> Tensor:
    """The inverse of pack_halves → uint8 codes (O, width)."""
    span = -(-group // 2)
    packed_OGk = packed.unflatten(1, (-1, span))
    return torch.cat([packed_OGk & 15, packed_OGk >> NIBBLE], dim=-1)[..., :group].flatten(1)[:, :width]


def stored_codes(weight: QuantizedWeight) -> tuple[Tensor, Tensor | None, int]:
    """Codes as they are stored, their zero points (int16) and what a code of 0 is stored as without zero points.

    Up to 4 bits: uint8, two to a byte, symmetric ones plus `quant_max`. Of 5 to 8 bits: int8; asymmetric ones of up to 7 bits
    less their zero point, of 8 bits less 128.
    """
    group = weight.codes_OC.shape[1] // weight.scale_OG.shape[1]
    codes_OC, zero_OG = weight.codes_OC.to(torch.int16), weight.zero_point_OG
    zero_OG = None if zero_OG is None else zero_OG.to(torch.int16)
    if weight.spec.bits <= NIBBLE:
        return pack_halves(codes_OC - weight.spec.least_code, group), zero_OG, -weight.spec.least_code
    if zero_OG is None:
        return codes_OC.to(torch.int8), None, 0
    if weight.spec.bits < 8:
        return (codes_OC - zero_OG.repeat_interleave(group, 1)).to(torch.int8), None, 0
    return (codes_OC - 128).to(torch.int8), zero_OG - 128, 0
