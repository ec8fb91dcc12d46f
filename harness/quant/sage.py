"""Attention in 8 and 4 bits, after SageAttention 1, 2 and 3 (Zhang et al., arXiv:2410.02367, 2411.10958, 2505.11594), simulated.

    K' = K − mean(K)                    of all keys, per head and channel: it moves all scores of a row alike, which softmax does not see
    Q' = Q − mean(Q)                    of each block of 128 queries; its share of the scores, mean(Q) K'ᵀ, is added in float
    S  = (Q̂' K̂'ᵀ + mean(Q) K'ᵀ) · scale + mask
    P̃  = exp(S − max S),  l = Σ P̃       per row; P̃ lies in [0, 1], so its scale is known ahead
    O  = (P̂ V̂) / l                      l is summed before P̃ is rounded

    form       q, k                              P̃, v                                    smooth   as
    int8       int8, a scale per "thread"        e4m3: P̃ · 448; v per channel            K        SageAttention 2, its 8 bits
    int8_all   int8, a scale per "thread"        int8: P̃ · 127; v per channel            K        SageAttention 1 (P and V in int8)
    fp8        e4m3, a scale per "thread"        e4m3: P̃ · 448; v per channel            K        SageAttention 2's scales; FlashAttention 3's grid
    nvfp4      e2m1 in blocks of 16 channels     e2m1 in blocks of 16 tokens             Q and K  SageAttention 3

A "thread" is what one thread of the tensor cores holds: of 32 queries those with one index modulo 8 (4 tokens), of 64 keys those with
one index modulo 8, halved (16 tokens). Scales are max|x| / 127 (or 448). In e2m1 a block's scale is e4m3(max|x| / 6), without a second
level; P̃ has two: it is multiplied by 448 · 6 first, so that its blocks' scales use all of e4m3.

Departs from the papers: scores and P̃ of a row are there as a whole, where the kernels go through keys in tiles and round P̃ against the
largest score so far; ties go to even, where the release rounds them away from zero; no 1e-7 is added to a scale; the last block of queries
is averaged over its own tokens, where SageAttention 3 pads it with zeros; products are summed in float32 (kernels: 22 bits or float16).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ditbench.harness.quant.block_scales import block_codes, in_blocks, scales_of
from ditbench.harness.quant.quantizers import affine_from_range, to_codes
from ditbench.harness.quant.softmax_maps import for_each_head, masked, reads_nothing
from ditbench.harness.quant.spec import E2M1, E4M3, INT, NVFP4, QuantSpec, parse_label

PER_THREAD, PER_BLOCK = "per_thread", "per_block"
QUERY_BLOCK = 128  # queries that have a mean of their own
MOST_SCORES = 2**25  # of one sample, that are there at a time

SPECS = {  # of one operand; which values share a scale is said below
    INT: QuantSpec(8, "per_token", dynamic=True),
    E4M3: QuantSpec(8, "per_token", dynamic=True, number=E4M3),
    E2M1: QuantSpec(dynamic=True, **parse_label(NVFP4).act),
}


class Shared(NamedTuple):
    """Which of repeats · lanes · width tokens in a row share a scale: those of one lane."""

    repeats: int
    lanes: int
    width: int


SHARES = {  # of queries and of keys
    PER_THREAD: (Shared(4, 8, 1), Shared(8, 4, 2)),
    PER_BLOCK: (Shared(128, 1, 1), Shared(64, 1, 1)),  # SageAttention 1
}


@dataclass(frozen=True)
class SageRecipe:
    """How the operands of one attention module are rounded; nothing is learned and nothing stored.

    qk, pv: the grid of q and k, of P̃ and v: "int" (8 bits), "e4m3" or "e2m1"; pv None leaves P̃ and v in float.
    share: which tokens of q and k share a scale: "per_thread" or "per_block"; e2m1 has blocks of its own.
    """

    qk: str
    pv: str | None
    share: str = PER_THREAD
    smooth_k: bool = True
    smooth_q: bool = False

    def __post_init__(self) -> None:
        for part, value, known in (
            ("qk", self.qk, tuple(SPECS)),
            ("pv", self.pv, (None, *SPECS)),
            ("share", self.share, tuple(SHARES)),
        ):
            if value not in known:
                raise ValueError(f"attention: {part} must be one of {', '.join(map(str, known))}; got {value!r}")

    @property
    def operand_bits(self) -> tuple[float, float, float, float]:
        """Of q, k, the map and v, with their share of a block's scale."""
        qk, pv = (16.0 if number is None else SPECS[number].stored_bits for number in (self.qk, self.pv))
        return qk, qk, pv, pv

    @property
    def told(self) -> str:
        """One line for a record."""
        shared = "in blocks of 16 channels" if self.qk == E2M1 else self.share
        smooth = " and ".join(name for name, is_so in (("q", self.smooth_q), ("k", self.smooth_k)) if is_so)
        pv = "float" if self.pv is None else _named(self.pv)
        return f"q and k {_named(self.qk)} {shared}, mean of {smooth or 'nothing'} removed, map and v {pv}"


def _named(number: str) -> str:
    return "int8" if number == INT else number


FORMS = {  # of protocol.attention
    "int8": SageRecipe(INT, E4M3),
    "int8_all": SageRecipe(INT, INT),
    "fp8": SageRecipe(E4M3, E4M3),
    "nvfp4": SageRecipe(E2M1, E2M1, smooth_q=True),
}


def sage_attention(
    recipe: SageRecipe,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """What `F.scaled_dot_product_attention` gives, with rounded operands: (B, N, T, D) in the dtype of the query.

    query (B, N, T, D); key (B, M, S, D) and value (B, M, S, E), where M divides N; mask: as torch has it. In float32 (float64 stays).
    Every scale is of one sample and one head, so that a sample does not depend on its batch.
    """
    dtype, heads = query.dtype, query.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (x if x.dtype == torch.float64 else x.float() for x in (query, key, value))
    if recipe.smooth_k:
        key = key - key.mean(-2, keepdim=True)
    means = _block_means(query) if recipe.smooth_q else None
    if means is not None:
        query = query - _of_tokens(means, query.shape[-2])
    queries, keys = (_tokens(x, recipe.qk, share) for x, share in zip((query, key), SHARES[recipe.share], strict=True))
    keys = _Tokens(*(for_each_head(each, heads) for each in keys))
    key, value = (for_each_head(x, heads) for x in (key, _values(value, recipe.pv)))
    rows = max(1, MOST_SCORES // (heads * key.shape[-2] * QUERY_BLOCK)) * QUERY_BLOCK
    outputs = []
    for start in range(0, query.shape[-2], rows):
        part = slice(start, start + rows)
        scores = (queries.codes[:, :, part] @ keys.codes.mT) * (queries.scales[:, :, part] * keys.scales.mT)
        if means is not None:
            blocks = means[:, :, start // QUERY_BLOCK : -(-(start + rows) // QUERY_BLOCK)]
            scores += _of_tokens(blocks @ key.mT, scores.shape[-2])
        of_rows = mask if mask is None or mask.shape[-2] == 1 else mask[..., part, :]
        scores = masked(scores.mul_(scale), of_rows, start if causal else None)
        most = scores.amax(-1, keepdim=True).masked_fill_(reads_nothing(scores), 0)
        weights = (scores - most).exp_()
        total = weights.sum(-1, keepdim=True)
        outputs.append((_map(weights, recipe.pv) @ value) / total.masked_fill_(total == 0, 1))
    return torch.cat(outputs, -2).to(dtype)


class _Tokens(NamedTuple):
    """codes (B, N, T, D), scales (B, N, T, 1): token = code · scale."""

    codes: Tensor
    scales: Tensor


def _tokens(x: Tensor, number: str, share: Shared) -> _Tokens:
    """Queries or keys. Scales of e2m1 are part of its codes: they differ within a token."""
    if number == E2M1:
        return _Tokens(_micro(x), torch.ones_like(x[..., :1]))
    count = x.shape[-2]
    absmax = x.abs().amax(-1)
    lanes = in_blocks(absmax, share.repeats * share.lanes * share.width).unflatten(-1, tuple(share))
    shared = lanes.amax((-3, -1), keepdim=True).expand_as(lanes).flatten(-4)[..., :count, None]
    scale, _ = affine_from_range(-shared, shared, SPECS[number])
    return _Tokens(to_codes(x, scale, None, SPECS[number]), scale)


def _values(value: Tensor, number: str | None) -> Tensor:
    """Per channel over the tokens; e2m1 in blocks of tokens of each channel."""
    if number is None:
        return value
    if number == E2M1:
        return _micro(value.mT).mT
    absmax = value.abs().amax(-2, keepdim=True)
    scale, _ = affine_from_range(-absmax, absmax, SPECS[number])
    return to_codes(value, scale, None, SPECS[number]) * scale


def _map(weights: Tensor, number: str | None) -> Tensor:
    """P̃ in [0, 1], rows along the last dimension."""
    if number is None:
        return weights
    spec = SPECS[number]
    if number == E2M1:
        levels = 448 * spec.quant_max
        return _micro(weights * levels) / levels
    return to_codes(weights * spec.quant_max, torch.ones_like(weights[..., :1]), None, spec) / spec.quant_max


def _micro(x: Tensor) -> Tensor:
    """e2m1 in blocks of 16 along the last dimension, each with a scale in e4m3; as values."""
    spec = SPECS[E2M1]
    assert spec.group_size is not None
    blocks = in_blocks(x, spec.group_size)
    scales = scales_of(blocks.abs().amax(-1), spec, torch.ones((), device=x.device))
    return (block_codes(blocks, scales, spec) * scales.whole()[..., None]).flatten(-2)[..., : x.shape[-1]]


def _block_means(query: Tensor) -> Tensor:
    """(B, N, T, D) → (B, N, G, D), of each block's own tokens."""
    count = query.shape[-2]
    lacking = -count % QUERY_BLOCK
    sums = F.pad(query, (0, 0, 0, lacking)).unflatten(-2, (-1, QUERY_BLOCK)).sum(-2)
    sizes = torch.full((sums.shape[-2], 1), QUERY_BLOCK, device=query.device, dtype=query.dtype)
    sizes[-1] = QUERY_BLOCK - lacking
    return sums / sizes


def _of_tokens(blocks: Tensor, count: int) -> Tensor:
    """(…, G, D) → (…, T, D): each block's row for each of its tokens."""
    return blocks.repeat_interleave(QUERY_BLOCK, -2)[..., :count, :]
