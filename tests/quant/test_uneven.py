"""Activation quantizers whose values are not codes times one scale, each against a loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ditbench.harness.backends.base import known_backends
from ditbench.harness.quant.quantizers import ActQuant, fake_quantize_activation, quantize_weight
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.serialize import decode, encode
from ditbench.harness.quant.spec import QuantSpec, bits_of
from ditbench.harness.quant.steps import StepTable
from ditbench.harness.quant.uneven import ChannelScaledQuant, DualScaleQuant

DUAL = QuantSpec(4, "per_token", dynamic=True)


@pytest.mark.parametrize(
    "spec",
    [DUAL, QuantSpec(4, "per_tensor", dynamic=True), QuantSpec(4, "per_group", dynamic=True, group_size=6)],
    ids=lambda spec: spec.granularity,
)
def test_each_sign_has_a_scale_of_its_own(spec, normal):
    x = torch.nn.functional.silu(3 * normal(2, 5, 12))
    rounded = fake_quantize_activation(x, DualScaleQuant(spec))
    for sample, of_sample in zip(x, rounded, strict=True):
        shared = {
            "per_tensor": [(slice(None), slice(None))],
            "per_token": [(token, slice(None)) for token in range(5)],
            "per_group": [(token, slice(start, start + 6)) for token in range(5) for start in (0, 6)],
        }[spec.granularity]
        for place in shared:
            above, below = float(sample[place].max()) / 7, -float(sample[place].min()) / 8
            for value, found in zip(sample[place].flatten().tolist(), of_sample[place].flatten().tolist(), strict=True):
                scale = above if value > 0 else below
                assert found == pytest.approx(round(value / scale) * scale, abs=1e-9)


def test_a_side_without_values_gives_zeros(normal):
    x = normal(3, 8).abs()
    assert torch.equal(fake_quantize_activation(-x, DualScaleQuant(DUAL)) <= 0, torch.ones_like(x, dtype=torch.bool))
    assert not fake_quantize_activation(torch.zeros(2, 8), DualScaleQuant(DUAL)).any()


def test_both_signs_of_fp8_reach_its_largest_value(normal):
    x = torch.nn.functional.gelu(normal(4, 16))
    rounded = fake_quantize_activation(x, DualScaleQuant(bits_of("fp8").act))
    torch.testing.assert_close(rounded, x, rtol=0.07, atol=1e-4)
    torch.testing.assert_close(rounded.amin(-1), x.amin(-1))
    torch.testing.assert_close(rounded.amax(-1), x.amax(-1))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_channels_are_divided_by_their_largest_value_and_multiplied_again(channels, normal):
    """x̂ = Q(x Λ⁻¹) Λ, with Λ of all tokens of one sample; the last group of a width may be shorter."""
    x = normal(2, 7, 12) * torch.logspace(-2, 2, 12, dtype=torch.float64)
    rounded = fake_quantize_activation(x, ChannelScaledQuant(DUAL, channels=channels))
    for sample, of_sample in zip(x, rounded, strict=True):
        scale = torch.empty(12, dtype=torch.float64)
        for start in range(0, 12, channels):
            scale[start : start + channels] = sample[:, start : start + channels].abs().max()
        for token, found in zip(sample, of_sample, strict=True):
            step = (token / scale).abs().max() / 7
            torch.testing.assert_close(found, (token / scale / step).round() * step * scale, rtol=1e-6, atol=1e-9)


def test_a_sample_does_not_depend_on_what_else_is_in_the_batch(normal):
    x = normal(3, 7, 12)
    quant = ChannelScaledQuant(DUAL)
    torch.testing.assert_close(fake_quantize_activation(x, quant)[1:2], fake_quantize_activation(x[1:2], quant))


def test_one_token_has_no_scale_by_channel_since_that_would_be_the_token(normal):
    """Of a model's time, of one image whole, or of a prompt of one token: what a layer would get is ±1 in every channel."""
    for shape in ((3, 12), (3, 1, 12), (3, 1, 1, 12)):
        x = normal(*shape)
        found = fake_quantize_activation(x, ChannelScaledQuant(DUAL))
        assert torch.equal(found, fake_quantize_activation(x, ActQuant(DUAL))) and not torch.equal(found, x)


def test_a_dead_channel_is_borne(normal):
    x = normal(1, 4, 6)
    x[..., 2] = 0
    rounded = fake_quantize_activation(x, ChannelScaledQuant(DUAL))
    assert bool(rounded.isfinite().all()) and not rounded[..., 2].any()


QUANTS = [
    DualScaleQuant(DUAL),
    DualScaleQuant(
        QuantSpec(8, "per_tensor"), StepTable(torch.tensor([0.1])), negative_scale=StepTable(torch.tensor([0.01]))
    ),
    ChannelScaledQuant(DUAL, channels=4),
]


@pytest.mark.parametrize("quant", QUANTS, ids=["dual", "static dual", "channels"])
def test_only_simulation_runs_it(quant, normal):
    recipe = LayerRecipe(weight=quantize_weight(normal(16, 16), QuantSpec(4, "per_channel")), act=quant)
    can = [name for name, each in known_backends().items() if each.unsupported(recipe, torch.device("cpu")) is None]
    assert can == ["simulate"]
    x = normal(2, 5, 16)
    kernel = known_backends()["simulate"].make_kernel(recipe, normal(16, 16))
    assert isinstance(kernel, nn.Module)
    expected = fake_quantize_activation(x, quant) @ recipe.weight.dequantize().double().T
    torch.testing.assert_close(kernel(x, None), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("quant", QUANTS, ids=["dual", "static dual", "channels"])
def test_it_survives_a_file(quant, normal):
    tensors: dict = {}
    encoded = encode(quant, "act", tensors)
    again = decode(encoded, tensors)
    assert type(again) is type(quant) and len(again.tables) == len(quant.tables)
    x = normal(2, 5, 16)
    assert torch.equal(fake_quantize_activation(x, again), fake_quantize_activation(x, quant))
