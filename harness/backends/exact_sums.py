"""Products of whole numbers in bfloat16 whose float32 sums are exact: on tensor cores the bits that float32 gives.

Codes less their zero points are whole numbers. Where none is larger than 256, and a slice of the columns is chosen such that

    A · max_o Σ_c |w_oc| < 2²⁴        A ≥ |x_c|, c in the slice

the product of the slice is exact:

1. bfloat16 has 8 significant bits, so that it holds every whole number up to 2⁸. Nothing is lost in the cast.
2. The product of two such has at most 2 · 8 bits. Float32 has 24: nothing is lost in a product.
3. Every sum of some of the products of one output, in whatever order or grouping (fused, split over K), is a whole number
   of magnitude Σ |x_c w_oc| < 2²⁴ at most, and float32 holds all of these. Nothing is lost in an addition, and every
   order gives the same number. That is so for units as well that align their addends to the largest and cut off what hangs
   over, as tensor cores do (Fasi et al. 2021, doi:10.7717/peerj-cs.330): below 2²⁴ the last of 24 bits is worth 1 at most.
4. The device must give float32 out (`torch.mm(…, out_dtype=torch.float32)`). Then sums of parts are float32, too, and nothing
   is rounded to bfloat16 on the way, which `allow_bf16_reduced_precision_reduction` permits where bfloat16 comes out; it is
   switched off all the same.

Slices are then added in float32, as exactly as float32 holds the result. Values of the e4m3 grid are no whole numbers: their
sums round, and stay in float32.

torch.mm with an out_dtype exists on CUDA (2.9 … 2.14) and on XPU (2.14). The CPU has none: bfloat16 comes out there, and
that is rounded; it stays in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, reduce

import torch
from torch import Tensor

from ditbench.harness.quant.quantizers import ActQuant
from ditbench.harness.quant.spec import INT

LARGEST = 2**8
EXACT = 2**24
STEP = 64  # columns; a slice is some times as wide: products of odd widths miss the fast kernels


@dataclass(frozen=True)
class WholeWeight:
    """Whole numbers in bfloat16, (O, C); `width` columns of each group are summed exactly with the layer's activations."""

    weight_OC: Tensor
    width: int

    @staticmethod
    def of(weight_OC: Tensor, groups: int, act: ActQuant) -> WholeWeight | None:
        """Of codes less their zero points, float32, whose columns are summed by groups; None where float32 has to multiply."""
        largest = largest_code(act)
        if largest is None or not available(weight_OC.device) or not is_whole(weight_OC):
            return None
        rows = weight_OC.unflatten(1, (groups, -1)).flatten(0, 1)
        return WholeWeight(weight_OC.to(torch.bfloat16), slice_width(rows, largest))

    def product(self, codes: Tensor, columns: slice) -> Tensor:
        """Whole numbers (…, c) by the c columns of one group → float32 (…, O)."""
        codes_Tc = codes.reshape(-1, codes.shape[-1]).to(torch.bfloat16)
        parts = zip(codes_Tc.split(self.width, 1), self.weight_OC[:, columns].split(self.width, 1), strict=True)
        with sums_in_float32():
            total = reduce(Tensor.add_, (multiply(x_Tc, weight_Oc.T) for x_Tc, weight_Oc in parts))
        return total.reshape(*codes.shape[:-1], -1)


def largest_code(act: ActQuant) -> int | None:
    """The largest magnitude of a code less its zero point; None if they are not all whole numbers up to 256."""
    if act.spec.number != INT:
        return None
    if act.zero_point is None:  # symmetric, or dynamic: then it is one of the codes
        return int(act.spec.quant_max)
    zero_points = act.zero_point.rows.float()
    largest = int(max(act.spec.quant_max - zero_points.amin(), zero_points.amax() - act.spec.quant_min))
    return largest if is_whole(zero_points) and largest <= LARGEST else None


def is_whole(values: Tensor) -> bool:
    """Whether all are whole numbers up to 256."""
    return bool(((values == values.round()) & (values.abs() <= LARGEST)).all())


def slice_width(weight_OC: Tensor, largest: int) -> int:
    """How many columns of whole numbers are summed exactly with activations up to `largest`: a multiple of STEP, for as few
    slices of equal width as can be.
    """
    steps_OS = torch.stack([part.float().abs().sum(1) for part in weight_OC.split(STEP, 1)], 1)
    for slices in range(1, steps_OS.shape[1]):
        width = -(-steps_OS.shape[1] // slices)
        most = max(float(part.sum(1).amax()) for part in steps_OS.split(width, 1))
        if largest * most < EXACT:
            return width * STEP
    return STEP  # 64 · 256 · 256 = 2²²


def multiply(x_TC: Tensor, weight_CO: Tensor) -> Tensor:
    """bfloat16 by bfloat16 → float32."""
    return torch.mm(x_TC, weight_CO, out_dtype=torch.float32)


@cache
def available(device: torch.device) -> bool:
    """Whether the device has such a product, and its sums are exact."""
    return device.type not in ("cpu", "meta") and sums_exactly(device)


def sums_exactly(device: torch.device) -> bool:
    """Tried on sums that need all of 24 bits."""
    generator = torch.Generator().manual_seed(0)
    x_TC = torch.randint(-LARGEST, LARGEST + 1, (32, 4096), generator=generator)
    weight_OC = torch.randint(-7, 8, (32, 4096), generator=generator)
    x_TC[0], weight_OC[0] = LARGEST, 15
    x_TC[0, 0] = weight_OC[0, 0] = 1  # the largest sum is odd, and 15/16 of 2²⁴
    try:
        with sums_in_float32():
            found = multiply(x_TC.to(device, torch.bfloat16), weight_OC.to(device, torch.bfloat16).T)
    except RuntimeError:  # and its NotImplementedError: there is no such operator
        return False
    return bool((found.cpu() == x_TC @ weight_OC.T).all())


@contextmanager
def sums_in_float32() -> Iterator[None]:
    """No part of a sum is rounded to bfloat16."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before
