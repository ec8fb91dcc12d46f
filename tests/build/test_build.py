from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditbench.harness.backends.few_rows import LEAST
from ditbench.harness.build.build import build, float_copy, quant_layers
from ditbench.harness.build.layer import QuantLinear, QuantPatchEmbed
from ditbench.harness.common.files import tensors_sha256
from ditbench.harness.fitting.conformance import DYNAMIC, relative_error
from ditbench.harness.fitting.rounding import nearest
from ditbench.harness.quant.effective import EffectiveLinear
from ditbench.harness.quant.quantizers import ActQuant, fake_quantize_activation, quantize_weight, static_quant
from ditbench.harness.quant.recipe import LayerRecipe, LowRank, ModelRecipe
from ditbench.harness.quant.spec import Bits, QuantSpec
from ditbench.harness.quant.steps import StepClock, StepTable
from ditbench.harness.quant.transforms import Hadamard, Transform

CPU = torch.device("cpu")
TOKEN_A8 = ActQuant(QuantSpec(8, "per_token", dynamic=True))


def layer_of(
    recipe: LayerRecipe, weight_OC, bias_O=None, *, clock=None, dtype=torch.float64, folded=False
) -> QuantLinear:
    bias = recipe.transform.of_bias(bias_O, weight_OC)
    return QuantLinear(
        recipe,
        EffectiveLinear(recipe.transform.of_weight(weight_OC), bias),
        folded=folded,
        clock=clock or StepClock(None),
        dtype=dtype,
        device=CPU,
        backend="simulate",
    )


@pytest.fixture
def inputs(small_model):
    return small_model.step_inputs(3)


def run(model: nn.Module, inputs, dtype: torch.dtype = torch.float32):
    with torch.no_grad():
        return model(**{n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}).sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_copy_with_nothing_quantized_is_the_float_model_bit_for_bit(dtype, small_model, small_target):
    inputs = small_model.step_inputs(LEAST)  # of fewer rows torch's own products depend on how many there are
    expected = run(copy.deepcopy(small_target.transformer).to(dtype), inputs, dtype)
    assert torch.equal(run(float_copy(small_target, dtype=dtype), inputs, dtype), expected)


def test_a_bias_has_the_models_dtype_whatever_its_kernel_keeps_it_in(small_target):
    """A kernel that adds it in float32 keeps it so; its values are those of the model."""
    weight = {n: quantize_weight(small_target.weight(n), QuantSpec(8, "per_channel")) for n in small_target.layers}
    recipe = ModelRecipe({n: LayerRecipe(weight=weight[n], act=TOKEN_A8) for n in small_target.layers})
    for layer in quant_layers(build(small_target, recipe, dtype=torch.bfloat16)).values():
        bias = layer.bias.rows
        assert torch.equal(bias, bias.bfloat16().to(bias.dtype))
        assert bias.dtype == (layer.kernel.bias_dtype or torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_building_and_running_leave_the_original_alone(dtype, own_model, inputs):
    own_model.transformer.to(dtype)
    target = own_model.target("all")
    before = tensors_sha256(own_model.transformer.state_dict())
    transforms = dict.fromkeys(target.sites[0].consumers, Transform(scale_C=torch.full((48,), 2.0)))
    recipe = nearest(target, DYNAMIC, {}, transforms, frozenset({target.sites[0].name}))
    for each in (recipe, recipe.without_rounding(), ModelRecipe({n: LayerRecipe() for n in target.layers})):
        run(build(target, each, dtype=dtype), inputs, dtype)
    assert tensors_sha256(own_model.transformer.state_dict()) == before
    assert own_model.transformer.dtype == dtype and not hasattr(own_model.transformer, "clock")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_built_model_shares_no_memory_with_the_original(dtype, own_model, inputs):
    own_model.transformer.to(dtype)
    target = own_model.target("all")
    built = build(target, ModelRecipe({name: LayerRecipe() for name in target.layers}), dtype=dtype)
    before = run(built, inputs, dtype)
    for parameter in own_model.transformer.parameters():
        parameter.data.fill_(7.0)
    assert torch.equal(run(built, inputs, dtype), before)


def test_layers_rebuilt_in_float_compute_what_they_did(small_model, inputs):
    """Every Linear and the patch embedding, adaLN and embedders included."""
    target = small_model.target("all")
    built = build(target, ModelRecipe({name: LayerRecipe() for name in target.layers}), dtype=torch.float64)
    assert set(quant_layers(built)) == set(target.layers)
    expected = run(copy.deepcopy(small_model.transformer).double(), inputs, torch.float64)
    assert relative_error(run(built, inputs, torch.float64), expected) < 1e-14


def test_only_the_layers_of_the_recipe_are_rebuilt(small_target):
    built = build(small_target, nearest(small_target, DYNAMIC, {}), dtype=torch.float32)
    assert set(quant_layers(built)) == set(small_target.layers)
    assert isinstance(built.pos_embed.proj, nn.Conv2d)
    assert isinstance(built.transformer_blocks[0].norm1.linear, nn.Linear)


def in_float64(weight) -> Tensor:
    """(code − zero_point) · scale."""
    groups = weight.scale_OG.shape[1]
    zero = 0 if weight.zero_point_OG is None else weight.zero_point_OG[..., None].double()
    return ((weight.codes_OC.double().unflatten(1, (groups, -1)) - zero) * weight.scale_OG[..., None].double()).flatten(
        1
    )


def test_a_quantized_layer_is_its_quantizers_and_a_product(normal):
    """y = Q(x T) Q(W T)ᵀ + b, written out."""
    weight, bias, x = normal(7, 48), normal(7, seed=1), normal(2, 5, 48, seed=2)
    transform = Transform(scale_C=normal(48, seed=3).exp(), rotations=(Hadamard(48),))
    codes = quantize_weight(transform.of_weight(weight), QuantSpec(4, "per_group", False, group_size=12))
    layer = layer_of(LayerRecipe(transform, codes, TOKEN_A8), weight, bias)
    rounded = fake_quantize_activation(transform(x), TOKEN_A8)
    expected = rounded @ in_float64(codes).T + bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert relative_error(layer(x), F.linear(x, weight, bias)) > 1e-3  # it does round


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_output_has_the_dtype_of_the_input(dtype, normal):
    codes = quantize_weight(normal(7, 48), QuantSpec(4, "per_channel"))
    layer = layer_of(LayerRecipe(weight=codes, act=TOKEN_A8), normal(7, 48), normal(7), dtype=dtype)
    assert layer(normal(2, 48).to(dtype)).dtype == dtype


def test_a_low_rank_branch_adds_its_product_of_the_transformed_input(normal):
    """y = x' Q(R)ᵀ + (x' downᵀ) upᵀ; a branch as wide as the layer carries all of it."""
    weight, x = normal(7, 48), normal(3, 48, seed=1)
    transform = Transform(scale_C=normal(48, seed=3).exp())
    moved = transform.of_weight(weight)
    up, magnitudes, down = torch.linalg.svd(moved, full_matrices=False)
    for rank in (2, 7):
        branch = LowRank(down[:rank], up[:, :rank] * magnitudes[:rank])
        residual = quantize_weight(moved - branch.up_Or @ branch.down_rC, QuantSpec(4, "per_channel"))
        layer = layer_of(LayerRecipe(transform, residual, low_rank=branch), weight)
        expected = transform(x) @ (residual.dequantize().double() + branch.up_Or @ branch.down_rC).T
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    assert relative_error(layer(x), x @ weight.T) < 1e-6


def test_the_low_rank_branch_sees_the_input_before_it_is_rounded(normal):
    weight, x = normal(7, 48), normal(3, 48, seed=1)
    branch = LowRank(weight, torch.eye(7, dtype=torch.float64))
    zero = quantize_weight(torch.zeros(7, 48), QuantSpec(4, "per_channel"))
    act = ActQuant(QuantSpec(2, "per_token", dynamic=True))
    torch.testing.assert_close(layer_of(LayerRecipe(weight=zero, act=act, low_rank=branch), weight)(x), x @ weight.T)


def test_static_ranges_and_biases_follow_the_clock(normal):
    """One layer, three groups of steps: each takes its own range, shift and bias."""
    weight, bias, x = normal(7, 48), normal(7, seed=1), normal(5, 48, seed=2)
    groups = torch.tensor([0, 1, 1, 2])
    transform = Transform(StepTable(normal(3, 48, seed=3), groups))
    high = StepTable(torch.tensor([0.5, 1.5, 4.0]), groups)
    act = static_quant(high.map(torch.neg), high, QuantSpec(6, "per_tensor"))
    codes = quantize_weight(weight, QuantSpec(8, "per_channel"))
    clock = StepClock(4)
    layer = layer_of(LayerRecipe(transform, codes, act), weight, bias, clock=clock)
    outputs = []
    for step, group in enumerate(groups):
        clock.set(step, 4)
        scale = float(high.rows[group]) / 31
        rounded = ((x - transform.shift.rows[group]) / scale).round().clamp(-31, 31) * scale
        expected = rounded @ in_float64(codes).T + bias + weight @ transform.shift.rows[group]
        outputs.append(layer(x))
        torch.testing.assert_close(outputs[-1], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(outputs[1], outputs[2]) and not torch.allclose(outputs[0], outputs[1])


def test_tables_for_more_steps_than_the_recipe_says_are_refused(small_target):
    """Else a sampler with another number of steps would pick wrong rows in silence."""
    site = small_target.sites[0]
    shared = Transform(StepTable(torch.zeros(2, 48), torch.tensor([0, 0, 1])))
    layers = {name: LayerRecipe(transform=shared) for name in site.consumers}
    for said in (None, 4):
        with pytest.raises(ValueError, match="3 denoising steps"):
            build(small_target, ModelRecipe(layers, num_steps=said), dtype=torch.float32)
    build(small_target, ModelRecipe(layers, num_steps=3), dtype=torch.float32)


def test_a_folded_layer_expects_its_input_shifted_and_scaled_and_rotates_it_itself(normal):
    weight, x = normal(7, 48), normal(3, 48, seed=1)
    transform = Transform(StepTable.constant(normal(48, seed=2)), normal(48, seed=3).exp(), (Hadamard(48),))
    layer = layer_of(LayerRecipe(transform), weight, folded=True)
    shifted = transform.shift_and_scale_only()(x)
    torch.testing.assert_close(layer(shifted), x @ weight.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel", [(2, 2), (4, 2)], ids=str)
def test_a_patch_embedding_is_its_convolution(kernel, normal):
    conv = nn.Conv2d(3, 7, kernel, stride=kernel).double().requires_grad_(False)
    linear = layer_of(LayerRecipe(), conv.weight.flatten(1), conv.bias)
    embed, images = QuantPatchEmbed(conv, linear), normal(2, 3, 8, 12)
    torch.testing.assert_close(embed(images), conv(images), rtol=1e-12, atol=1e-12)


def test_a_quantized_patch_embedding_rounds_per_patch(normal):
    conv = nn.Conv2d(3, 7, 2, stride=2).double().requires_grad_(False)
    codes = quantize_weight(conv.weight.flatten(1), QuantSpec(8, "per_channel"))
    embed = QuantPatchEmbed(conv, layer_of(LayerRecipe(weight=codes, act=TOKEN_A8), conv.weight.flatten(1), conv.bias))
    images = normal(2, 3, 8, 12)
    patch = images[1, :, 2:4, 4:6].reshape(1, -1)
    expected = fake_quantize_activation(patch, TOKEN_A8) @ in_float64(codes).T + conv.bias
    torch.testing.assert_close(embed(images)[1, :, 1, 2], expected[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("arguments", [{"stride": 1}, {"stride": 2, "padding": 1}, {"stride": 2, "groups": 3}], ids=str)
def test_a_convolution_that_is_no_patch_embedding_is_refused(arguments, normal):
    with pytest.raises(ValueError, match="patch embeddings"):
        QuantPatchEmbed(nn.Conv2d(3, 6, 2, **arguments), layer_of(LayerRecipe(), normal(6, 12)))


def test_a_finer_weight_comes_closer(small_target, inputs):
    reference = run(float_copy(small_target, dtype=torch.float32), inputs)
    errors = []
    for bits in (2, 4, 8):
        recipe = nearest(small_target, Bits(QuantSpec(bits, "per_channel"), None), {})
        errors.append(relative_error(run(build(small_target, recipe, dtype=torch.float32), inputs), reference))
    assert errors[0] > 2 * errors[1] > 8 * errors[2] > 0
