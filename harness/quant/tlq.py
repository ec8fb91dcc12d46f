"""Twin-Log Quantization of weights (LRQ-DiT, Yang et al. 2025, arXiv:2508.03485): two log2 grids per row, one per sign.

Weights are dense near zero with long tails, so levels are spaced evenly in log2 instead of evenly. With η ("unit") a
number per row, and per row and sign a low end ℓ and a step d,

    |ŵ| = η (2^{ℓ + m d} − 1),   m = clamp(round((log2(|w| / η + 1) − ℓ) / d), 0, 2^{b−1} − 1)

which is 2^{L + m d} − η with L = ℓ + log2 η. As η → ∞ the grid becomes sign-magnitude uniform, as η → 0 a pure log grid.

Mode "strict" (the default) keeps the structure of the paper, two log2 quantizers with searched clipping, and fits b bits with
the sign. Searched, by squared error over the layer: η = ρ · std of the row, one ρ; per sign the quantiles of |w| that the
lowest and the highest level stand on. w = 0 counts as positive. Stored beside the codes: ℓ, d per sign in float16, η in float32.

Mode "paper" is Eq. 7 as it is written: |ŵ| = 2^{s (q + z)} with an integer z, s and z per row and sign, the lowest level on
the smallest |w| of its side, the highest on a searched quantile. It has no code for zero either.

Mode "code" is what the released code does (github:yanglianwei/LRQ-DiT @84398f3), for comparison: the statistics of a side
count the weights of the other side as 0 = log2(1); a shift η from a fixed list; 2^{b−1} positive levels, 2^{b−1} + 1
negative ones and a zero, which takes more than b bits and is counted as such. A level may have the wrong sign.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ditbench.harness.common.errors import UserError
from ditbench.harness.quant.quantizers import Levels, LookupWeight
from ditbench.harness.quant.spec import QuantSpec, needs_integers

MODES = ("strict", "paper", "code")
LN2 = math.log(2)
SMALLEST_STEP = 1e-6
TINY = torch.finfo(torch.float32).tiny  # a magnitude of the lowest level that keeps its sign
NARROWEST_ROW = 2.0**-10  # a row's std counts as at least this part of its RMS, or ℓ would outgrow float16
VALUES_AT_A_TIME = 2**22

CODE_SHIFTS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
CODE_QUANTILES = (0.98, 0.99, 0.999, 0.9999, 0.99999)


@dataclass(frozen=True)
class Search:
    """What mode "strict" tries.

    spreads: η in standard deviations of the row. upper, lower: quantiles of |w| on one side, for its ends; lower = (0.0,)
        puts the lowest level on the smallest |w|, as the paper does.
    per_row: choose for each row, which costs no storage, instead of once per layer, as the released code does.
    """

    spreads: tuple[float, ...] = (0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)
    upper: tuple[float, ...] = (0.95, 0.98, 0.99, 0.999, 0.9999, 1.0)
    lower: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
    per_row: bool = False

    def __post_init__(self) -> None:
        if not all(spread > 0 for spread in self.spreads):
            raise ValueError(f"tlq: spreads must be > 0, got {self.spreads}")
        if not 0 <= min(self.lower) <= max(self.lower) < min(self.upper) <= max(self.upper) <= 1:
            raise ValueError(f"tlq: lower quantiles must lie below the upper ones, got {self.lower} and {self.upper}")


class TwinLogLevels(Levels):
    """2^{b−1} rising magnitudes per sign, the positive side first. Columns of (O, 2): positive, negative."""

    low_O2: Tensor
    step_O2: Tensor
    unit_O1: Tensor

    def __init__(self, low_O2: Tensor, step_O2: Tensor, unit_O1: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("low_O2", low_O2)
        self.register_buffer("step_O2", step_O2)
        self.register_buffer("unit_O1", unit_O1)

    @property
    def last(self) -> int:
        """m of the highest level."""
        return 2 ** (self.bits - 1) - 1

    def forward(self) -> Tensor:
        """table_OL, in the precision of the unit (float32 where stored)."""
        m_M = torch.arange(self.last + 1, dtype=self.unit_O1.dtype, device=self.unit_O1.device)
        low_O21, step_O21 = (part.to(self.unit_O1.dtype)[..., None] for part in (self.low_O2, self.step_O2))
        magnitude_O2M = _magnitude(low_O21 + m_M * step_O21, self.unit_O1[..., None]).clamp(min=TINY)
        return torch.cat([magnitude_O2M[:, 0], -magnitude_O2M[:, 1]], dim=1)

    def encode(self, weight_OC: Tensor) -> Tensor:
        """codes_OC: the sign in the highest bit, m in the others; uint8."""
        negative_OC = weight_OC < 0
        low_O2, step_O2, unit_O1 = (part.double() for part in (self.low_O2, self.step_O2, self.unit_O1))
        side_OC = negative_OC.long()
        exponent_OC = torch.log1p(weight_OC.double().abs() / unit_O1) / LN2
        m_OC = ((exponent_OC - low_O2.gather(1, side_OC)) / step_O2.gather(1, side_OC)).round().clamp(0, self.last)
        return ((side_OC << (self.bits - 1)) + m_OC.long()).to(torch.uint8)

    def stored(self) -> TwinLogLevels:
        """With the numbers as they are kept: ends and steps in float16, units in float32."""
        return TwinLogLevels(self.low_O2.half(), self.step_O2.half(), self.unit_O1.float(), self.bits)


def twin_log(weight_OC: Tensor, spec: QuantSpec, mode: str = "strict", search: Search = Search()) -> LookupWeight:
    """Quantize a weight, one pair of grids per row.

    Raises:
        UserError: another granularity than per_channel, e4m3, or mode "code" at 8 bits (its 258 levels fit no byte).
    """
    needs_integers("tlq", spec)
    if spec.granularity != "per_channel":
        raise UserError(f"tlq: its grids are per_channel (one pair per output row); bits.weight is {spec.granularity}")
    weight_OC = weight_OC.double()
    if mode == "strict":
        levels = fit_levels(weight_OC, spec.bits, search).stored()
        return LookupWeight(levels.encode(weight_OC), levels, 2**spec.bits, spec)
    if mode == "paper":
        return _integer_offset(weight_OC, spec, shifts=(0.0,), zero_filled=False)
    if mode == "code":
        if spec.bits == 8:
            raise UserError("tlq: mode code makes 258 levels of 8 bits, which fit no byte; use mode strict or paper")
        return _integer_offset(weight_OC, spec, shifts=CODE_SHIFTS, zero_filled=True)
    raise ValueError(f"tlq: mode {mode!r} is none of {', '.join(MODES)}")


def weight_state(name: str, weight: LookupWeight) -> dict[str, Tensor]:
    """A quantized weight as state tensors of its layer, on the CPU."""
    levels = {f"{name}/levels/{part}": value.cpu() for part, value in weight.levels.state_dict().items()}
    return {f"{name}/codes": weight.codes_OC.cpu()} | levels


def weight_from_state(name: str, state: dict[str, Tensor], spec: QuantSpec) -> LookupWeight:
    """The inverse of `weight_state`."""
    codes_OC = state[f"{name}/codes"]
    table_OL = state.get(f"{name}/levels/table_OL")
    if table_OL is not None:
        return LookupWeight(codes_OC, Levels(table_OL), table_OL.shape[1], spec)
    low_O2, step_O2, unit_O1 = (state[f"{name}/levels/{part}"] for part in ("low_O2", "step_O2", "unit_O1"))
    return LookupWeight(codes_OC, TwinLogLevels(low_O2, step_O2, unit_O1, spec.bits), 2**spec.bits, spec)


def fit_levels(weight_OC: Tensor, bits: int, search: Search = Search()) -> TwinLogLevels:
    """Mode "strict": the searched levels, float64.

    The sides do not interact, so that for each spread R every pair P of ends is tried once per side.
    """
    unit_OR = _row_spread(weight_OC)[:, None] * torch.tensor(
        search.spreads, dtype=torch.float64, device=weight_OC.device
    )
    sides = [_Side(weight_OC.clamp(min=0), weight_OC >= 0), _Side(-weight_OC.clamp(max=0), weight_OC < 0)]
    rows = torch.arange(len(weight_OC), device=weight_OC.device)
    ends, scores = [], []
    for side in sides:
        low_ORP, step_ORP = side.candidates(unit_OR, bits, search)
        error_ORP = side.errors(low_ORP, step_ORP, unit_OR, bits)
        if not search.per_row:
            error_ORP = error_ORP.sum(0, keepdim=True).expand_as(error_ORP)
        score_OR, pair_OR = error_ORP.min(-1)
        ends.append([part.gather(-1, pair_OR[..., None])[..., 0] for part in (low_ORP, step_ORP)])
        scores.append(score_OR)
    best_O = (scores[0] + scores[1]).argmin(1)
    low_O2, step_O2 = (torch.stack([side[part][rows, best_O] for side in ends], 1) for part in (0, 1))
    return TwinLogLevels(low_O2, step_O2, unit_OR[rows, best_O][:, None], bits)


def shift_form(exponent: Tensor, fraction_bits: int) -> tuple[Tensor, Tensor]:
    """2^exponent ≈ multiplier · 2^shift: the integer form that the paper gives for hardware.

    exponent = f + r with 0 ≤ r < 1; multiplier = round(2^r · 2^I), shift = f − I, I = fraction_bits. The relative error
    is at most 2^−(I+1). Only a grid without the shift η ("paper") has levels of this form.
    """
    whole = exponent.floor()
    return torch.round(2.0 ** (exponent - whole + fraction_bits)).long(), whole.long() - fraction_bits


class _Side:
    """The weights of one sign, sorted with running sums: a candidate's error costs a look-up per level, not per weight."""

    def __init__(self, magnitude_OC: Tensor, member_OC: Tensor) -> None:
        self.count_O1 = member_OC.sum(1, keepdim=True)
        self.sorted_OC = magnitude_OC.masked_fill(~member_OC, torch.inf).sort(1).values
        known_OC = self.sorted_OC.masked_fill(self.sorted_OC.isinf(), 0.0)
        start_O1 = known_OC.new_zeros(len(known_OC), 1)
        self.sums_OC = torch.cat([start_O1, known_OC.cumsum(1)], 1)
        self.squares_O1 = known_OC.square().sum(1, keepdim=True)

    def quantile(self, p: float) -> Tensor:
        """Per row, linear between neighbours; 0 for an empty side. (O,)"""
        position_O1 = p * (self.count_O1 - 1).clamp(min=0).double()
        below_O1 = position_O1.floor()
        low, high = (self.sorted_OC.gather(1, at.long()) for at in (below_O1, position_O1.ceil()))
        value_O1 = low + (position_O1 - below_O1) * (high - low)
        return value_O1.masked_fill(self.count_O1 == 0, 0.0)[:, 0]

    def candidates(self, unit_OR: Tensor, bits: int, search: Search) -> tuple[Tensor, Tensor]:
        """Low end and step for every spread and pair of quantiles: (O, R, P) each."""
        ends = {p: torch.log1p(self.quantile(p)[:, None] / unit_OR) / LN2 for p in {*search.upper, *search.lower}}
        pairs = [(lower, upper) for upper in search.upper for lower in search.lower]
        low_ORP = torch.stack([ends[lower] for lower, _ in pairs], -1)
        high_ORP = torch.stack([ends[upper] for _, upper in pairs], -1)
        return low_ORP, ((high_ORP - low_ORP) / (2 ** (bits - 1) - 1)).clamp(min=SMALLEST_STEP)

    def errors(self, low_ORP: Tensor, step_ORP: Tensor, unit_OR: Tensor, bits: int) -> Tensor:
        """Squared error of every row for every candidate, (O, R, P)."""
        unit_OK = unit_OR[..., None].expand_as(low_ORP).flatten(1)
        low_OK, step_OK = low_ORP.flatten(1), step_ORP.flatten(1)
        chunk = max(1, VALUES_AT_A_TIME // (len(unit_OK) * 2 ** (bits - 1)))
        parts = zip(low_OK.split(chunk, 1), step_OK.split(chunk, 1), unit_OK.split(chunk, 1), strict=True)
        return torch.cat([self._errors(*part, bits) for part in parts], 1).reshape(low_ORP.shape)

    def _errors(self, low_OK: Tensor, step_OK: Tensor, unit_OK: Tensor, bits: int) -> Tensor:
        m_M = torch.arange(2 ** (bits - 1), dtype=torch.float64, device=low_OK.device)
        low, step, unit = low_OK[..., None], step_OK[..., None], unit_OK[..., None]
        value_OKM = _magnitude(low + m_M * step, unit)
        between_OKM = _magnitude(low + (m_M[:-1] + 0.5) * step, unit)  # where rounding in log2 changes from m to m + 1
        end_OKM = torch.searchsorted(self.sorted_OC, between_OKM.flatten(1)).reshape(between_OKM.shape)
        first = torch.zeros_like(end_OKM[..., :1])
        bounds_OKM = torch.cat([first, end_OKM, first + self.count_O1[..., None]], -1)
        sums_OKM = self.sums_OC.gather(1, bounds_OKM.flatten(1)).reshape(bounds_OKM.shape).diff(dim=-1)
        return self.squares_O1 + (value_OKM * (value_OKM * bounds_OKM.diff(dim=-1) - 2 * sums_OKM)).sum(-1)


def _magnitude(exponent: Tensor, unit: Tensor) -> Tensor:
    return unit * torch.expm1(LN2 * exponent)


def _row_spread(weight_OC: Tensor) -> Tensor:
    """The standard deviation of each row, > 0 for every row. (O,)"""
    rms_O = weight_OC.square().mean(1).sqrt()
    spread_O = torch.maximum(weight_OC.std(1, correction=0), NARROWEST_ROW * rms_O)
    return spread_O.masked_fill(spread_O == 0, 1.0)


def _integer_offset(weight_OC: Tensor, spec: QuantSpec, shifts: tuple[float, ...], zero_filled: bool) -> LookupWeight:
    """Modes "paper" and "code": levels ±(2^{d (q + z)} − η) with integer z; the best η, and per sign the best quantile."""
    steps = 2 ** (spec.bits - 1) if zero_filled else 2 ** (spec.bits - 1) - 1
    counts = (steps, steps + 1) if zero_filled else (steps + 1, steps + 1)
    positive_OC = weight_OC > 0 if zero_filled else weight_OC >= 0
    members = (positive_OC, weight_OC < 0)
    best_error = torch.inf
    for shift in shifts:
        # Only "paper" meets log2(0): a zero sits at the low end of its side.
        exponent_OC = torch.log2((weight_OC.abs() + shift).clamp(min=TINY))
        sides = [
            min(
                (
                    _integer_side(weight_OC, exponent_OC, member, p, steps, count, shift, zero_filled)
                    for p in CODE_QUANTILES
                ),
                key=lambda side: side[0],
            )
            for member, count in zip(members, counts, strict=True)
        ]
        if sides[0][0] + sides[1][0] < best_error:
            best_error, best = sides[0][0] + sides[1][0], sides
    table_OL = torch.cat([best[0][2], -best[1][2]], 1)
    codes_OC = torch.where(members[0], best[0][1], best[1][1] + counts[0])
    if zero_filled:
        codes_OC = codes_OC.masked_fill(weight_OC == 0, table_OL.shape[1])
        table_OL = torch.cat([table_OL, table_OL.new_zeros(len(table_OL), 1)], 1)
    return LookupWeight(codes_OC.to(torch.uint8), Levels(table_OL.float()), table_OL.shape[1], spec)


def _integer_side(
    weight_OC: Tensor,
    exponent_OC: Tensor,
    member_OC: Tensor,
    p: float,
    steps: int,
    count: int,
    shift: float,
    zero_filled: bool,
) -> tuple[float, Tensor, Tensor]:
    """(squared error, codes_OC, magnitudes of the levels (O, count)) of one side."""
    if zero_filled:
        ordered_OC, size_O1 = exponent_OC.masked_fill(~member_OC, 0.0).sort(1).values, None
        last_O1 = torch.full((len(weight_OC), 1), weight_OC.shape[1] - 1, device=weight_OC.device)
    else:
        ordered_OC = exponent_OC.masked_fill(~(member_OC & (weight_OC != 0)), torch.inf).sort(1).values
        size_O1 = ordered_OC.isfinite().sum(1, keepdim=True)
        last_O1 = (size_O1 - 1).clamp(min=0)
    low_O1, high_O1 = ordered_OC[:, :1], ordered_OC.gather(1, (p * last_O1).round().long())
    if size_O1 is not None:
        low_O1, high_O1 = (end.masked_fill(size_O1 == 0, 0.0) for end in (low_O1, high_O1))
    step_O1 = ((high_O1 - low_O1) / steps).clamp(min=SMALLEST_STEP)
    offset_O1 = torch.round(low_O1 / step_O1)
    codes_OC = (torch.round(exponent_OC / step_O1) - offset_O1).clamp(0, count - 1)
    magnitude = lambda codes: 2.0 ** (step_O1 * (codes + offset_O1)) - shift  # noqa: E731
    error = ((magnitude(codes_OC) - weight_OC.abs()).square() * member_OC).sum()
    return float(error), codes_OC.long(), magnitude(torch.arange(count, dtype=torch.float64, device=weight_OC.device))
