"""One pass over the input rows: transform, range, scale, rounding. x (M, C) → codes (M, C) with a scale and zero point per row.

A program holds whole rows as tiles (A, B) with A · B = C, channel = a · B + b. A Hadamard rotation in blocks of m = p · q
channels is then x · R = L x Rᵣ with small ±1 matrices Rᵣ = H_q (B = q) and L = I ⊗ H_pᵀ; they are exact in bf16. The
tile is not, so it is multiplied in three parts of 8 bits, which are all of a float32: fewer would move codes that lie near a tie.
Without a rotation A = 1 and B = C.
"""

import os

import triton
import triton.language as tl

# What tl.dot is given: the interpreter would multiply the bit patterns of bf16, so there rounded values go in as float32.
FACTOR = tl.constexpr(tl.float32 if os.environ.get("TRITON_INTERPRET") == "1" else tl.bfloat16)

HALF_TO_EVEN = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding it to |x| < 2²² leaves no room for a fraction


@triton.jit
def round_half_to_even(x):
    x = tl.minimum(tl.maximum(x, -1048576.0), 1048576.0)  # far outside of any code, and NaN becomes something finite
    return (x + HALF_TO_EVEN) - HALF_TO_EVEN


@triton.jit
def round_to_e4m3(x):
    """As `quantizers.to_e4m3`: the cast has nothing left to round. On Ada it goes through float16, the interpreter's cuts."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    large = tl.maximum(power, 0.015625) * 1572864.0
    return (x + large) - large


@triton.jit
def scale_of(smallest, largest, QUANT_MAX: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Of rows whose values lie between the two, which include 0."""
    if SYMMETRIC:
        scale = tl.div_rn(tl.maximum(-smallest, largest), QUANT_MAX)
    else:
        scale = tl.div_rn(largest - smallest, QUANT_MAX)
    return tl.where(scale == 0, 1.0, scale)


@triton.jit
def zero_of(smallest, scale, QUANT_MIN: tl.constexpr, QUANT_MAX: tl.constexpr):
    return tl.minimum(tl.maximum(round_half_to_even(tl.div_rn(-smallest, scale)), QUANT_MIN), QUANT_MAX)


@triton.jit
def codes_of(
    x,
    scale,
    zero,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    STORED_LESS: tl.constexpr,  # codes 0 … 255 are stored less 128
    FLOAT8: tl.constexpr,
):
    scaled = tl.div_rn(x, scale)
    if FLOAT8:
        codes = round_to_e4m3(tl.minimum(tl.maximum(scaled, QUANT_MIN), QUANT_MAX))
    else:
        codes = round_half_to_even(scaled) + zero
        codes = tl.minimum(tl.maximum(codes, QUANT_MIN), QUANT_MAX) - STORED_LESS
    return codes


@triton.jit
def three_parts(x):
    """float32 = high + middle + low, all bf16."""
    high = x.to(tl.bfloat16)
    x -= high.to(tl.float32)
    middle = x.to(tl.bfloat16)
    x -= middle.to(tl.float32)
    return high.to(FACTOR), middle.to(FACTOR), x.to(tl.bfloat16).to(FACTOR)


@triton.jit
def quantize_rows_kernel(
    x_ptr,
    shift_ptr,  # (C,) or None
    divisor_ptr,  # (C,) or None
    signs_ptr,  # int8 (C,) or None
    left_ptr,  # bf16 ±1 (A, A) or None
    right_ptr,  # bf16 ±1 (B, B) or None: no rotation
    static_scale_ptr,  # float32, one per row or (stride 0) one in all; None: from the row itself
    static_zero_ptr,
    codes_ptr,  # (M, C) int8, or float8e4nv
    scale_ptr,  # float32 (M,)
    zero_ptr,  # int32 (M,), of the codes as stored
    transformed_ptr,  # (M, C) or None: x' itself is wanted too
    M,
    C,
    a_length,
    b_length,
    static_stride,
    norm,  # 1 / √m
    clip,
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    STORED_LESS: tl.constexpr,
    FLOAT8: tl.constexpr,
    BF16: tl.constexpr,  # the tile before its rotation has only bf16's bits
    A: tl.constexpr,
    B: tl.constexpr,
    ROWS: tl.constexpr,
):
    a = tl.arange(0, A)[:, None]
    b = tl.arange(0, B)[None, :]
    channel = a * b_length + b
    inside = (a < a_length) & (b < b_length)
    for index in range(ROWS):
        row = tl.program_id(0) * ROWS + index
        if row < M:
            start = row.to(tl.int64) * C
            x = tl.load(x_ptr + start + channel, mask=inside, other=0.0).to(tl.float32)
            if shift_ptr is not None:
                x -= tl.load(shift_ptr + channel, mask=inside, other=0.0).to(tl.float32)
            if divisor_ptr is not None:
                x = tl.div_rn(x, tl.load(divisor_ptr + channel, mask=inside, other=1.0).to(tl.float32))
            if signs_ptr is not None:
                x *= tl.load(signs_ptr + channel, mask=inside, other=0).to(tl.float32)
            if right_ptr is not None:
                right = tl.load(right_ptr + tl.arange(0, B)[:, None] * B + b).to(FACTOR)
                if BF16:
                    x = tl.dot(x.to(FACTOR), right)
                else:
                    high, middle, low = three_parts(x)
                    x = tl.dot(low, right, tl.dot(middle, right, tl.dot(high, right)))
                if left_ptr is not None:
                    left = tl.load(left_ptr + a * A + tl.arange(0, A)[None, :]).to(FACTOR)
                    high, middle, low = three_parts(x)
                    x = tl.dot(left, low, tl.dot(left, middle, tl.dot(left, high)))
                x *= norm
            if transformed_ptr is not None:
                tl.store(transformed_ptr + start + channel, x.to(transformed_ptr.dtype.element_ty), mask=inside)

            zero = 0.0
            # Reductions go over both axes in one step: one after the other, a pass of Triton's compiler fails on sm_100.
            if static_scale_ptr is None:  # padding is 0, which every range includes
                smallest = tl.minimum(tl.min(x), 0.0) * clip
                largest = tl.maximum(tl.max(x), 0.0) * clip
                scale = scale_of(smallest, largest, QUANT_MAX, SYMMETRIC)
                if not SYMMETRIC:
                    zero = zero_of(smallest, scale, QUANT_MIN, QUANT_MAX)
            else:
                scale = tl.load(static_scale_ptr + row * static_stride)
                if not SYMMETRIC:
                    zero = tl.load(static_zero_ptr + row * static_stride)

            codes = codes_of(x, scale, zero, QUANT_MIN, QUANT_MAX, STORED_LESS, FLOAT8)
            tl.store(codes_ptr + start + channel, codes.to(codes_ptr.dtype.element_ty), mask=inside)
            # No code stands for NaN, so the row's scale does; ∞ − ∞ makes it NaN as well.
            not_a_number = tl.sum(tl.where(x == x, 0.0, x)) + (scale - scale)
            tl.store(scale_ptr + row, scale + not_a_number)
            tl.store(zero_ptr + row, (zero - STORED_LESS).to(tl.int32))
