"""What stands between two products, as Triton kernels and operators: LayerNorm or RMSNorm with modulation, alone or with the codes of its
result; x + gate · y; rotary positions; activations. bf16 in and out, float32 in between, one rounding at the end.

A program holds whole rows. The norm is one kernel with and without codes: its sums are added in the same order, and no multiplication is
fused with an addition, so that both give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ditbench.harness.backends.triton_kernels import launch
from ditbench.harness.backends.triton_kernels.activations import codes_of, scale_of, zero_of
from ditbench.harness.backends.triton_kernels.functions import activated, cast

AT_ONCE = 2048  # values of a program, where its rows have fewer
VALUES_OF_A_THREAD = 32
FLAT = 1024  # values of a program that does not know rows
EXACTLY: dict[str, Any] = {"enable_fp_fusion": False}


@triton.jit
def normed_kernel(
    x_ptr,  # (M, C)
    factor_ptr,  # (samples or 1, C) or None
    shift_ptr,
    y_ptr,  # (M, C) or None: only codes are wanted
    static_scale_ptr,  # see `quantize_rows_kernel`
    static_zero_ptr,
    codes_ptr,  # None: only y is wanted
    scale_ptr,
    zero_ptr,
    M,
    C,
    tokens,  # rows of a sample
    factor_apart,  # from sample to sample; 0: one for all
    shift_apart,
    static_stride,
    eps,
    clip,
    CENTRED: tl.constexpr,  # LayerNorm; else RMSNorm
    QUANT_MIN: tl.constexpr,
    QUANT_MAX: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    STORED_LESS: tl.constexpr,
    FLOAT8: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    inside = (row < M) & (channel < C)
    places = row.to(tl.int64) * C + channel
    x = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        x = tl.where(inside, x - tl.sum(x, axis=1, keep_dims=True) / C, 0.0)
    variance = tl.sum(x * x, axis=1, keep_dims=True) / C
    y = x * tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    sample = (row // tokens).to(tl.int64)
    if factor_ptr is not None:
        y *= tl.load(factor_ptr + sample * factor_apart + channel, mask=inside, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        y += tl.load(shift_ptr + sample * shift_apart + channel, mask=inside, other=0.0).to(tl.float32)
    rounded = cast(y, x_ptr.dtype.element_ty)
    if y_ptr is not None:
        tl.store(y_ptr + places, rounded, mask=inside)
    if codes_ptr is not None:
        y = rounded.to(tl.float32)
        zero = tl.zeros((ROWS, 1), dtype=tl.float32)
        if static_scale_ptr is None:  # padding is 0, which every range includes
            smallest = tl.minimum(tl.min(y, axis=1, keep_dims=True), 0.0) * clip
            largest = tl.maximum(tl.max(y, axis=1, keep_dims=True), 0.0) * clip
            scale = scale_of(smallest, largest, QUANT_MAX, SYMMETRIC)
            if not SYMMETRIC:
                zero = zero_of(smallest, scale, QUANT_MIN, QUANT_MAX)
        else:
            scale = tl.load(static_scale_ptr + row * static_stride, mask=row < M, other=1.0)
            if not SYMMETRIC:
                zero = tl.load(static_zero_ptr + row * static_stride, mask=row < M, other=0.0)
        codes = codes_of(y, scale, zero, QUANT_MIN, QUANT_MAX, STORED_LESS, FLOAT8)
        tl.store(codes_ptr + places, codes.to(codes_ptr.dtype.element_ty), mask=inside)
        not_a_number = tl.sum(tl.where(y == y, 0.0, y), axis=1, keep_dims=True) + (scale - scale)
        tl.store(scale_ptr + row, scale + not_a_number, mask=row < M)
        tl.store(zero_ptr + row, (zero - STORED_LESS).to(tl.int32), mask=row < M)


@triton.jit
def gated_kernel(x_ptr, gate_ptr, y_ptr, sum_ptr, M, C, tokens, gate_apart, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    inside = (row < M) & (channel < C)
    places = row.to(tl.int64) * C + channel
    gate = tl.load(gate_ptr + (row // tokens).to(tl.int64) * gate_apart + channel, mask=inside, other=0.0)
    y = tl.load(y_ptr + places, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(sum_ptr + places, cast(x + gate.to(tl.float32) * y, sum_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rotary_kernel(
    x_ptr,  # (B · T, N, D)
    cosine_ptr,  # float32 (T, D)
    sine_ptr,
    y_ptr,
    T,
    N,
    D,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """x · cosine + (its neighbours (a, b) along D as (−b, a)) · sine."""
    row = tl.program_id(0)
    n = tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, WIDTH)[None, :]
    inside = (n < N) & (d < D)
    first = row.to(tl.int64) * N * D + n * D
    table = row % T * D + d
    cosine = tl.load(cosine_ptr + table, mask=d < D, other=0.0)
    sine = tl.load(sine_ptr + table, mask=d < D, other=0.0)
    x = tl.load(x_ptr + first + d, mask=inside, other=0.0).to(tl.float32)
    neighbour = tl.load(x_ptr + first + (d ^ 1), mask=inside, other=0.0).to(tl.float32)
    y = x * cosine + tl.where(d % 2 == 0, -neighbour, neighbour) * sine
    tl.store(y_ptr + first + d, cast(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def activate_kernel(x_ptr, y_ptr, count, ACTIVATION: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, cast(activated(x, ACTIVATION), y_ptr.dtype.element_ty), mask=at < count)


@torch.library.custom_op("ditbench::normed", mutates_args=())
def normed(x: Tensor, factor: Tensor | None, shift: Tensor | None, eps: float, centred: bool) -> Tensor:
    """norm(x) · factor + shift of x (B, T, C); factor and shift (B, C) or (1, C)."""
    y = torch.empty_like(x)
    if x.numel():
        _launch_norm(x, factor, shift, y, None, (None, None), None, eps, 1.0, centred)
    return y


@normed.register_fake
def _(x, factor, shift, eps, centred):
    return torch.empty_like(x)


@torch.library.custom_op("ditbench::normed_rows", mutates_args=())
def normed_rows(
    x: Tensor,
    factor: Tensor | None,
    shift: Tensor | None,
    eps: float,
    centred: bool,
    static_scale: Tensor | None,
    static_zero: Tensor | None,
    clip: float,
    quant_min: int,
    quant_max: int,
    float8: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`normed`, or nothing unless keep, with the codes, scales and zero points that `quantize_rows` makes of it."""
    y, codes_MC, scale_M, zero_M = outputs = _empty_normed_rows(x, float8, keep)
    if x.numel():
        kept = y if keep else None
        statics, rows = (static_scale, static_zero), (codes_MC, scale_M, zero_M)
        bounds = (quant_min, quant_max, float8)
        _launch_norm(x, factor, shift, kept, rows, statics, bounds, eps, clip, centred)
    return outputs


@normed_rows.register_fake
def _(x, factor, shift, eps, centred, scale, zero, clip, quant_min, quant_max, float8, keep):
    return _empty_normed_rows(x, float8, keep)


def _empty_normed_rows(x: Tensor, float8: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    return (
        x.new_empty(x.shape if keep else 0),
        x.new_empty(rows, x.shape[-1], dtype=launch.FLOAT8 if float8 else torch.int8),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.int32),
    )


def _launch_norm(
    x: Tensor,
    factor: Tensor | None,
    shift: Tensor | None,
    y: Tensor | None,
    rows: tuple[Tensor, Tensor, Tensor] | None,
    statics: tuple[Tensor | None, Tensor | None],
    bounds: tuple[int, int, bool] | None,
    eps: float,
    clip: float,
    centred: bool,
) -> Any:
    """rows, bounds: None for no codes."""
    quant_min, quant_max, float8 = bounds or (-1, 1, False)
    static = statics[0]
    (grid, tokens), tile = _grid(x), _tile(x.shape[-1])
    with launch._on(x.device):
        return normed_kernel[grid](
            *(x, factor, shift, y, *statics, *(rows or (None, None, None))),
            *(x.shape[:-1].numel(), x.shape[-1], tokens, _apart(factor), _apart(shift)),
            0 if static is None or static.numel() == 1 else 1,
            *(eps, clip),
            CENTRED=centred,
            QUANT_MIN=float(quant_min),
            QUANT_MAX=float(quant_max),
            SYMMETRIC=quant_min < 0,
            STORED_LESS=128.0 if quant_max == 255 else 0.0,
            FLOAT8=float8,
            **tile,
            **EXACTLY,
        )


@torch.library.custom_op("ditbench::gated", mutates_args=())
def gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate · y of x, y (B, T, C), contiguous, and gate (B, C) or (1, C)."""
    total = torch.empty_like(x)
    if x.numel():
        (grid, tokens), tile = _grid(x), _tile(x.shape[-1])
        with launch._on(x.device):
            sizes = (x.shape[:-1].numel(), x.shape[-1], tokens, _apart(gate))
            gated_kernel[grid](x, gate, y, total, *sizes, **tile, **EXACTLY)
    return total


@gated.register_fake
def _(x, gate, y):
    return torch.empty_like(x)


@torch.library.custom_op("ditbench::rotary", mutates_args=())
def rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Of x (B, T, N, D), contiguous; cosine and sine float32 (T, D)."""
    y = torch.empty_like(x)
    if x.numel():
        batch, tokens, heads, width = x.shape
        heads_at_once, width_at_once = triton.next_power_of_2(heads), triton.next_power_of_2(width)
        warps = _warps(heads_at_once * width_at_once)
        tile: dict[str, Any] = {"HEADS": heads_at_once, "WIDTH": width_at_once, "num_warps": warps}
        with launch._on(x.device):
            rotary_kernel[(batch * tokens,)](x, cosine, sine, y, tokens, heads, width, **tile, **EXACTLY)
    return y


@rotary.register_fake
def _(x, cosine, sine):
    return torch.empty_like(x)


@torch.library.custom_op("ditbench::activate", mutates_args=())
def activate(x: Tensor, activation: int, dtype: torch.dtype) -> Tensor:
    """In float32, and cast; x contiguous."""
    y = torch.empty_like(x, dtype=dtype)
    if x.numel():
        with launch._on(x.device):
            grid = (triton.cdiv(x.numel(), FLAT),)
            activate_kernel[grid](x, y, x.numel(), ACTIVATION=activation, SIZE=FLAT, **EXACTLY)
    return y


@activate.register_fake
def _(x, activation, dtype):
    return torch.empty_like(x, dtype=dtype)


def _grid(x: Tensor) -> tuple[tuple[int], int]:
    """Programs for the rows of x (B, T, C), and the rows of a sample."""
    rows = _tile(x.shape[-1])["ROWS"]
    return (triton.cdiv(x.shape[:-1].numel(), rows),), x.shape[1]


def _tile(width: int) -> dict[str, int]:
    wide = triton.next_power_of_2(width)
    rows = max(1, AT_ONCE // wide)
    return {"ROWS": rows, "WIDTH": wide, "num_warps": _warps(rows * wide)}


def _warps(values: int) -> int:
    return min(16, max(1, values // (32 * VALUES_OF_A_THREAD)))


def _apart(rows: Tensor | None) -> int:
    return 0 if rows is None or len(rows) == 1 else rows.stride(0)
