"""q, k and v read one tensor: it is transformed and quantized once, and nothing is taken for the same that is not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ditbench.harness.backends import simulate, vnni
from ditbench.harness.build.layer import QuantLinear
from ditbench.harness.build.shared_inputs import share_inputs
from ditbench.harness.build.treatment import NAME
from ditbench.harness.quant.effective import EffectiveLinear
from ditbench.harness.quant.lowrank import LowRank
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight, static_quant
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.spec import QuantSpec
from ditbench.harness.quant.steps import StepClock, StepTable
from ditbench.harness.quant.transforms import Hadamard, Transform, random_signs

pytestmark = pytest.mark.skipif(vnni.cpu_lacks() is not None, reason=str(vnni.cpu_lacks()))
A8 = ActQuant(QuantSpec(8, "per_token", dynamic=True))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def recipe(seed: int, **parts) -> LayerRecipe:
    weight = quantize_weight(drawn(8, 24, seed=seed), QuantSpec(8, "per_channel"))
    return LayerRecipe(**({"weight": weight, "act": A8} | parts))


def layers(recipes: dict[str, LayerRecipe], clock: StepClock | None = None, backend: str = "vnni") -> nn.Module:
    """Side by side in one module, as q, k and v are."""
    parent, clock = nn.Module(), clock or StepClock(None)
    for name, each in recipes.items():
        settings = {"folded": False, "clock": clock, "dtype": torch.bfloat16}
        effective = EffectiveLinear(torch.empty(8, 24), None)
        parent.add_module(name, QuantLinear(each, effective, **settings, device=torch.device("cpu"), backend=backend))
    share_inputs(parent)
    return parent


def test_an_input_that_learns_carries_nothing():
    """What was made of it would hold its graph, and it."""
    parent = layers({"q": recipe(0), "k": recipe(1)})
    x = drawn(2, 4, 24).bfloat16().requires_grad_()
    parent.q(x), parent.k(x)
    assert not hasattr(x, NAME)
    with torch.no_grad():
        parent.q(x), parent.k(x)
    assert hasattr(x, NAME)


@pytest.fixture
def quantized(monkeypatch) -> Callable[[], int]:
    """How many tensors have been quantized."""
    calls: list[torch.Size] = []

    def noted(self, x: Tensor, step: Tensor | None):
        calls.append(x.shape)
        return original(self, x, step)

    original = vnni.VnniKernel.quantizer
    monkeypatch.setattr(vnni.VnniKernel, "quantizer", noted)
    return lambda: len(calls)


def alone(recipes: dict[str, LayerRecipe], x: Tensor, **settings) -> list[Tensor]:
    """What each layer gives by itself, simulated."""
    return [layer(x) for layer in layers(recipes, backend=simulate.NAME, **settings).children()]


def rotated() -> Transform:
    signs = random_signs(24, torch.Generator().manual_seed(3))
    return Transform(scale_C=drawn(24, seed=9).abs() + 0.5, rotations=(Hadamard(24, signs),))


@pytest.mark.parametrize("case", ["plain", "rotated", "low-rank"])
def test_one_tensor_is_quantized_once_for_all_who_treat_it_alike(case, quantized):
    recipes = {name: recipe(seed) for seed, name in enumerate("qkv")}
    if case != "plain":
        recipes = {name: replace(each, transform=rotated()) for name, each in recipes.items()}
    if case == "low-rank":  # of two of them: one needs x' as well
        branch = LowRank(drawn(2, 24, seed=5), drawn(8, 2, seed=6))
        recipes = {name: replace(each, low_rank=branch if name != "v" else None) for name, each in recipes.items()}
    parent, x = layers(recipes), drawn(2, 7, 24).bfloat16()
    outputs = [layer(x) for layer in parent.children()]
    assert quantized() == 1
    for output, expected in zip(outputs, alone(recipes, x), strict=True):
        assert torch.equal(output, expected)


def test_a_layer_beside_a_module_shares_what_that_module_s_layers_read(quantized):
    """FLUX's one-stream block: `proj_mlp` stands beside the attention, whose q, k and v read the same norm."""
    recipes, x = {name: recipe(seed) for seed, name in enumerate(("q", "k", "proj_mlp"))}, drawn(5, 24).bfloat16()
    flat = layers(recipes)
    block, attn = nn.Module(), nn.Module()
    block.attn, block.proj_mlp = attn, flat.proj_mlp
    attn.q, attn.k = flat.q, flat.k
    for layer in (flat.q, flat.k, flat.proj_mlp):
        layer.treatment = None
    share_inputs(block)
    outputs = [layer(x) for layer in (block.proj_mlp, attn.q, attn.k)]
    assert quantized() == 1
    for output, name in zip(outputs, ("proj_mlp", "q", "k"), strict=True):
        assert torch.equal(output, alone({name: recipes[name]}, x)[0])


def test_layers_of_a_list_come_after_each_other_and_leave_nothing_on_what_they_read():
    flat = layers({name: recipe(seed) for seed, name in enumerate("qo")})
    for layer in flat.children():
        layer.treatment = None
    attn = nn.Module()
    attn.q, attn.to_out = flat.q, nn.ModuleList([flat.o])
    share_inputs(attn)
    assert attn.q.treatment is None and attn.to_out[0].treatment is None


OTHERS = {
    "bits": recipe(1, act=ActQuant(QuantSpec(6, "per_token", dynamic=True))),
    "clip": recipe(1, act=replace(A8, clip=0.5)),
    "symmetry": recipe(1, act=ActQuant(QuantSpec(8, "per_token", symmetric=False, dynamic=True))),
    "transform": recipe(1, transform=rotated()),
    "groups": recipe(1, act=ActQuant(QuantSpec(8, "per_group", dynamic=True, group_size=8))),
    "weight groups": recipe(1, weight=quantize_weight(drawn(8, 24), QuantSpec(8, "per_group", group_size=8))),
}


@pytest.mark.parametrize("what", OTHERS)
def test_who_treats_it_otherwise_has_its_own(what, quantized):
    recipes, x = {"q": recipe(0), "k": OTHERS[what]}, drawn(5, 24).bfloat16()
    outputs = [layer(x) for layer in layers(recipes).children()]
    assert quantized() == 2
    for output, expected in zip(outputs, alone(recipes, x), strict=True):
        assert torch.equal(output, expected)


def test_another_tensor_of_the_same_values_and_one_that_was_changed_are_quantized_again(quantized):
    parent, x = layers({name: recipe(seed) for seed, name in enumerate("qk")}), drawn(5, 24).bfloat16()
    before = parent.q(x)
    assert torch.equal(parent.q(x.clone()), before)
    x.mul_(-1)
    assert torch.equal(parent.q(x), -before)
    assert quantized() == 3


def test_another_step_is_another_range(quantized):
    bounds = [StepTable(torch.tensor(ends), torch.tensor([0, 1])) for ends in ([-3.0, -0.5], [3.0, 0.5])]
    act, clock = static_quant(*bounds, QuantSpec(8, "per_tensor")), StepClock(2)
    recipes = {name: recipe(seed, act=act) for seed, name in enumerate("qk")}
    parent, x = layers(recipes, clock), drawn(5, 24).bfloat16()
    for step in (0, 1):
        clock.set(step, 2)
        outputs = [layer(x) for layer in parent.children()]
        for output, expected in zip(outputs, alone(recipes, x, clock=clock), strict=True):
            assert torch.equal(output, expected)
    assert quantized() == 2


@pytest.mark.parametrize("branch", [False, True])
def test_what_was_made_of_a_tensor_goes_with_it_at_once(branch):
    low_rank = LowRank(drawn(2, 24, seed=5), drawn(8, 2, seed=6)) if branch else None
    parent, x = layers({name: recipe(seed, low_rank=low_rank) for seed, name in enumerate("qk")}), drawn(5, 24)
    gc.disable()
    try:
        parent.q(x)
        gone = weakref.ref(x)
        del x
        assert gone() is None
    finally:
        gc.enable()


def test_inference_mode_and_a_compiler_share_nothing_and_give_the_same():
    parent, x = layers({name: recipe(seed) for seed, name in enumerate("qk")}), drawn(5, 24).bfloat16()
    expected = parent.q(x) + parent.k(x)
    with torch.inference_mode():
        assert torch.equal(parent.q(x.clone()) + parent.k(x.clone()), expected)
    run = torch.compile(lambda x: parent.q(x) + parent.k(x), backend="aot_eager", fullgraph=True)
    assert torch.equal(run(x), expected)


def test_two_treatments_of_one_tensor_are_kept_apart():
    other = ActQuant(QuantSpec(4, "per_token", dynamic=True))
    recipes = {name: recipe(seed, act=other if seed % 2 else A8) for seed, name in enumerate("abcd")}
    x = drawn(5, 24).bfloat16()
    outputs = [layer(x) for layer in layers(recipes).children()]
    for output, expected in zip(outputs, alone(recipes, x), strict=True):
        assert torch.equal(output, expected)


def test_a_branch_that_comes_second_gets_the_transformed_input():
    """The first layer did not need it beside its codes."""
    branch = LowRank(drawn(2, 24, seed=5), drawn(8, 2, seed=6))
    recipes = {"plain": recipe(0, transform=rotated()), "branched": recipe(1, transform=rotated(), low_rank=branch)}
    x = drawn(5, 24).bfloat16()
    outputs = [layer(x) for layer in layers(recipes).children()]
    for output, expected in zip(outputs, alone(recipes, x), strict=True):
        assert torch.equal(output, expected)
