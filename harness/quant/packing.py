"""Codes of 2 to 8 bits packed without gaps: 8 codes of b bits take b bytes, little end first."""

from __future__ import annotations

import torch
from torch import Tensor

CODES_PER_WORD = 8


def pack(codes_OC: Tensor, bits: int) -> Tensor:
    """Unsigned codes (O, C) in 0 … 2^bits − 1 → uint8 (O, ⌈C / 8⌉ · bits)."""
    if codes_OC.numel() and (int(codes_OC.min()) < 0 or int(codes_OC.max()) >= 2**bits):
        raise ValueError(f"codes lie in {int(codes_OC.min())}…{int(codes_OC.max())}, expected 0…{2**bits - 1}")
    if bits == 8:
        return codes_OC.to(torch.uint8)
    rows, width = codes_OC.shape
    padded = torch.nn.functional.pad(codes_OC.to(torch.uint8), (0, -width % CODES_PER_WORD)).unflatten(1, (-1, 8))
    words = torch.zeros(padded.shape[:-1], dtype=torch.int64, device=codes_OC.device)
    for position in range(CODES_PER_WORD):
        words |= padded[..., position].long() << (bits * position)
    packed = torch.stack([(words >> (8 * byte)) & 0xFF for byte in range(bits)], dim=-1)
    return packed.to(torch.uint8).reshape(rows, -1)


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of pack → uint8 codes (O, width)."""
    if bits == 8:
        return packed
    parts = packed.unflatten(1, (-1, bits)).long()
    words = torch.zeros(parts.shape[:-1], dtype=torch.int64, device=packed.device)
    for byte in range(bits):
        words |= parts[..., byte] << (8 * byte)
    mask = 2**bits - 1
    codes = torch.stack([(words >> (bits * position)) & mask for position in range(CODES_PER_WORD)], dim=-1)
    return codes.to(torch.uint8).flatten(1)[:, :width].contiguous()
