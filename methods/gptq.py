"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): weights rounded column by column against the second moment of their input.

    H = 2/n Σ x xᵀ + damp · mean(diag H) · I;  each column's rounding error is spread over the columns not yet rounded

    paper      here         meaning
    H          second moment of the layer's input over samples, tokens and denoising steps (`harness.fitting.blockwise`)
    percdamp   damp         0.01
    act-order  act_order    columns in the order of falling diag(H)

The solver is `harness.quant.gptq`. Blocks are calibrated one after the other on what the rounded blocks before them give.

Departs from the paper: activations are quantized as `bits` says (the paper leaves them in float); the calibration is the
sampler's trajectory, all steps pooled; its size is bounded by `max_bytes`. By default weights are symmetric, as `bits` has it, and
scales of groups inside a block are those of updated weights (`ahead`). form=published: the reference's asymmetric grid, 128
samples, and groups as they stood before their block.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ditbench.harness.calibration.block_stream import MAX_BYTES
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.fitting.blockwise import round_blockwise, weight_from_state, weight_state
from ditbench.harness.fitting.forms import ASYMMETRIC_WEIGHTS, PUBLISHED, Form
from ditbench.harness.fitting.rounding import nearest, static_ranges
from ditbench.harness.quant.gptq import gptq
from ditbench.harness.quant.quantizers import RANGES
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.spec import Bits
from ditbench.harness.quant.target import Target


@dataclass(frozen=True)
class Params:
    """Defaults are those of the reference code but for `ahead`."""

    damp: float = 0.01
    block: int = 128
    act_order: bool = False
    ranges: str = "minmax"  # of the scales: minmax | mse | shrink (the reference's option mse)
    ahead: bool = (
        True  # a group's scale is of its weights with all errors so far; the reference's: as of the last block
    )
    max_bytes: int = MAX_BYTES  # of the hidden states kept at a time: so many rows are used

    def __post_init__(self) -> None:
        if self.ranges not in RANGES:
            raise ValueError(f"gptq: ranges must be one of {', '.join(RANGES)}, got {self.ranges!r}")
        if self.damp < 0 or self.block < 1:
            raise ValueError(f"gptq: damp must be ≥ 0 and block ≥ 1, got {self.damp} and {self.block}")


FORMS = {PUBLISHED: Form({"ahead": False}, ASYMMETRIC_WEIGHTS | {"calibration.n": 128})}


def fit(target: Target, calibration: Calibration, bits: Bits, params: Params) -> dict[str, Tensor]:
    state = static_ranges(target, bits, calibration)
    if bits.weight is None:
        return state
    spec = bits.weight

    def round_weight(name: str, weight_OC: Tensor, hessian_CC: Tensor):
        spec.check_width(name, weight_OC.shape[1])
        return gptq(
            weight_OC,
            hessian_CC,
            spec,
            damp=params.damp,
            block=params.block,
            act_order=params.act_order,
            ranges=params.ranges,
            ahead=params.ahead,
        )

    weights = round_blockwise(target, calibration, round_weight, max_bytes=params.max_bytes)
    for name, weight in weights.items():
        state |= weight_state(name, weight)
    return state


def apply(target: Target, state: dict[str, Tensor], bits: Bits, params: Params) -> ModelRecipe:
    weights = {n: weight_from_state(n, state, bits.weight) for n in target.layers} if bits.weight else {}
    return nearest(target, bits, state, weights=weights)
