"""Formats in blocks on a device that is not the CPU: its codes, scales and outputs are the CPU's."""

from __future__ import annotations

import pytest
import torch

from ditbench.harness.backends import simulate
from ditbench.harness.quant.gptq import gptq
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight
from ditbench.harness.quant.recipe import LayerRecipe, to_device
from ditbench.harness.quant.spec import NAMED, bits_of

BLOCKS = [name for name in NAMED if name != "fp8"]


@pytest.mark.parametrize("label", BLOCKS)
def test_a_layer_in_blocks_is_the_same_on_the_device(label, second, normal):
    bits = bits_of(label)
    x, weight_OC = normal(2, 5, 200).float(), normal(24, 200, seed=1).float()
    there, here = quantize_weight(weight_OC.to(second), bits.weight), quantize_weight(weight_OC, bits.weight)
    assert there.codes_OC.device == there.scale_OG.device == second
    back = to_device(there, "cpu")
    assert torch.equal(back.dequantize(), here.dequantize())
    recipe = LayerRecipe(weight=here, act=ActQuant(bits.act))
    kernel = simulate.make_kernel(recipe, weight_OC)
    expected = kernel(x, None)
    assert torch.equal(kernel.to(second)(x.to(second), None).cpu(), expected)


def test_gptq_solves_on_the_device(second, normal):
    weight_OC, x = normal(9, 48), normal(99, 48, seed=1)
    spec = bits_of("nvfp4").weight
    there = gptq(weight_OC.to(second), (x.T @ x).to(second), spec)
    assert there.codes_OC.device == second
    assert torch.equal(to_device(there, "cpu").dequantize(), gptq(weight_OC, x.T @ x, spec).dequantize())
