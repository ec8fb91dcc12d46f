from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ditbench.harness.build.build import build, float_copy
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.fitting.conformance import DYNAMIC, STATIC
from ditbench.harness.models.calls import Call
from ditbench.harness.quant.quantizers import quantize_weight, searched_range
from ditbench.harness.quant.spec import QuantSpec
from ditbench.methods import q_diffusion
from ditbench.methods.q_diffusion import Params, select_calibration

SHORT = Params(iterations=40, scale_iterations=10)


def recording(steps: int, rows: int = 4) -> Calibration:
    return Calibration(tuple((Call({"timestep": torch.full((rows,), s)}),) for s in range(steps)), "key")


def error_of(values: list[float], low: float, high: float, spec: QuantSpec) -> float:
    """Σ |x̂ − x|^2.4, one value at a time."""
    if spec.symmetric:
        scale, zero = max(-low, high) / spec.quant_max, 0
    else:
        scale = (high - low) / spec.quant_max
        zero = min(max(round(-low / scale), 0), spec.quant_max)
    codes = [min(max(round(v / scale) + zero, spec.quant_min), spec.quant_max) for v in values]
    return sum(abs((code - zero) * scale - v) ** 2.4 for code, v in zip(codes, values, strict=True))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
def test_weight_ranges_are_the_best_of_eighty_shrunken_ones(granularity, symmetric, normal):
    spec = QuantSpec(3, granularity, symmetric, group_size=24 if granularity == "per_group" else None)
    weight = normal(4, 48).float() ** 3  # heavy tails: it pays to clip them
    width, factors = spec.group_size or 48, []
    found = quantize_weight(weight, spec, ranges="shrink")
    for o in range(4):
        for g in range(48 // width):
            values = weight[o, g * width : (g + 1) * width].tolist()
            low, high = min(values), max(values)
            errors = [error_of(values, (1 - 0.01 * i) * low, (1 - 0.01 * i) * high, spec) for i in range(80)]
            best = min(range(80), key=errors.__getitem__)
            factors.append(1 - 0.01 * best)
            span = max(-low, high) if symmetric else high - low
            assert float(found.scale_OG[o, g]) == pytest.approx(factors[-1] * span / spec.quant_max, rel=1e-5)
    assert min(factors) < 0.98 and len(set(factors)) > 2


def test_ranges_of_static_activations_are_searched_in_the_same_way(normal):
    values = normal(400).float() ** 3
    spec = QuantSpec(4, "per_tensor", symmetric=False)
    low, high = searched_range(values, spec, "shrink")
    errors = {
        i: error_of(values.tolist(), (1 - 0.01 * i) * float(values.min()), (1 - 0.01 * i) * float(values.max()), spec)
        for i in range(80)
    }
    best = min(errors, key=errors.__getitem__)
    assert best > 5
    assert float(low) == pytest.approx((1 - 0.01 * best) * float(values.min()), rel=1e-5)
    assert float(high) == pytest.approx((1 - 0.01 * best) * float(values.max()), rel=1e-5)


@pytest.mark.parametrize(
    ("total", "steps", "kept"),
    [(10, 5, [0, 2, 4, 6, 8]), (10, 3, [0, 3, 6]), (4, 20, [0, 1, 2, 3]), (50, 1, [0])],
)
def test_calibration_takes_all_rows_of_evenly_spaced_steps(total, steps, kept):
    whole = recording(total)
    chosen = select_calibration(whole, Params(steps=steps), seed=0)
    assert chosen.num_steps == total and chosen.key != whole.key and chosen.cache is None
    assert [len(inputs["timestep"]) for inputs in chosen.per_step] == [4 if s in kept else 0 for s in range(total)]
    assert [step for step, _ in chosen.batches()] == kept


@pytest.mark.parametrize("bits", [DYNAMIC, STATIC.with_widths(4, 8)], ids=["dynamic", "static"])
def test_reconstruction_on_some_of_the_steps_brings_the_output_closer_to_float(bits, small_target, small_calibration):
    chosen, errors = select_calibration(small_calibration, Params(steps=2), 0), {}
    for params in (replace(SHORT, reconstruct="none"), SHORT):
        state = q_diffusion.fit(small_target, chosen, bits, params)
        built = build(small_target, q_diffusion.apply(small_target, state, bits, params), dtype=torch.float32)
        exact = float_copy(small_target, dtype=torch.float32)
        errors[params.reconstruct] = 0.0
        with torch.no_grad():
            for inputs in small_calibration.per_step:
                errors[params.reconstruct] += float((built(**inputs).sample - exact(**inputs).sample).square().sum())
    assert errors["block"] < 0.8 * errors["none"], errors


def test_without_reconstruction_it_is_rounding_with_shrunken_ranges(small_target, small_calibration):
    params = replace(SHORT, reconstruct="none")
    state = q_diffusion.fit(small_target, small_calibration, DYNAMIC, params)
    recipe = q_diffusion.apply(small_target, state, DYNAMIC, params)
    assert state == {} and not recipe.folded
    for name in small_target.layers:
        expected = quantize_weight(small_target.module(name).weight, DYNAMIC.weight, ranges="shrink")
        assert torch.equal(recipe.layers[name].weight.codes_OC, expected.codes_OC)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"ranges": "max"}, "ranges must be .* got 'max'"),
        ({"iterations": 0}, "q_diffusion: iterations"),
    ],
)
def test_params_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Params(**options)
