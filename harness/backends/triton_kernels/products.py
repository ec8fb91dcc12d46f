"""Products of activations with stored weights. y (M, O) = x̂ · Ŵᵀ + (down) · upᵀ + bias, scales and an activation applied at the end.

Weights lie in bytes, groups of `group` channels after each other (one group of all C when scales are per channel). A byte
holds one code, or two: then byte k of a group's `span` = ⌈group / 2⌉ has channel k in its low half and channel k + span in its
high half, so that both halves meet contiguous activations and nothing has to be interleaved.
"""

import triton
import triton.language as tl

from ditbench.harness.backends.triton_kernels.activations import FACTOR
from ditbench.harness.backends.triton_kernels.functions import activated, cast


@triton.jit
def tile_of(M, O, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr):
    """Tiles in an order that keeps eight rows of them in the cache."""
    tiles_m, tiles_o = tl.cdiv(M, BLOCK_M), tl.cdiv(O, BLOCK_O)
    in_band = 8 * tiles_o
    first_m = tl.program_id(0) // in_band * 8
    band = tl.minimum(tiles_m - first_m, 8)
    return first_m + tl.program_id(0) % in_band % band, tl.program_id(0) % in_band // band


@triton.jit
def finish(
    y,
    m,
    o,
    y_ptr,
    scale_ptr,
    bias_ptr,
    down_ptr,
    up_ptr,
    M,
    O,
    rank,
    RANK: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Scale per row, low-rank branch, bias, activation, cast, store."""
    inside_m, inside_o = m < M, o < O
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + m, mask=inside_m, other=0.0)[:, None]
    if down_ptr is not None:
        r = tl.arange(0, RANK)
        down = tl.load(down_ptr + m[:, None] * rank + r, mask=inside_m[:, None] & (r < rank)[None, :], other=0.0)
        up = tl.load(up_ptr + o[:, None] * rank + r, mask=inside_o[:, None] & (r < rank)[None, :], other=0.0)
        y += tl.dot(down.to(FACTOR), tl.trans(up.to(FACTOR)))
    if bias_ptr is not None:
        y += tl.load(bias_ptr + o, mask=inside_o, other=0.0).to(tl.float32)[None, :]
    places = y_ptr + m.to(tl.int64)[:, None] * O + o[None, :]
    y = activated(y, ACTIVATION)
    tl.store(places, cast(y, y_ptr.dtype.element_ty), mask=inside_m[:, None] & inside_o[None, :])


@triton.jit
def int_product_kernel(
    codes_ptr,  # int8 (M, C)
    weight_ptr,  # int8 (O, G · span), or uint8 with two codes in a byte
    y_ptr,
    scale_ptr,  # float32 (M,)
    zero_ptr,  # int32 (M,)
    weight_scale_ptr,  # float32 (O, G)
    weight_zero_ptr,  # int16 (O, G) or None
    row_sum_ptr,  # Σ_c ŵ (O,): int32, in units of the scale, where there is one group; else float32. None: symmetric
    bias_ptr,
    down_ptr,  # (M, rank) or None
    up_ptr,  # (O, rank)
    M,
    O,
    C,
    group,
    span,
    rank,
    steps,  # tiles along a group
    PACKED: tl.constexpr,
    GROUPS: tl.constexpr,
    MIDDLE: tl.constexpr,  # what a packed code of 0 is stored as, if the weights have no zero points
    STEPS: tl.constexpr,  # the same for the interpreter, which cannot count to a tensor; None on a device: no unrolling
    EVEN: tl.constexpr,  # no tile leaves its group
    RANK: tl.constexpr,
    ACTIVATION: tl.constexpr,  # a number of `backends/activations.py`
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Products of whole numbers, exact in int32 within a group (C · 255² < 2³¹, so C < 33,000)."""
    tile_m, tile_o = tile_of(M, O, BLOCK_M, BLOCK_O)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    row_m, row_o = (m % M).to(tl.int64), (o % O).to(tl.int64)  # rows beyond the end are computed and not stored
    whole = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.int32)
    summed = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    for step in range(GROUPS * (steps if STEPS is None else STEPS)):
        g = step // steps
        k = step % steps * BLOCK_K + tl.arange(0, BLOCK_K)
        first = codes_ptr + row_m[:, None] * C + (g * group + k)[None, :]
        stored = weight_ptr + row_o[:, None] * (GROUPS * span) + (g * span + k)[None, :]
        if EVEN:
            a = tl.load(first)
            w = tl.load(stored)
        else:
            a = tl.load(first, mask=(k < span)[None, :], other=0)
            w = tl.load(stored, mask=(k < span)[None, :], other=0)
        if GROUPS > 1:
            whole = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.int32)
        if PACKED:
            if EVEN:
                a_high = tl.load(first + span)
            else:
                a_high = tl.load(first + span, mask=(k + span < group)[None, :], other=0)
            if weight_zero_ptr is None:
                zero_o = MIDDLE
            else:
                zero_o = tl.load(weight_zero_ptr + row_o * GROUPS + g).to(tl.int8)[:, None]
            low = (w & 15).to(tl.int8) - zero_o
            high = (w >> 4).to(tl.int8) - zero_o
            whole = tl.dot(a, tl.trans(low.to(tl.int8)), whole, out_dtype=tl.int32)
            whole = tl.dot(a_high, tl.trans(high.to(tl.int8)), whole, out_dtype=tl.int32)
        else:
            whole = tl.dot(a, tl.trans(w), whole, out_dtype=tl.int32)
            if weight_zero_ptr is not None:  # an 8-bit code less its zero point fits no byte
                zero_o = tl.load(weight_zero_ptr + row_o * GROUPS + g).to(tl.int32)
                whole -= tl.sum(a.to(tl.int32), axis=1)[:, None] * zero_o[None, :]
        if GROUPS > 1:
            summed += whole.to(tl.float32) * tl.load(weight_scale_ptr + row_o * GROUPS + g)[None, :]
    if GROUPS > 1:
        y = summed
        if row_sum_ptr is not None:
            y -= tl.load(zero_ptr + row_m).to(tl.float32)[:, None] * tl.load(row_sum_ptr + row_o)[None, :]
    else:
        if row_sum_ptr is not None:
            whole -= tl.load(zero_ptr + row_m)[:, None] * tl.load(row_sum_ptr + row_o)[None, :]
        y = whole.to(tl.float32) * tl.load(weight_scale_ptr + row_o)[None, :]
    finish(y, m, o, y_ptr, scale_ptr, bias_ptr, down_ptr, up_ptr, M, O, rank, RANK, ACTIVATION)


@triton.jit
def float_product_kernel(
    x_ptr,  # bf16 (M, C), or int8 codes with scale_ptr and zero_ptr
    weight_ptr,  # uint8 (O, G · span)
    y_ptr,
    scale_ptr,  # float32 (M,) or None
    zero_ptr,  # int32 (M,) or None
    weight_scale_ptr,  # float32 (O, G); None: table
    weight_zero_ptr,  # int16 (O, G) or None
    table_ptr,  # float32 (O, L); None: evenly spaced
    bias_ptr,
    down_ptr,
    up_ptr,
    M,
    O,
    C,
    group,
    span,
    levels,
    rank,
    steps,  # tiles along a group
    PACKED: tl.constexpr,
    GROUPS: tl.constexpr,
    MIDDLE: tl.constexpr,
    STEPS: tl.constexpr,
    EVEN: tl.constexpr,
    RANK: tl.constexpr,
    ACTIVATION: tl.constexpr,  # a number of `backends/activations.py`
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Codes become bf16 on the way in. Evenly spaced ones are whole numbers there, so exact; levels of a table go in as
    high + low parts of 8 bits each."""
    tile_m, tile_o = tile_of(M, O, BLOCK_M, BLOCK_O)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    row_m, row_o = (m % M).to(tl.int64), (o % O).to(tl.int64)
    y = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    for step in range(GROUPS * (steps if STEPS is None else STEPS)):
        g = step // steps
        k = step % steps * BLOCK_K + tl.arange(0, BLOCK_K)
        first = x_ptr + row_m[:, None] * C + (g * group + k)[None, :]
        stored = weight_ptr + row_o[:, None] * (GROUPS * span) + (g * span + k)[None, :]
        if EVEN:
            w = tl.load(stored)
        else:
            w = tl.load(stored, mask=(k < span)[None, :], other=0)
        if weight_zero_ptr is None:
            zero_o = MIDDLE
        else:
            zero_o = tl.load(weight_zero_ptr + row_o * GROUPS + g).to(tl.int32)[:, None]
        partial = y
        if GROUPS > 1:
            partial = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
        for half in tl.static_range(2 if PACKED else 1):
            here = k + half * span
            if EVEN:
                x = tl.load(first + half * span)
            else:
                inside = (k < span) & (here < group)
                x = tl.load(first + half * span, mask=inside[None, :], other=0)
            if zero_ptr is not None:
                x = (x.to(tl.int32) - tl.load(zero_ptr + row_m)[:, None]).to(tl.float32)
                if not EVEN:
                    x = tl.where(inside[None, :], x, 0.0)
            x = x.to(FACTOR)
            code = w.to(tl.int32)
            if PACKED:
                code = (code >> (4 * half)) & 15
            if table_ptr is None:
                partial = tl.dot(x, tl.trans((code - zero_o).to(FACTOR)), partial)
            else:
                value = tl.load(table_ptr + row_o[:, None] * levels + code)
                high = value.to(tl.bfloat16)
                low = (value - high.to(tl.float32)).to(tl.bfloat16)
                partial = tl.dot(x, tl.trans(high.to(FACTOR)), partial)
                partial = tl.dot(x, tl.trans(low.to(FACTOR)), partial)
        if GROUPS > 1:
            y += partial * tl.load(weight_scale_ptr + row_o * GROUPS + g)[None, :]
        else:
            y = partial
    if GROUPS == 1 and table_ptr is None:
        y *= tl.load(weight_scale_ptr + row_o)[None, :]
    finish(y, m, o, y_ptr, scale_ptr, bias_ptr, down_ptr, up_ptr, M, O, rank, RANK, ACTIVATION)
