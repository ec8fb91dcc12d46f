"""Our own integer linear for x86 CPUs with AVX512-VNNI (`vnni_kernels/`): int8 arithmetic on weights stored in 8 or 4 bits.

Activations of up to 8 bits are measured, scaled and rounded in one pass; 4-bit weights are unpacked a strip at a time into the
product, so that memory is 4-bit and arithmetic int8; sums, zero points, scales and the cast are its epilogue. Integers are
exact and scales applied in the order of the simulated path: the two give the same bits.

How it is compiled: `vnni_extension.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ditbench.harness.backends.activations import NUMBERS
from ditbench.harness.backends.alike import quantizers_alike
from ditbench.harness.backends.base import FusedKernel, Kernel
from ditbench.harness.backends.few_rows import linear
from ditbench.harness.backends.integers import act_lacks, not_integers, stored_bits, weight_lacks
from ditbench.harness.backends.rotations import all_but_last, as_rows, transformed
from ditbench.harness.backends.vnni_extension import DEPTH, LANES, LIBRARY, cpu_lacks, load_extension
from ditbench.harness.quant.quantizers import ActQuant, QuantizedWeight, activation_affine
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.steps import StepTable
from ditbench.harness.quant.transforms import Transform

NAME = "vnni"
KIND = "measured"
PRIORITY = 5 if torch.cpu._is_amx_tile_supported() else 20  # with AMX, oneDNN's int8 is the faster one where it runs
SUMMARY = "weights and activations of 2 to 8 bits in int8 on x86 CPUs with AVX512-VNNI; every granularity"

OPERATORS = {
    f"{LIBRARY}::quantize_rows": "quantize activations",
    f"{LIBRARY}::rotated_rows": "rotate and quantize activations",
    f"{LIBRARY}::normed_rows": "norm, modulation and codes",
    f"{LIBRARY}::linear": "integer product",
}
MIDDLE = 128  # half the unsigned codes


def unsupported(recipe: LayerRecipe, device: torch.device) -> str | None:
    if problem := not_integers(NAME, recipe):
        return problem
    weight, act = recipe.weight, recipe.act
    assert isinstance(weight, QuantizedWeight) and act is not None
    if problem := weight_lacks(NAME, weight) or act_lacks(NAME, act):
        return problem
    channels = weight.codes_OC.shape[1]
    sizes = {spec.group_size or channels for spec in (weight.spec, act.spec)}
    if len(sizes - {channels}) > 1:
        return f"{NAME} takes groups of one size on both sides, these are {sorted(sizes)}"
    if min(sizes) != channels and min(sizes) % DEPTH:
        return f"{NAME} takes groups of a multiple of {DEPTH} channels, these have {min(sizes)}"
    if device.type != "cpu":
        return f"{NAME} runs on the CPU, the device is {device}"
    return cpu_lacks()


def make_kernel(recipe: LayerRecipe, weight_OC: Tensor) -> Kernel:
    assert isinstance(recipe.weight, QuantizedWeight) and recipe.act is not None
    return VnniKernel(recipe.weight, recipe.act)


class Rows(NamedTuple):
    """An input ready for a product. kept: x' (…, C), if it was asked for and is not x."""

    codes: tuple[Tensor, Tensor, Tensor, Tensor]
    kept: Tensor | None


class VnniKernel(FusedKernel):
    """Sums in int32, scales, bias and what follows in float32."""

    activations = frozenset(name for name in NUMBERS if name)
    bias_dtype = torch.float32

    packed: Tensor
    scale_GO: Tensor
    sum_GO: Tensor
    zero_point_GO: Tensor | None

    def __init__(self, weight: QuantizedWeight, act: ActQuant) -> None:
        super().__init__()
        load_extension()
        self.act, self.bits = act, stored_bits(weight.spec.bits)
        if act.scale is not None:
            self.act_scale, self.act_zero_point = act.scale, act.zero_point  # counted, and moved with us
        self.outputs, self.channels = weight.codes_OC.shape
        self.act_groups = self.channels // (act.spec.group_size or self.channels)
        groups = max(self.act_groups, weight.scale_OG.shape[1])
        codes_OC, zero_point_OG = _as_stored(weight)
        self.is_signed = weight.spec.symmetric
        self.register_buffer("packed", torch.ops.ditbench_vnni.pack_weight(codes_OC.contiguous(), self.bits))
        self.register_buffer("scale_GO", _panelled(weight.scale_OG.float()))
        # Derived from the codes, but part of the state, so that loading a state is all there is to do.
        sum_OG = codes_OC.unflatten(1, (groups, -1)).sum(-1, dtype=torch.int32)
        self.register_buffer("sum_GO", _panelled(sum_OG))
        self.register_buffer("zero_point_GO", None if zero_point_OG is None else _panelled(zero_point_OG.int()))

    @property
    def needs_all_rows(self) -> bool:
        """Which range a row has is known when all of a sample are."""
        return self.act.spec.dynamic and self.act.spec.granularity == "per_tensor"

    def forward(self, x: Tensor, step: Tensor | None) -> Tensor:
        return self.product(self.quantized(x, step), x.shape, None, torch.float32)

    def rows_like(self, other: FusedKernel) -> bool:
        if not isinstance(other, VnniKernel) or len(self.sum_GO) != len(other.sum_GO):
            return False
        return quantizers_alike(self.act, other.act)

    def rows(self, x: Tensor, step: Tensor | None, transform: Transform | None, *, keep: bool) -> Rows:
        if transform is None:
            return Rows(self.quantized(x, step), None)
        if self.needs_all_rows:
            x_moved = transformed(transform, x, step)
            return Rows(self.quantized(x_moved, step), x_moved if keep else None)
        x, last = all_but_last(transform, x, step)
        if last is None:
            return Rows(self.quantized(x, step), x if keep else None)
        kept, *codes = torch.ops.ditbench_vnni.rotated_rows(as_rows(x), *last, keep, *self.quantizer(x, step))
        return Rows(tuple(codes), kept.reshape(x.shape) if keep else None)  # type: ignore[arg-type]

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
        branch = None
        if low_rank is not None:
            down_rC, up_Or = low_rank
            moved = x if rows.kept is None else rows.kept
            branch = linear(linear(moved.to(down_rC.dtype), down_rC), up_Or)
        bias_O = None if bias is None else bias.at(step)
        return self.product(rows.codes, x.shape, bias_O, x.dtype, activation, branch)

    def normed(
        self,
        x: Tensor,
        norm: Any,
        factor_BC: Tensor | None,
        shift_BC: Tensor | None,
        step: Tensor | None,
        *,
        keep: bool,
    ) -> tuple[Tensor, Rows] | None:
        """The floats come with it: they are in the first-level cache."""
        if self.needs_all_rows:
            return None
        factor_BC, shift_BC = (None if row is None else row.float() for row in (factor_BC, shift_BC))
        how = (factor_BC, shift_BC, norm.eps, norm.centred)
        y, *codes = torch.ops.ditbench_vnni.normed_rows(x, *how, *self.quantizer(x, step))
        return y, Rows(tuple(codes), None)  # type: ignore[arg-type]

    def quantized(self, x: Tensor, step: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x' (…, C) → codes, scales, offsets and sums of codes of its rows."""
        x_MC = x.reshape(-1, x.shape[-1]).contiguous()
        x_MC = x_MC if x_MC.dtype == torch.bfloat16 else x_MC.float()
        return torch.ops.ditbench_vnni.quantize_rows(x_MC, *self.quantizer(x, step))

    def quantizer(self, x: Tensor, step: Tensor | None) -> tuple[Any, ...]:
        """What the operators have to know of the quantizer of x (…, C)."""
        spec, groups = self.act.spec, (self.act_groups, self.sum_GO.shape[0])
        return *self.given_affine(x, step), *groups, spec.quant_max, spec.symmetric, self.act.clip

    def product(
        self,
        codes: tuple[Tensor, Tensor, Tensor, Tensor],
        shape: torch.Size,
        bias_O: Tensor | None,
        dtype: torch.dtype,
        activation: str | None = None,
        branch: Tensor | None = None,
    ) -> Tensor:
        """Of rows that come from x' of this shape (…, C): activation(x' · Ŵᵀ + branch + bias) in dtype."""
        weight = (self.packed, self.bits, self.is_signed, self.outputs, self.channels)
        tables = (self.scale_GO, self.sum_GO, self.zero_point_GO)
        result = dtype if dtype == torch.bfloat16 else torch.float32
        if branch is not None:
            branch = branch.contiguous() if branch.dtype == torch.bfloat16 else branch.float().contiguous()
        y_MO = torch.ops.ditbench_vnni.linear(*codes, *weight, *tables, branch, bias_O, NUMBERS[activation], result)
        return y_MO.to(dtype).reshape(*shape[:-1], -1)

    def given_affine(self, x: Tensor, step: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """scale and zero_point per row where the input's own rows do not say: static ranges, and those of a whole sample."""
        if self.act.spec.dynamic and not self.needs_all_rows:
            return None, None
        affine = activation_affine(x.float() if self.act.spec.dynamic else x, self.act, step)
        rows = (*x.shape[:-1], 1)
        scale, zero_point = (None if a is None else a.float().expand(rows).reshape(-1).contiguous() for a in affine)
        return scale, zero_point


def _as_stored(weight: QuantizedWeight) -> tuple[Tensor, Tensor | None]:
    """Codes as int8 with their zero points; asymmetric ones of 8 bits, 0 … 255, are stored less 128."""
    if weight.zero_point_OG is None:
        return weight.codes_OC.to(torch.int8), None
    if weight.spec.bits < 8:
        return weight.codes_OC.to(torch.int8), weight.zero_point_OG
    return (weight.codes_OC.to(torch.int16) - MIDDLE).to(torch.int8), weight.zero_point_OG - MIDDLE


def _panelled(table_OG: Tensor) -> Tensor:
    """(O, G) → (G, O padded to whole panels)."""
    return F.pad(table_OG.T, (0, -len(table_OG) % LANES)).contiguous()
