from __future__ import annotations

import math

import pytest
import torch

from ditbench.harness.backends import onednn_int8, simulate
from ditbench.harness.common.errors import UserError
from ditbench.harness.quant.accounting import stored_bytes
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.spec import QuantSpec
from ditbench.harness.quant.tlq import (
    CODE_QUANTILES,
    CODE_SHIFTS,
    Search,
    TwinLogLevels,
    fit_levels,
    shift_form,
    twin_log,
    weight_from_state,
    weight_state,
)

OTHER = Search(spreads=(0.4, 1.1), upper=(0.9, 0.97, 1.0), lower=(0.0, 0.12))  # away from the defaults
WIDTHS = (2, 3, 4, 8)


def spec(bits: int) -> QuantSpec:
    return QuantSpec(bits, "per_channel")


def test_e4m3_is_no_width_of_a_log_grid(normal):
    with pytest.raises(UserError, match="tlq is about integer codes"):
        twin_log(normal(4, 48), QuantSpec(8, "per_channel", number="e4m3"))


def heavy_tailed(normal, kind: str, rows: int = 32, width: int = 1024):
    """Gaussian with 0.5 % of the weights eight times as large, or Student's t with 4 degrees of freedom."""
    weight = 0.03 * normal(rows, width, seed=1)
    if kind == "tail":
        return torch.where(normal(rows, width, seed=2) > 2.576, 8 * weight, weight)
    return weight / (normal(4, rows, width, seed=3).square().sum(0) / 4).sqrt()


def relative_mse(rounded, weight) -> float:
    return float((rounded - weight).square().mean() / weight.square().mean())


def minmax(weight, bits, clip=1.0):
    low, high = clip * weight.amin(1, keepdim=True), clip * weight.amax(1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    return ((weight - low) / scale).round().clamp(0, 2**bits - 1) * scale + low


def decoded(levels: TwinLogLevels, weight):
    return levels().gather(1, levels.encode(weight).long())


def slow_side(row, members, unit, p_low, p_high, bits):
    """One side of one row, from the equations: {index: value}."""
    last = 2 ** (bits - 1) - 1
    sizes = torch.tensor([abs(row[i]) for i in members], dtype=torch.float64)
    low_end, high_end = (float(torch.quantile(sizes, p)) for p in (p_low, p_high))
    low = math.log2(low_end + unit)
    step = max((math.log2(high_end + unit) - low) / last, 1e-6)
    values = {}
    for i in members:
        m = min(max(round((math.log2(abs(row[i]) + unit) - low) / step), 0), last)
        values[i] = math.copysign(2 ** (low + m * step) - unit, row[i])
    return values


def slow_strict(weight, bits, search):
    """§ TLQ in plain loops: the best spread, and for it the best quantiles per sign, by squared error over the layer."""
    best = (math.inf, None)
    rows = weight.tolist()
    for spread in search.spreads:
        units = [spread * math.sqrt(sum((w - sum(r) / len(r)) ** 2 for w in r) / len(r)) for r in rows]
        total, result = 0.0, [[0.0] * len(r) for r in rows]
        for sign in (1, -1):
            side_best = (math.inf, None)
            for p_high in search.upper:
                for p_low in search.lower:
                    error, found = 0.0, []
                    for row, unit in zip(rows, units, strict=True):
                        members = [i for i, w in enumerate(row) if (w >= 0) == (sign > 0)]
                        values = slow_side(row, members, unit, p_low, p_high, bits)
                        error += sum((values[i] - row[i]) ** 2 for i in members)
                        found.append(values)
                    side_best = min(side_best, (error, found), key=lambda each: each[0])
            total += side_best[0]
            for values, row in zip(side_best[1], result, strict=True):
                for i, value in values.items():
                    row[i] = value
        best = min(best, (total, result), key=lambda each: each[0])
    return torch.tensor(best[1], dtype=torch.float64)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_strict_is_the_equation_in_slow_loops(bits, normal):
    weight = normal(3, 30, seed=bits) * torch.tensor([[0.02], [1.0], [7.0]], dtype=torch.float64)
    weight[0, :3] *= 9
    torch.testing.assert_close(
        decoded(fit_levels(weight, bits, OTHER), weight), slow_strict(weight, bits, OTHER), rtol=1e-9, atol=1e-12
    )


def test_the_errors_from_running_sums_are_those_of_the_rounded_weight(normal):
    """The search must have compared what comes out: no single pair of the grid is better than what it found."""
    weight = normal(4, 50)
    found = float((decoded(fit_levels(weight, 3, OTHER), weight) - weight).square().sum())
    for spread in OTHER.spreads:
        for upper in OTHER.upper:
            for lower in OTHER.lower:
                one = fit_levels(weight, 3, Search((spread,), (upper,), (lower,)))
                assert found <= float((decoded(one, weight) - weight).square().sum()) + 1e-12


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("mode", ["strict", "paper"])
def test_codes_fit_the_bits_with_the_sign(bits, mode, normal):
    weight = twin_log(normal(6, 400), spec(bits), mode)
    assert weight.codes_OC.dtype == torch.uint8 and int(weight.codes_OC.max()) < 2**bits
    assert weight.num_levels == 2**bits and weight.code_bits == bits
    assert all(len(row.unique()) <= 2**bits for row in weight.dequantize())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("stored", [False, True], ids=["float64", "as stored"])
def test_rounding_twice_changes_nothing(bits, stored, normal):
    weight = normal(4, 300)
    weight[0] = weight[0].abs()
    levels = fit_levels(weight, bits)
    levels = levels.stored() if stored else levels
    codes = levels.encode(weight)
    assert torch.equal(levels.encode(levels().gather(1, codes.long())), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_no_sign_flips_and_larger_stays_larger(bits, normal):
    weight = normal(4, 300).sort(dim=1).values
    for levels in (fit_levels(weight, bits), fit_levels(weight, bits).stored()):
        rounded = decoded(levels, weight)
        assert bool((rounded.sign() * weight.sign() >= 0).all())
        assert bool((rounded.diff(dim=1) >= 0).all())


@pytest.mark.parametrize("bits", (3, 4, 8))
def test_levels_rise_and_so_do_their_gaps(bits, normal):
    table = fit_levels(normal(4, 300), bits)()
    for side in (table[:, : 2 ** (bits - 1)], -table[:, 2 ** (bits - 1) :]):
        gaps = side.diff(dim=1)
        assert bool((gaps > 0).all()) and bool((gaps.diff(dim=1) > 0).all())


@pytest.mark.parametrize("factor", [1e-3, 3.7, 1e4])
def test_a_scaled_weight_is_rounded_to_the_scaled_values(factor, normal):
    """η is relative to the row; a fixed list of η (the released code's) fails this."""
    weight = normal(4, 200)
    plain, scaled = (decoded(fit_levels(w, 3), w) for w in (weight, factor * weight))
    torch.testing.assert_close(scaled, factor * plain, rtol=1e-9, atol=0)


def test_both_signs_are_treated_alike(normal):
    weight = normal(4, 200)
    plain, negated = (decoded(fit_levels(w, 3, OTHER), w) for w in (weight, -weight))
    torch.testing.assert_close(negated, -plain, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["tail", "t4"])
@pytest.mark.parametrize("bits", [3, 4])
def test_on_heavy_tails_it_beats_evenly_spaced_levels(kind, bits, normal):
    weight = heavy_tailed(normal, kind)
    error = relative_mse(twin_log(weight, spec(bits)).dequantize().double(), weight)
    assert error < 0.5 * relative_mse(minmax(weight, bits), weight)
    if kind == "tail":
        clipped = min(relative_mse(minmax(weight, bits, 1 - 0.02 * i), weight) for i in range(45))
        paper_like = twin_log(weight, spec(bits), search=Search(lower=(0.0,))).dequantize().double()
        assert relative_mse(paper_like, weight) < {3: 0.9, 4: 0.5}[bits] * clipped
        assert error < {3: 0.65, 4: 0.35}[bits] * clipped


@pytest.mark.parametrize("bits", [3, 4])
def test_storing_ends_and_steps_in_half_precision_costs_nothing_that_matters(bits, normal):
    weight = heavy_tailed(normal, "t4")
    levels = fit_levels(weight, bits)
    stored = relative_mse(decoded(levels.stored(), weight), weight)
    assert stored < 1.002 * relative_mse(decoded(levels, weight), weight)


def test_a_larger_grid_is_never_worse(normal):
    weight = heavy_tailed(normal, "t4", 8, 256)
    grids = [
        Search((1.0,), (0.99,), (0.0,)),
        Search((1.0,), (0.99, 1.0), (0.0,)),
        Search((0.5, 1.0), (0.99, 1.0), (0.0,)),
        Search((0.5, 1.0), (0.99, 1.0), (0.0, 0.2)),
        Search((0.5, 1.0), (0.99, 1.0), (0.0, 0.2), per_row=True),
    ]
    errors = [relative_mse(decoded(fit_levels(weight, 3, grid), weight), weight) for grid in grids]
    assert all(larger <= smaller + 1e-15 for smaller, larger in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.98 * errors[-2] < 0.98 * errors[0]


def test_the_search_of_each_row_is_the_search_of_that_row_alone(normal):
    weight = normal(5, 60) * torch.linspace(0.1, 9, 5, dtype=torch.float64)[:, None]
    alone = torch.cat([decoded(fit_levels(row[None], 3, OTHER), row[None]) for row in weight])
    together = decoded(fit_levels(weight, 3, Search(OTHER.spreads, OTHER.upper, OTHER.lower, per_row=True)), weight)
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("mode", ["strict", "paper", "code"])
def test_ugly_rows_stay_finite(mode, normal):
    row = normal(64)
    ugly = torch.stack([0 * row, 0 * row + 0.7, 0 * row - 0.7, row.abs(), -row.abs(), 1e-6 * row, 1e4 * row])
    rounded = twin_log(ugly, spec(4), mode).dequantize()
    assert bool(rounded.isfinite().all())
    if mode == "strict":
        torch.testing.assert_close(rounded[:3].double(), ugly[:3], rtol=1e-2, atol=1e-30)
        assert relative_mse(rounded[5:].double() / 1e-6, ugly[5:] / 1e-6) < 0.02


def test_a_row_far_from_zero_does_not_outgrow_half_precision(normal):
    weight = 100 + 1e-9 * normal(2, 64)
    torch.testing.assert_close(twin_log(weight, spec(4)).dequantize().double(), weight, rtol=1e-2, atol=0)


def test_the_upper_quantile_moves_the_upper_level_of_small_weights(normal):
    """With the other sign's weights counted as log2(1), as in the released code, it would not."""
    weight = 0.03 * normal(8, 512)
    tops = [fit_levels(weight, 3, Search(upper=(p,), lower=(0.0,), spreads=(1.0,)))()[:, 3] for p in (0.9, 1.0)]
    assert bool((tops[0] < 0.8 * tops[1]).all())


def test_the_integer_form_is_within_half_a_unit_of_its_last_place(normal):
    exponent = 6 * normal(1000)
    for fraction_bits in (2, 5, 8):
        multiplier, shift = shift_form(exponent, fraction_bits)
        value = multiplier.double() * 2.0 ** shift.double()
        error = (value / 2**exponent - 1).abs()
        assert float(error.max()) <= 2.0 ** -(fraction_bits + 1)
        assert float(error.max()) > 2.0 ** -(fraction_bits + 3)
        assert int(multiplier.min()) >= 2**fraction_bits and int(multiplier.max()) <= 2 ** (fraction_bits + 1)


def slow_integer_offset(weight, bits, shifts, zero_filled):
    """Modes paper and code in plain loops, all combinations of η, p₊ and p₋ (325 in mode code)."""
    n = 2 ** (bits - 1)
    steps, counts = (n, (n, n + 1)) if zero_filled else (n - 1, (n, n))
    best = (math.inf, None)
    for shift in shifts:
        for quantiles in [(p, q) for p in CODE_QUANTILES for q in CODE_QUANTILES]:
            result = []
            for row in weight.tolist():
                out = [0.0] * len(row)
                for sign, p, count in zip((1, -1), quantiles, counts, strict=True):
                    u = {i: math.log2(abs(w) + shift) for i, w in enumerate(row) if w * sign > 0}
                    ordered = sorted([u.get(i, 0.0) for i in range(len(row))] if zero_filled else u.values())
                    low, high = ordered[0], ordered[round(p * (len(ordered) - 1))]
                    step = (high - low) / steps
                    offset = round(low / step)
                    for i, value in u.items():
                        code = min(max(round(value / step) - offset, 0), count - 1)
                        out[i] = sign * (2 ** (step * (code + offset)) - shift)
                result.append(out)
            rounded = torch.tensor(result, dtype=torch.float64)
            best = min(best, (float((rounded - weight).square().sum()), rounded), key=lambda each: each[0])
    return best[1]


@pytest.mark.parametrize("seed", [4, 5])
@pytest.mark.parametrize("positive", [1.0, 0.02])  # a small side has no say in the choice of the shift
@pytest.mark.parametrize(("mode", "shifts"), [("paper", (0.0,)), ("code", CODE_SHIFTS)])
def test_the_modes_for_comparison_are_their_sources_in_slow_loops(mode, shifts, positive, seed, normal):
    weight = 0.4 * normal(3, 101, seed=seed)
    weight[weight > 0] *= positive
    if mode == "code":
        weight[1, 5] = 0.0
    expected = slow_integer_offset(weight, 3, shifts, mode == "code")
    rounded = twin_log(weight, spec(3), mode).dequantize().double()
    torch.testing.assert_close(rounded, expected, rtol=1e-6, atol=1e-7)


def test_the_released_codes_mode_takes_more_bits_and_they_are_counted(normal):
    weight = twin_log(0.03 * normal(4, 64), spec(3), "code")
    assert weight.num_levels == 4 + 5 + 1 and weight.code_bits == 4
    assert stored_bytes(LayerRecipe(weight=weight), folded=False) == 4 * 64 * 4 // 8 + 4 * 10 * 4
    with pytest.raises(UserError, match="258 levels"):
        twin_log(normal(2, 8), spec(8), "code")


@pytest.mark.parametrize("mode", ["strict", "paper", "code"])
def test_the_simulated_kernel_multiplies_with_the_levels(mode, normal):
    weight, x = twin_log(normal(5, 37), spec(3), mode), normal(6, 37)
    kernel = simulate.make_kernel(LayerRecipe(weight=weight), normal(5, 37))
    torch.testing.assert_close(kernel(x, None), x @ weight.dequantize().double().T)
    assert kernel.packed.shape == (5, 5 * weight.code_bits)
    assert kernel.levels is not weight.levels


def test_stored_are_packed_codes_four_half_numbers_and_a_unit_per_row(normal):
    recipe = LayerRecipe(weight=twin_log(normal(6, 80), spec(3)))
    expected = 6 * (80 * 3 // 8 + 4 * 2 + 4)
    assert stored_bytes(recipe, folded=False) == expected
    kernel = simulate.make_kernel(recipe, normal(6, 80))
    assert sum(tensor.nbytes for tensor in kernel.state_dict().values()) == expected


def test_an_integer_backend_refuses_uneven_levels(normal):
    recipe = LayerRecipe(weight=twin_log(normal(4, 64), spec(8)), act=ActQuant(QuantSpec(8, "per_token", dynamic=True)))
    assert "uneven levels" in onednn_int8.unsupported(recipe, torch.device("cpu"))
    assert simulate.unsupported(recipe, torch.device("cpu")) is None


@pytest.mark.parametrize("mode", ["strict", "paper", "code"])
def test_a_weight_survives_as_state_tensors(mode, normal):
    weight = twin_log(normal(4, 64), spec(3), mode)
    again = weight_from_state("layer", weight_state("layer", weight), spec(3))
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert (again.num_levels, again.spec) == (weight.num_levels, weight.spec)


def test_what_it_does_not_define_is_refused(normal):
    with pytest.raises(UserError, match="per_channel"):
        twin_log(normal(2, 32), QuantSpec(4, "per_group", group_size=16))
    with pytest.raises(ValueError, match="mode 'log' is none of strict, paper, code"):
        twin_log(normal(2, 32), spec(4), "log")
    with pytest.raises(ValueError, match="below the upper"):
        Search(lower=(0.96,))
    with pytest.raises(ValueError, match="spreads must be > 0"):
        Search(spreads=(0.0, 1.0))


def test_at_eight_bits_it_is_close_to_rounding_to_nearest(normal):
    weight = normal(8, 256)
    error = relative_mse(twin_log(weight, spec(8)).dequantize().double(), weight)
    assert error < 4 * relative_mse(quantize_weight(weight, spec(8)).dequantize().double(), weight)


def test_a_weight_of_zero_counts_as_positive(normal):
    weight = normal(4, 32)
    weight[:, 3] = 0.0
    found = twin_log(weight, QuantSpec(3, "per_channel"))
    assert bool((found.codes_OC[:, 3] < 4).all()) and bool((found.dequantize()[:, 3] > 0).all())
