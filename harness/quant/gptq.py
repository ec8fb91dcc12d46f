"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): round column by column, each error spread over the columns not yet rounded.

    H = 2/n Σ x xᵀ + damp · mean(diag H) · I,   U = upper Cholesky factor of H⁻¹ (H⁻¹ = Uᵀ U)
    for each column c:  q_c = quantize(w_c),  e = (w_c − q_c) / U_cc,  w_j ← w_j − e U_cj  for j > c

    paper      here          meaning
    H          hessian_CC    second moment of the layer's (transformed) input, factor 2/n immaterial
    percdamp   damp          share of the mean diagonal added to it
    B          block         columns updated together; does not change the result

Dead channels (H_cc = 0) get weight 0. Scales of a group are taken from the updated weights when the group begins (`ahead`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ditbench.harness.common.errors import UserError
from ditbench.harness.quant.block_scales import stored
from ditbench.harness.quant.quantizers import QuantizedWeight, from_codes, quantize_weight, to_codes
from ditbench.harness.quant.spec import QuantSpec


def gptq(
    weight_OC: Tensor,
    hessian_CC: Tensor,
    spec: QuantSpec,
    *,
    damp: float = 0.01,
    block: int = 128,
    act_order: bool = False,
    ranges: str = "minmax",
    ahead: bool = True,
) -> QuantizedWeight:
    """Codes of weight_OC under spec (per_channel, per_group or per_block) that keep X Wᵀ rather than W.

    act_order: columns in the order of falling diag(H); scales of groups are then those of the original weights.
    ranges: of scales, as in `quantize_weight`.
    ahead: a group that begins inside a block takes its scale from weights that the block's errors have reached; False: from
        those before the block, as the reference code does (the same where blocks and groups are of one size).
    """
    weight = weight_OC.double().clone()
    hessian = hessian_CC.double().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(damp * hessian.diagonal().mean())

    width = weight.shape[1]
    order = (
        torch.argsort(hessian.diagonal(), descending=True, stable=True)
        if act_order
        else torch.arange(width, device=weight.device)
    )
    weight, hessian = weight[:, order], hessian[order][:, order]
    inverse = _upper_factor_of_inverse(hessian, damp)

    group_size = spec.group_size or width
    group_of_column = (order // group_size).tolist()
    original = weight_OC.double().masked_fill(dead, 0)
    scales = _Scales(quantize_weight(original, spec, ranges=ranges), original.abs().amax(), ranges)
    codes = torch.zeros_like(weight)
    for start in range(0, width, block):
        stop = min(start + block, width)
        errors = weight.new_zeros(len(weight), stop - start)
        before = weight if ahead else weight.clone()
        for column in range(start, stop):
            group = group_of_column[column]
            if not act_order and spec.group_size and column % group_size == 0:
                fresh = before[:, column : column + group_size]
                if ahead:
                    fresh = _ahead(weight, inverse, errors, start, column, group_size)
                scales.refresh(group, fresh)
            scale_O, zero_O = scales.of(group)
            codes[:, column] = to_codes(weight[:, column], scale_O, zero_O, spec)
            rounded = from_codes(codes[:, column], scale_O, zero_O)
            errors[:, column - start] = (weight[:, column] - rounded) / inverse[column, column]
            weight[:, column:stop] -= errors[:, column - start, None] * inverse[column, column:stop]
        weight[:, stop:] -= errors @ inverse[start:stop, stop:]
    back = torch.argsort(order)
    return replace(scales.weight, codes_OC=stored(codes[:, back], spec).contiguous())


def _upper_factor_of_inverse(hessian: Tensor, damp: float) -> Tensor:
    try:
        return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    except torch.linalg.LinAlgError as error:
        if not bool(hessian.isfinite().all()):
            raise UserError("what a layer reads in the calibration is not finite, so GPTQ cannot round it") from error
        raise UserError(
            f"damp={damp} is too little for GPTQ of a layer with {len(hessian)} inputs: the second moment of what it reads "
            "cannot be inverted; set method.damp=0.01, or a larger calibration.n"
        ) from error


def _ahead(weight: Tensor, inverse: Tensor, errors: Tensor, start: int, column: int, group_size: int) -> Tensor:
    """The group that begins at column, as it will be once this block's errors so far have reached it."""
    stop = min(column + group_size, weight.shape[1])
    group = weight[:, column:stop].clone()
    block_stop = start + errors.shape[1]
    if stop > block_stop:  # columns beyond the block have not seen this block's errors yet
        seen = errors[:, : column - start] @ inverse[start:column, max(block_stop, column) : stop]
        group[:, max(block_stop, column) - column :] -= seen
    return group


class _Scales:
    """Those of all groups: of the original weight at first, each taken anew when its group begins.

    weight: with the scales as they are kept. tensor_absmax: of the original, for scales with a second level, which stays.
    """

    def __init__(self, weight: QuantizedWeight, tensor_absmax: Tensor, ranges: str) -> None:
        zero_OG = None if weight.zero_point_OG is None else weight.zero_point_OG.clone()
        self.weight = replace(weight, scale_OG=weight.scale_OG.clone(), zero_point_OG=zero_OG)
        self.tensor_absmax, self.ranges = tensor_absmax, ranges
        self.scale_OG = weight.scales().double()

    def of(self, group: int) -> tuple[Tensor, Tensor | None]:
        zero_OG = self.weight.zero_point_OG
        return self.scale_OG[:, group], None if zero_OG is None else zero_OG[:, group].double()

    def refresh(self, group: int, weight_Og: Tensor) -> None:
        fresh = quantize_weight(weight_Og, self.weight.spec, ranges=self.ranges, tensor_absmax=self.tensor_absmax)
        self.weight.scale_OG[:, group] = fresh.scale_OG[:, 0]
        self.scale_OG[:, group] = fresh.scales()[:, 0].double()
        if self.weight.zero_point_OG is not None and fresh.zero_point_OG is not None:
            self.weight.zero_point_OG[:, group] = fresh.zero_point_OG[:, 0]
