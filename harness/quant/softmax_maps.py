"""What every form of quantized attention does alike: heads that share keys, masks, and rows that may read nothing."""

from __future__ import annotations

import torch
from torch import Tensor


def for_each_head(shared: Tensor, heads: int) -> Tensor:
    """(B, M, S, D) → (B, N, S, D): keys or values of grouped heads, one of M for N / M query heads beside each other."""
    return shared if shared.shape[1] == heads else shared.repeat_interleave(heads // shared.shape[1], dim=1)


def masked(scores: Tensor, mask: Tensor | None, first: int | None = None) -> Tensor:
    """Scores (B, N, T, S) with −∞ (or what the mask adds) where nothing may be read.

    mask: as torch has it: bool of what may be read, or what is added; broadcast against the scores.
    first: of causal attention, which token the first row is; None of any other.
    """
    if first is not None:
        rows, keys = (torch.arange(size, device=scores.device) for size in scores.shape[-2:])
        scores = scores.masked_fill(keys > (rows + first)[:, None], -torch.inf)
    if mask is None:
        return scores
    return scores.masked_fill(mask.logical_not(), -torch.inf) if mask.dtype == torch.bool else scores + mask


def reads_nothing(scores: Tensor) -> Tensor:
    """(…, T, 1): rows all of whose keys are masked; their outputs are 0, as torch's are."""
    return scores.amax(-1, keepdim=True) == -torch.inf
