"""How scales of blocks lie in memory where `torch.nn.functional.scaled_mm` takes them; not a backend itself.

Blackwell's block-scaled products (NVFP4, MXFP8) want the scales of 128 rows and 4 blocks together, 512 bytes (cuBLAS, "1D block scaling
factors layout"): row r and block b of such a tile lie at byte 16 · (r mod 32) + 4 · ⌊r / 32⌋ + b, and tiles follow one another along
the blocks, then along the rows. Hopper's FP8 products in blocks want float32: those of activations one block after the other
(stride 1 along the rows), those of weights, 128 × 128, with their blocks filled up to a multiple of 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_ROWS, TILE_BLOCKS, LINES = 128, 4, 32


def swizzled(scale_RG: Tensor) -> Tensor:
    """8-bit scales (R, G) → one after the other as tiles of 128 × 4, filled up with zeros."""
    bytes_RG = scale_RG.view(torch.uint8)
    rows, blocks = bytes_RG.shape
    filled = F.pad(bytes_RG, (0, -blocks % TILE_BLOCKS, 0, -rows % TILE_ROWS))
    tiles = filled.reshape(-1, TILE_ROWS // LINES, LINES, filled.shape[1] // TILE_BLOCKS, TILE_BLOCKS)
    return tiles.permute(0, 3, 2, 1, 4).flatten().view(scale_RG.dtype)


def rows_first(scale_MG: Tensor) -> Tensor:
    """(M, G) with stride 1 along the rows."""
    return scale_MG.t().contiguous().t()


def of_square_blocks(scale_RG: Tensor) -> Tensor:
    """(R, G) of weights in 128 × 128 → (G filled up to a multiple of 4, R), stride 1 along the blocks."""
    return F.pad(scale_RG, (0, -scale_RG.shape[1] % 4)).contiguous().t()
