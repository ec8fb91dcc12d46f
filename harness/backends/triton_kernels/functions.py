"""Functions of values that several kernels share."""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
GELU_TANH, SILU, GELU_ERF = (
    tl.constexpr(1),
    tl.constexpr(2),
    tl.constexpr(3),
)  # the numbers are those of `backends/activations.py`


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 → dtype, halves to even; Triton's interpreter would cut bf16 off, so there its bits are rounded first."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """x float32. ½ x (1 + tanh u) = x / (1 + e^−2u)."""
    if ACTIVATION == GELU_TANH:
        x = x / (1.0 + tl.exp(-x * (1.5957691216 + 0.0713548163 * x * x)))  # u = √(2/π) (x + 0.044715 x³)
    if ACTIVATION == SILU:
        x = x / (1.0 + tl.exp(-x))
    if ACTIVATION == GELU_ERF:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067812))
    return x
