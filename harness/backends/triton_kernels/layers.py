"""Layers on the Triton kernels: what is stored, and the two launches (rows, product) that a call makes."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditbench.harness.backends.activations import NUMBERS
from ditbench.harness.backends.alike import quantizers_alike
from ditbench.harness.backends.base import FusedKernel
from ditbench.harness.backends.triton_kernels import between, launch
from ditbench.harness.backends.triton_kernels.storage import NIBBLE, pack_halves, stored_codes
from ditbench.harness.quant.quantizers import ActQuant, LookupWeight, QuantizedWeight, activation_affine
from ditbench.harness.quant.spec import E4M3
from ditbench.harness.quant.steps import StepTable
from ditbench.harness.quant.transforms import Hadamard, Transform

LARGEST_SIDE = 128  # of the tiles that hold a rotated row; see `activations`
NO_TRANSFORM = Transform()


class Rows:
    """Input rows ready for a product; zero_M counts in the codes as stored; kept_MC is x', if it was asked for and is not x."""

    def __init__(self, codes_MC: Tensor, scale_M: Tensor | None, zero_M: Tensor | None, kept_MC: Tensor | None) -> None:
        self.codes_MC, self.scale_M, self.zero_M, self.kept_MC = codes_MC, scale_M, zero_M, kept_MC


class TritonKernel(FusedKernel):
    """What the products share: the fused pass over the rows, and the low-rank branch.

    act: None leaves activations in bf16.
    """

    activations = frozenset(name for name in NUMBERS if name)

    act: ActQuant | None
    stored: Tensor  # codes, a row per output channel

    def _keep(self, act: ActQuant | None) -> None:
        self.act = act
        if act is not None and act.scale is not None:
            self.act_scale, self.act_zero_point = act.scale, act.zero_point  # counted, and moved with us

    def forward(self, x: Tensor, step: Tensor | None) -> Tensor:
        rows = self.rows(x, step, None, keep=False)
        return self.product(rows, None, None, None, torch.float32).reshape(*x.shape[:-1], len(self.stored))

    def layer(
        self,
        x: Tensor,
        step: Tensor | None,
        transform: Transform | None,
        low_rank: tuple[Tensor, Tensor] | None,
        bias: StepTable | None,
        activation: str | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        if rows is None:
            rows = self.rows(x, step, transform, keep=low_rank is not None)
        bias_O = None if bias is None else bias.at(step).contiguous()
        down_MR = up_OR = None
        if low_rank is not None:
            kept_MC = x.flatten(0, -2) if rows.kept_MC is None else rows.kept_MC
            down_rC, up_OR = low_rank
            down_MR = F.linear(kept_MC.to(down_rC.dtype), down_rC)
        y_MO = self.product(rows, bias_O, down_MR, up_OR, x.dtype, NUMBERS[activation])
        return y_MO.reshape(*x.shape[:-1], len(self.stored))

    def product(
        self,
        rows: Rows,
        bias_O: Tensor | None,
        down_MR: Tensor | None,
        up_OR: Tensor | None,
        dtype: torch.dtype,
        activation: int = 0,
    ) -> Tensor:
        raise NotImplementedError

    def rows_like(self, other: FusedKernel) -> bool:
        return isinstance(other, TritonKernel) and quantizers_alike(self.act, other.act)

    def rows(self, x: Tensor, step: Tensor | None, transform: Transform | None, *, keep: bool) -> Rows:
        """x (…, C) through its transform, quantized; in one launch where `fuses` says so, else torch transforms."""
        transform = transform or NO_TRANSFORM
        moves = not transform.is_identity
        if x.dtype == torch.float64:
            raise TypeError("the CUDA kernels compute in float32; build a float64 model with backend=simulate")
        if self.act is None:
            x = x if transform.is_identity else transform(x.float(), step)
            x_MC = x.flatten(0, -2)
            return Rows(x_MC.bfloat16(), None, None, x_MC if keep else None)
        spec = self.act.spec
        if self.needs_all_rows or not fuses(transform):
            x, transform = transform(x.float(), step), NO_TRANSFORM
        scale, zero_point = self.given_affine(x, step)
        x_MC = x.flatten(0, -2)
        rotation = transform.rotations[0] if transform.rotations else None
        assert rotation is None or isinstance(rotation, Hadamard)
        keep_transformed = keep and not transform.is_identity
        codes_MC, scale_M, zero_M, kept_MC = launch.quantize_rows(
            x_MC,
            None if transform.shift is None else transform.shift.at(step).contiguous(),
            transform.scale_C,
            None if rotation is None else rotation.signs_C,
            [] if rotation is None else [rotation.left_aa.shape[0], rotation.right_bb.shape[0]],
            scale,
            zero_point,
            self.act.clip,
            spec.quant_min,
            spec.quant_max,
            spec.number == E4M3,
            keep_transformed,
        )
        return Rows(codes_MC, scale_M, zero_M, (kept_MC if keep_transformed else x_MC) if keep and moves else None)

    @property
    def needs_all_rows(self) -> bool:
        """Which range a row has is known when all of a sample are."""
        return self.act is not None and self.act.spec.dynamic and self.act.spec.granularity == "per_tensor"

    def given_affine(self, x: Tensor, step: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """scale and zero point, in all or per row, where the input's own rows do not say."""
        assert self.act is not None
        if self.act.spec.dynamic and not self.needs_all_rows:
            return None, None
        affine = activation_affine(x.float() if self.act.spec.dynamic else x, self.act, step)
        scale, zero_point = (_per_row(each, x.shape) for each in affine)
        return scale, zero_point

    def normed(
        self,
        x: Tensor,
        norm: Any,
        factor_BC: Tensor | None,
        shift_BC: Tensor | None,
        step: Tensor | None,
        *,
        keep: bool,
    ) -> tuple[Tensor | None, Rows] | None:
        if self.act is None or self.needs_all_rows:
            return None
        spec = self.act.spec
        y, codes_MC, scale_M, zero_M = between.normed_rows(
            *(x, factor_BC, shift_BC, norm.eps, norm.centred),
            *(*self.given_affine(x, step), self.act.clip),
            *(spec.quant_min, spec.quant_max, spec.number == E4M3, keep),
        )
        return y if keep else None, Rows(codes_MC, scale_M, zero_M, None)


class IntKernel(TritonKernel):
    """Codes by codes on int8 tensor cores. Weights of up to 4 bits are stored two to a byte and unpacked on the way in."""

    scale_OG: Tensor
    zero_OG: Tensor | None
    row_sum_O: Tensor | None

    def __init__(self, weight: QuantizedWeight, act: ActQuant) -> None:
        super().__init__()
        self._keep(act)
        stored, zero_OG, self.middle = stored_codes(weight)
        self.register_buffer("stored", stored)
        self.register_buffer("scale_OG", weight.scale_OG.float().contiguous())
        self.register_buffer("zero_OG", zero_OG)
        # Follows from codes and scales, but part of the state, so that loading a state is all there is to do.
        self.register_buffer("row_sum_O", None if act.spec.symmetric else _row_sum(weight))

    def product(
        self,
        rows: Rows,
        bias_O: Tensor | None,
        down_MR: Tensor | None,
        up_OR: Tensor | None,
        dtype: torch.dtype,
        activation: int = 0,
    ) -> Tensor:
        weight = (self.stored, self.scale_OG, self.zero_OG, self.row_sum_O, self.middle)
        ends = (bias_O, down_MR, up_OR, dtype, activation)
        return launch.int_product(rows.codes_MC, rows.scale_M, rows.zero_M, *weight, *ends)


class Float8Kernel(TritonKernel):
    """e4m3 codes by e4m3 codes, in torch's own product; an activation is a pass of its own behind it, as it is in bf16. The bytes are held as uint8, which no cast of a model changes."""

    scale_O1: Tensor
    one: Tensor

    def __init__(self, weight: QuantizedWeight, act: ActQuant) -> None:
        super().__init__()
        self._keep(act)
        self.register_buffer("stored", weight.codes_OC.contiguous().view(torch.uint8))
        self.register_buffer("scale_O1", weight.scale_OG.float().contiguous())
        self.register_buffer("one", torch.ones(()), persistent=False)

    def product(
        self,
        rows: Rows,
        bias_O: Tensor | None,
        down_MR: Tensor | None,
        up_OR: Tensor | None,
        dtype: torch.dtype,
        activation: int = 0,
    ) -> Tensor:
        assert rows.scale_M is not None
        weight_CO = self.stored.view(torch.float8_e4m3fn).t()
        scale_M1, scale_1O = rows.scale_M[:, None], self.scale_O1.t()
        if dtype == torch.bfloat16:
            fused_O = None if bias_O is None or up_OR is not None else bias_O.to(dtype)
            y_MO = torch._scaled_mm(rows.codes_MC, weight_CO, scale_M1, scale_1O, fused_O, out_dtype=dtype)
            if up_OR is None:
                return y_MO if not activation else between.activate(y_MO, activation, dtype)
            y_MO = y_MO.float()
        else:
            y_MO = torch._scaled_mm(rows.codes_MC, weight_CO, self.one, self.one, out_dtype=torch.float32)
            y_MO = y_MO.mul_(scale_1O).mul_(scale_M1)
        if up_OR is not None:
            assert down_MR is not None
            y_MO = y_MO + F.linear(down_MR, up_OR)
        y_MO = y_MO if bias_O is None else y_MO + bias_O
        return between.activate(y_MO, activation, dtype) if activation else y_MO.to(dtype)


class FloatKernel(TritonKernel):
    """Weights become bf16 on the way into a bf16 product: 16-bit activations, or codes times a table of levels."""

    scale_OG: Tensor | None
    zero_OG: Tensor | None

    def __init__(self, weight: QuantizedWeight | LookupWeight, act: ActQuant | None) -> None:
        super().__init__()
        self._keep(act)
        self.levels, self.middle = None, 0
        scale_OG = zero_OG = None
        if isinstance(weight, LookupWeight):
            self.levels = copy.deepcopy(weight.levels)  # moved with us, and the recipe stays where it is
            self.packed = weight.code_bits <= NIBBLE
            stored = pack_halves(weight.codes_OC, weight.codes_OC.shape[1]) if self.packed else weight.codes_OC
        else:
            stored, zero_OG, self.middle = stored_codes(weight)
            self.packed = weight.spec.bits <= NIBBLE
            scale_OG = weight.scale_OG.float().contiguous()
        self.register_buffer("stored", stored.contiguous())
        self.register_buffer("scale_OG", scale_OG)
        self.register_buffer("zero_OG", zero_OG)

    def product(
        self,
        rows: Rows,
        bias_O: Tensor | None,
        down_MR: Tensor | None,
        up_OR: Tensor | None,
        dtype: torch.dtype,
        activation: int = 0,
    ) -> Tensor:
        table_OL = None if self.levels is None else self.levels().float().contiguous()
        weight = (self.stored, self.packed, self.scale_OG, self.zero_OG, table_OL, self.middle)
        ends = (bias_O, down_MR, up_OR, dtype, activation)
        return launch.float_product(rows.codes_MC, rows.scale_M, rows.zero_M, *weight, *ends)


def fuses(transform: Transform) -> bool:
    """At most one rotation, a Hadamard whose rows fit the tiles: p · q channels in a block, p · blocks and q up to 128."""
    if not transform.rotations:
        return True
    (rotation, *others) = transform.rotations
    if others or not isinstance(rotation, Hadamard):
        return False
    q = len(rotation.right_bb)
    return q <= LARGEST_SIDE and rotation.size // q <= LARGEST_SIDE


def _per_row(value: Tensor | None, shape: torch.Size) -> Tensor | None:
    """A scalar as it is; the ranges of samples repeated for every row."""
    if value is None or value.ndim == 0:
        return value
    return value.expand(*shape[:-1], 1).reshape(-1).contiguous()


def _row_sum(weight: QuantizedWeight) -> Tensor:
    """Σ_c ŵ: in units of the scale (int32) with one scale per row, else float32."""
    groups = weight.scale_OG.shape[1]
    codes_OGg = weight.codes_OC.double().unflatten(1, (groups, -1))
    if weight.zero_point_OG is not None:
        codes_OGg = codes_OGg - weight.zero_point_OG.double()[..., None]
    sum_OG = codes_OGg.sum(-1)
    return sum_OG[:, 0].to(torch.int32) if groups == 1 else (sum_OG * weight.scale_OG.double()).sum(1).float()
