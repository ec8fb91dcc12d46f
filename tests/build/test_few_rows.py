"""A sample is the same whatever it is drawn with: products of few rows are those of many."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ditbench.harness.backends.few_rows import LEAST, SteadyLinear, linear, steady
from ditbench.harness.build.build import build, float_copy
from ditbench.harness.generation.generate import conditions, generate
from ditbench.harness.models.base import ModelSpec, Sampler
from ditbench.harness.models.loading import load_model
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.spec import QuantSpec


@pytest.fixture(scope="module")
def model():
    return load_model(ModelSpec("tiny-dit", "dit", source="zoo:tiny-dit"))


def quantized(model) -> nn.Module:
    target = model.target()
    weight, act = QuantSpec(8, "per_channel"), QuantSpec(8, "per_token", dynamic=True)
    layers = {
        name: LayerRecipe(weight=quantize_weight(target.weight(name), weight), act=ActQuant(act))
        for name in target.layers
    }
    return build(target, ModelRecipe(layers), dtype=torch.float32, backend="simulate")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 256, 1152])
def test_a_row_is_the_same_alone_and_among_others(dtype, width):
    generator = torch.Generator().manual_seed(0)
    x_MC = torch.randn(64, width, generator=generator).to(dtype)
    weight_OC, bias_O = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((192, width), (192,)))
    whole = linear(x_MC, weight_OC, bias_O)
    for rows in (1, 2, 3, 7, LEAST, 33):
        assert torch.equal(linear(x_MC[:rows], weight_OC, bias_O), whole[:rows]), rows
        assert torch.equal(linear(x_MC[5 : 5 + rows, None], weight_OC, bias_O), whole[5 : 5 + rows, None]), rows


def test_no_rows_stay_no_rows():
    assert linear(torch.zeros(0, 3, 4), torch.ones(2, 4)).shape == (0, 3, 2)


def test_only_plain_layers_change_and_their_state_does_not():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4))
    before, x = copy.deepcopy(model), torch.randn(20, 4)
    steady(model)
    assert [type(module) for module in model] == [SteadyLinear, Own]
    assert torch.equal(model(x), before(x)) and model.state_dict().keys() == before.state_dict().keys()


@pytest.mark.parametrize("kind", ["float", "w8a8"])
def test_latents_of_samples_drawn_alone_are_those_of_a_batch_bit_for_bit(model, kind):
    transformer = float_copy(model.target(), dtype=torch.float32) if kind == "float" else quantized(model)
    wanted, sampler = conditions(model, 5, seed=0), Sampler("ddim", 4, 1.5)
    together, *others = (generate(model, transformer, wanted, sampler, batch_size=size).latents for size in (5, 1, 2))
    assert all(torch.equal(together, each) for each in others)
