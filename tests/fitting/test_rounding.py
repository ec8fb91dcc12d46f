from __future__ import annotations

import pytest
import torch

from ditbench.harness.build.build import float_copy
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting import rounding
from ditbench.harness.fitting.conformance import DYNAMIC, STATIC
from ditbench.harness.fitting.rounding import nearest, static_ranges
from ditbench.harness.quant.quantizers import quantize_weight
from ditbench.harness.quant.spec import Bits, QuantSpec
from ditbench.harness.quant.transforms import Hadamard, Transform


def recorded_inputs(target, calibration, name: str) -> torch.Tensor:
    """All inputs of one float layer over the calibration, (values, C)."""
    model, seen = float_copy(target, dtype=torch.float32), []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for step, inputs in calibration.batches():
            model.clock.set(step, calibration.num_steps)
            model(**inputs)
    return torch.cat(seen)


def test_dynamic_activations_need_no_calibration(small_target, small_calibration):
    assert static_ranges(small_target, DYNAMIC, small_calibration) == {}
    assert static_ranges(small_target, Bits(DYNAMIC.weight, None), small_calibration) == {}


def test_static_ranges_are_the_extremes_over_all_steps(small_target, small_calibration):
    state = static_ranges(small_target, STATIC, small_calibration)
    assert set(state) == {f"{name}/{end}" for name in small_target.layers for end in ("act_low", "act_high")}
    for name in ("transformer_blocks.0.attn1.to_k", "transformer_blocks.1.ff.net.2"):
        x = recorded_inputs(small_target, small_calibration, name)
        assert float(state[f"{name}/act_low"]) == pytest.approx(float(x.min()), rel=1e-5)
        assert float(state[f"{name}/act_high"]) == pytest.approx(float(x.max()), rel=1e-5)


def test_static_ranges_are_those_of_the_transformed_input(small_target, small_calibration):
    name = "transformer_blocks.0.ff.net.2"
    transform = Transform(scale_C=torch.linspace(0.1, 4, 192), rotations=(Hadamard(192),))
    state = static_ranges(small_target, STATIC, small_calibration, {name: transform})
    x = transform(recorded_inputs(small_target, small_calibration, name))
    assert float(state[f"{name}/act_low"]) == pytest.approx(float(x.min()), rel=1e-4)
    assert float(state[f"{name}/act_high"]) == pytest.approx(float(x.max()), rel=1e-4)


def test_static_activations_are_per_tensor_only(small_target, small_calibration):
    bits = Bits(None, QuantSpec(8, "per_token"))
    with pytest.raises(UserError, match="per_tensor here, got per_token"):
        static_ranges(small_target, bits, small_calibration)


def test_every_target_layer_gets_the_codes_of_its_transformed_weight(small_target):
    transforms = {name: Transform(scale_C=torch.linspace(0.5, 2, 48)) for name in small_target.sites[0].consumers}
    recipe = nearest(small_target, DYNAMIC, {}, transforms)
    assert set(recipe.layers) == set(small_target.layers)
    for name, layer in recipe.layers.items():
        weight = transforms.get(name, Transform()).of_weight(small_target.module(name).weight.double())
        assert torch.equal(layer.weight.codes_OC, quantize_weight(weight, DYNAMIC.weight).codes_OC)
        assert layer.transform is transforms[name] if name in transforms else layer.transform.is_identity


@pytest.mark.parametrize("shape", [(64, 64, 96), (8, 256, 1152), (16, 2, 256, 72)], ids=str)
def test_the_sample_that_ranges_are_searched_on_sees_every_channel_alike(shape):
    """A stride that is a multiple of C would sample one channel only: so it was at 64 rows × 64 tokens × 96 channels."""
    channels = shape[-1]
    watch = rounding._RangeWatch({})
    watch.see("layer", torch.arange(channels).float().expand(shape))
    sampled = torch.cat(watch.values["layer", 0])
    assert rounding.SAMPLES_PER_CALL / 2 <= len(sampled) <= 2 * rounding.SAMPLES_PER_CALL
    counts = torch.bincount(sampled.long(), minlength=channels)
    assert int(counts.max() - counts.min()) <= 2


def test_the_sample_sees_every_row_alike():
    watch = rounding._RangeWatch({})
    watch.see("layer", torch.arange(64).float()[:, None, None].expand(64, 64, 96))
    counts = torch.bincount(torch.cat(watch.values["layer", 0]).long(), minlength=64)
    assert int(counts.max() - counts.min()) <= 2


def test_searched_activation_ranges_lie_inside_the_extremes_and_hold_zero(small_target, small_calibration):
    wide = static_ranges(small_target, STATIC, small_calibration)
    searched = static_ranges(small_target, STATIC.with_widths(8, 4), small_calibration, ranges="mse")
    narrower = 0
    for name in small_target.layers:
        low, high = float(searched[f"{name}/act_low"]), float(searched[f"{name}/act_high"])
        assert float(wide[f"{name}/act_low"]) <= low < high <= float(wide[f"{name}/act_high"])
        narrower += high - low < float(wide[f"{name}/act_high"] - wide[f"{name}/act_low"])
    assert narrower > 0
