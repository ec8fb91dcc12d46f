"""The kernels as torch operators, opaque to `torch.compile`, so that a compiled model has no graph break at them."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from ditbench.harness.backends.triton_kernels import ways
from ditbench.harness.backends.triton_kernels.activations import quantize_rows_kernel
from ditbench.harness.backends.triton_kernels.products import float_product_kernel, int_product_kernel
from ditbench.harness.quant import hadamard

FLOAT8 = torch.float8_e4m3fn
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
Tile = tuple[int, int, int, int, int]  # BLOCK_M, BLOCK_O, BLOCK_K in bytes of weight, warps, stages
SMALLEST = 16  # side of a tile of tl.dot; 32 along the summed axis of int8
WORTH_A_SEARCH = 2**20  # outputs; compiling a kernel takes seconds
# The last two fit all chips in all formats: 99 KiB of shared memory on Ada and consumer Blackwell.
TILES: tuple[Tile, ...] = (  # of many outputs: the fastest is found out on the device
    (128, 256, 128, 8, 3),
    (128, 128, 128, 4, 4),
    (128, 256, 64, 8, 4),
    (128, 128, 64, 4, 4),
    (64, 128, 128, 4, 4),
    (64, 64, 64, 4, 3),
    (64, 64, 32, 4, 2),
)
TILES_OF_FEW: tuple[Tile, ...] = TILES[-3:]  # the first that fits; larger ones would leave most of a chip idle
INTERPRETED_TILES: tuple[Tile, ...] = ((32, 32, 32, 4, 1),)


@torch.library.custom_op("ditbench::quantize_rows", mutates_args=())
def quantize_rows(
    x_MC: Tensor,
    shift_C: Tensor | None,
    divisor_C: Tensor | None,
    signs_C: Tensor | None,
    rotation: list[int],
    static_scale: Tensor | None,
    static_zero: Tensor | None,
    clip: float,
    quant_min: int,
    quant_max: int,
    float8: bool,
    keep_transformed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes_MC (int8; unsigned 8-bit ones less 128; or float8), scale_M, zero_M (int32), x' in the dtype of x or empty.

    rotation: [p, q] of Hadamard blocks of p · q channels, H_p ⊗ H_q; empty: none.
    static_scale, static_zero: of one element, or one per row; None: dynamic, per row.
    """
    x_MC = x_MC.contiguous()
    codes_MC, scale_M, zero_M, transformed_MC = outputs = _empty_rows(x_MC, float8, keep_transformed)
    if len(x_MC) == 0:
        return outputs
    statics = (static_scale, static_zero)
    constants = {
        "QUANT_MIN": float(quant_min),
        "QUANT_MAX": float(quant_max),
        "SYMMETRIC": quant_min < 0,
        "STORED_LESS": 128.0 if quant_max == 255 else 0.0,
        "FLOAT8": float8,
    }

    def call(fused: bool) -> Any:
        inputs = (x_MC, shift_C, divisor_C, signs_C, rotation)
        if not fused:
            inputs = (_transformed(*inputs), None, None, None, [])
        kept_MC = transformed_MC if keep_transformed else None
        return _launch_rows(*inputs, *statics, codes_MC, scale_M, zero_M, kept_MC, clip, constants)

    given = (x_MC, shift_C, divisor_C, signs_C, *statics)
    key = (quantize_rows_kernel, x_MC.shape[1], *rotation, keep_transformed, *ways.kinds(given), *constants.values())
    with _on(x_MC.device):
        ways.run(key, call, (True, False) if rotation else (True,))
    return outputs


@quantize_rows.register_fake
def _(x_MC, shift, divisor, signs, rotation, scale, zero, clip, quant_min, quant_max, float8, keep_transformed):
    return _empty_rows(x_MC, float8, keep_transformed)


def _empty_rows(x_MC: Tensor, float8: bool, keep_transformed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = x_MC.shape
    return (
        x_MC.new_empty(rows, width, dtype=FLOAT8 if float8 else torch.int8),
        x_MC.new_empty(rows, dtype=torch.float32),
        x_MC.new_empty(rows, dtype=torch.int32),
        x_MC.new_empty((rows, width) if keep_transformed else 0),
    )


def _launch_rows(
    x_MC: Tensor,
    shift_C: Tensor | None,
    divisor_C: Tensor | None,
    signs_C: Tensor | None,
    rotation: list[int],
    static_scale: Tensor | None,
    static_zero: Tensor | None,
    codes_MC: Tensor,
    scale_M: Tensor,
    zero_M: Tensor,
    kept_MC: Tensor | None,
    clip: float,
    constants: dict[str, float | bool],
) -> Any:
    rows, width = x_MC.shape
    left = right = None
    a_length, b_length, norm = 1, width, 1.0
    if rotation:
        p, q = rotation
        left, right = _rotation_sides(p, q, width, x_MC.device)
        a_length, b_length, norm = width // q, q, (p * q) ** -0.5
    a, b = triton.next_power_of_2(a_length), triton.next_power_of_2(b_length)
    if rotation:
        a, b = max(a, SMALLEST), max(b, SMALLEST)
    at_once = 4 if rotation else 1
    return quantize_rows_kernel[(triton.cdiv(rows, at_once),)](
        *(x_MC, shift_C, divisor_C, signs_C, left, right, static_scale, static_zero),
        *(codes_MC, scale_M, zero_M, kept_MC),
        *(rows, width, a_length, b_length),
        0 if static_scale is None or static_scale.numel() == 1 else 1,
        *(norm, clip),
        BF16=x_MC.dtype == torch.bfloat16 and shift_C is None and divisor_C is None,
        A=a,
        B=b,
        ROWS=at_once,
        num_warps=4 if max(a, b if rotation else 1) * b <= 4096 else 8,
        enable_fp_fusion=False,
        **constants,
    )


def _transformed(
    x_MC: Tensor, shift_C: Tensor | None, divisor_C: Tensor | None, signs_C: Tensor | None, rotation: list[int]
) -> Tensor:
    """x' in float32, by torch: for chips that have no room for the tile of a rotated row."""
    x_MC = x_MC.float()
    if shift_C is not None:
        x_MC = x_MC - shift_C.float()
    if divisor_C is not None:
        x_MC = x_MC / divisor_C.float()
    if signs_C is not None:
        x_MC = x_MC * signs_C.float()
    p, q = rotation
    left, right = (hadamard.hadamard(order).to(x_MC) for order in (p, q))
    x_MGpq = x_MC.unflatten(1, (-1, p, q))
    return ((left.T @ (x_MGpq @ right)) * (p * q) ** -0.5).flatten(1)


@torch.library.custom_op("ditbench::int_product", mutates_args=())
def int_product(
    codes_MC: Tensor,
    scale_M: Tensor,
    zero_M: Tensor,
    stored: Tensor,
    weight_scale_OG: Tensor,
    weight_zero_OG: Tensor | None,
    row_sum_O: Tensor | None,
    middle: int,
    bias_O: Tensor | None,
    down_MR: Tensor | None,
    up_OR: Tensor | None,
    dtype: torch.dtype,
    activation: int = 0,
) -> Tensor:
    """y (M, O) in dtype; see `products.int_product_kernel`. stored: int8 a byte per code, uint8 two codes in a byte."""
    y_MO = codes_MC.new_empty(len(codes_MC), len(stored), dtype=dtype)
    packed = stored.dtype == torch.uint8
    groups, *sizes = _sizes(codes_MC, stored, weight_scale_OG, packed)
    rank = 0 if up_OR is None else up_OR.shape[1]
    if y_MO.numel():
        _launch(
            int_product_kernel,
            (codes_MC, stored, y_MO, scale_M, zero_M, weight_scale_OG, weight_zero_OG, row_sum_O)
            + (bias_O, down_MR, up_OR, *sizes, rank),
            groups=groups,
            span=sizes[-1],
            rank=rank,
            even=not packed or sizes[-2] == 2 * sizes[-1],
            PACKED=packed,
            MIDDLE=middle,
            ACTIVATION=activation,
        )
    return y_MO


@int_product.register_fake
def _(codes_MC, scale, zero, stored, weight_scale, weight_zero, row_sum, middle, bias, down, up, dtype, activation=0):
    return codes_MC.new_empty(len(codes_MC), len(stored), dtype=dtype)


@torch.library.custom_op("ditbench::float_product", mutates_args=())
def float_product(
    x_MC: Tensor,
    scale_M: Tensor | None,
    zero_M: Tensor | None,
    stored: Tensor,
    packed: bool,
    weight_scale_OG: Tensor | None,
    weight_zero_OG: Tensor | None,
    table_OL: Tensor | None,
    middle: int,
    bias_O: Tensor | None,
    down_MR: Tensor | None,
    up_OR: Tensor | None,
    dtype: torch.dtype,
    activation: int = 0,
) -> Tensor:
    """y (M, O) in dtype; see `products.float_product_kernel`. x_MC: bf16, or int8 codes with scale_M and zero_M."""
    y_MO = x_MC.new_empty(len(x_MC), len(stored), dtype=dtype)
    groups, *sizes = _sizes(x_MC, stored, weight_scale_OG, packed)
    rank = 0 if up_OR is None else up_OR.shape[1]
    levels = 0 if table_OL is None else table_OL.shape[1]
    if y_MO.numel():
        _launch(
            float_product_kernel,
            (x_MC.contiguous(), stored, y_MO, scale_M, zero_M, weight_scale_OG, weight_zero_OG, table_OL)
            + (bias_O, down_MR, up_OR, *sizes, levels, rank),
            groups=groups,
            span=sizes[-1],
            rank=rank,
            even=not packed or sizes[-2] == 2 * sizes[-1],
            PACKED=packed,
            MIDDLE=middle,
            ACTIVATION=activation,
        )
    return y_MO


@float_product.register_fake
def _(x_MC, scale, zero, stored, packed, weight_scale, weight_zero, table, middle, bias, down, up, dtype, activation=0):
    return x_MC.new_empty(len(x_MC), len(stored), dtype=dtype)


def _sizes(x_MC: Tensor, stored: Tensor, weight_scale_OG: Tensor | None, packed: bool) -> list[int]:
    """Groups, M, O, C, channels of a group, bytes of a group."""
    (rows, width), groups = x_MC.shape, 1 if weight_scale_OG is None else weight_scale_OG.shape[1]
    group = width // groups
    return [groups, rows, len(stored), width, group, -(-group // 2) if packed else group]


def _launch(
    kernel: Any, arguments: tuple, *, groups: int, span: int, rank: int, even: bool, **constants: int | bool
) -> None:
    """even: all halves of all bytes are used. The tile is chosen at the first call of a shape."""
    rows, outputs = arguments[2].shape

    def call(tile: Tile) -> Any:
        block_m, block_o, block_k, warps, stages = tile
        return kernel[(triton.cdiv(rows, block_m) * triton.cdiv(outputs, block_o),)](
            *arguments,
            triton.cdiv(span, block_k),
            STEPS=triton.cdiv(span, block_k) if INTERPRETED else None,
            GROUPS=groups,
            EVEN=even and span % block_k == 0,
            RANK=max(SMALLEST, triton.next_power_of_2(rank)),
            BLOCK_M=block_m,
            BLOCK_O=block_o,
            BLOCK_K=block_k,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=groups > 1,  # with one scale a channel, what follows the sums is simulate's, step by step
            **constants,
        )

    many = rows * outputs >= WORTH_A_SEARCH
    tiles = INTERPRETED_TILES if INTERPRETED else TILES if many else TILES_OF_FEW
    key = (kernel, groups, *ways.kinds(arguments), *constants.values())
    with _on(arguments[2].device):
        ways.run(key, call, tuple(dict.fromkeys(_fitted(tile, span) for tile in tiles)), timed=many)


def _on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device and its stream, wherever its arguments lie."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _fitted(tile: Tile, span: int) -> Tile:
    """A tile is no deeper than a group; 32 is the least that int8 products take."""
    block_m, block_o, block_k, warps, stages = tile
    return block_m, block_o, min(block_k, max(32, triton.next_power_of_2(span))), warps, stages


@cache
def _rotation_sides(p: int, q: int, width: int, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """Signs of L (A, A) and R (B, B), padded with zeros to powers of two; see `activations`."""
    right = hadamard.hadamard(q)
    left = torch.block_diag(*[hadamard.hadamard(p).T] * (width // (p * q))) if p > 1 else None
    return None if left is None else _padded(left, device), _padded(right, device)


def _padded(matrix: Tensor, device: torch.device) -> Tensor:
    size = max(SMALLEST, triton.next_power_of_2(len(matrix)))
    padded = torch.zeros(size, size, dtype=torch.bfloat16)
    padded[: len(matrix), : len(matrix)] = matrix
    return padded.to(device)
