from __future__ import annotations

from itertools import product

import pytest
import torch

from ditbench.harness.backends import simulate, vnni, weight_only
from ditbench.harness.backends.base import choose
from ditbench.harness.common.errors import UserError
from ditbench.harness.measurement.latency import resident_bytes
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.spec import QuantSpec

CPU = torch.device("cpu")
SPECS = [
    QuantSpec(bits, granularity, symmetric, group_size=32 if granularity == "per_group" else None)
    for bits, granularity, symmetric in product((8, 4, 5, 3), ("per_channel", "per_tensor", "per_group"), (True, False))
]
needs_vnni = pytest.mark.skipif(vnni.cpu_lacks() is not None, reason=str(vnni.cpu_lacks()))


def recipe_for(spec: QuantSpec, outputs: int = 21, width: int = 96) -> LayerRecipe:
    weight_OC = torch.randn(outputs, width, generator=torch.Generator().manual_seed(1)) + (0 if spec.symmetric else 0.5)
    return LayerRecipe(weight=quantize_weight(weight_OC, spec))


@needs_vnni
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.bits}-{s.granularity}-{'sym' if s.symmetric else 'asym'}")
def test_the_unpacked_weight_is_the_simulated_one(spec):
    recipe = recipe_for(spec)
    kernel = weight_only.make_kernel(recipe, torch.empty(0))
    assert torch.equal(kernel.weight(torch.float32), recipe.weight.dequantize())
    assert torch.equal(kernel.weight(torch.bfloat16), recipe.weight.dequantize().bfloat16())
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(2))
    assert torch.equal(kernel(x, None), simulate.make_kernel(recipe, torch.empty(0))(x, None))
    assert kernel(x.bfloat16(), None).dtype == torch.bfloat16


@needs_vnni
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[6]], ids=["w8a16", "w4a16"])
def test_it_is_chosen_and_holds_the_codes_alone(spec):
    recipe = recipe_for(spec, 128, 256)
    assert choose(recipe, CPU).NAME == "weight_only"
    kernel = weight_only.make_kernel(recipe, torch.empty(0))
    kernel(torch.randn(3, 256).bfloat16(), None)
    assert resident_bytes(kernel) == 128 * 256 * spec.bits // 8 + 128 * 4


@needs_vnni
def test_a_compiled_layer_has_no_graph_break():
    kernel = weight_only.make_kernel(recipe_for(SPECS[6]), torch.empty(0))
    x = torch.randn(6, 96).bfloat16()
    run = torch.compile(lambda x: kernel(x, None), backend="aot_eager", fullgraph=True)
    assert torch.equal(run(x), kernel(x, None))


@pytest.mark.parametrize(
    ("recipe", "device", "reason"),
    [
        (LayerRecipe(), "cpu", "activations in float"),
        (LayerRecipe(weight=recipe_for(SPECS[0]).weight, act=ActQuant(QuantSpec(8, "per_token", dynamic=True))), "cpu", "in float"),
        (recipe_for(SPECS[0], width=40), "cpu", "multiples of 16"),
        (recipe_for(SPECS[0]), "meta", "the device is meta"),
    ],
)  # fmt: skip
def test_what_it_cannot_run_it_says(recipe, device, reason):
    with pytest.raises(UserError, match=reason):
        choose(recipe, torch.device(device), "weight_only")
