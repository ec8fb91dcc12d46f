from __future__ import annotations

import copy
import io
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from ditbench.harness.backends import onednn_int8, simulate, vnni
from ditbench.harness.backends.base import choose
from ditbench.harness.common.errors import UserError
from ditbench.harness.measurement.latency import resident_bytes
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight, static_quant
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.spec import Bits, QuantSpec
from ditbench.harness.quant.steps import StepTable

CPU = torch.device("cpu")
WEIGHTS = [
    QuantSpec(8, granularity, symmetric)
    for granularity, symmetric in product(("per_channel", "per_tensor"), (True, False))
]
ACTS = [
    QuantSpec(8, granularity, symmetric, dynamic)
    for (granularity, dynamic), symmetric in product(
        (("per_token", True), ("per_tensor", True), ("per_tensor", False)), (True, False)
    )
]
SHAPES = [(1, 1, 1), (1, 13, 7), (33, 17, 5), (20, 1152, 96), (9, 4608, 40)]  # tokens, C, O
PLAIN = (WEIGHTS[0], ACTS[0])  # what bits=w8a8 means by default
SYMMETRIC_ERROR, ASYMMETRIC_ERROR, BOTH_ASYMMETRIC_ERROR = 1e-6, 5e-6, 5e-5  # the terms of these cancel in float32

needs_int8 = pytest.mark.skipif(onednn_int8.cpu_lacks() is not None, reason=str(onednn_int8.cpu_lacks()))


def describe(spec: QuantSpec) -> str:
    side = "symmetric" if spec.symmetric else "asymmetric"
    return f"{spec.granularity}-{side}{'-dynamic' if spec.dynamic else ''}"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def recipe_for(weight: QuantSpec, act: QuantSpec, width: int, outputs: int, x: Tensor | None = None) -> LayerRecipe:
    """Static ranges clip x a little, so that the ends of the range are reached."""
    weight_OC = normal(outputs, width, seed=1)
    if not weight.symmetric:
        weight_OC = weight_OC + 0.5  # moves the zero points off the middle
    if act.dynamic:
        return LayerRecipe(weight=quantize_weight(weight_OC, weight), act=ActQuant(act))
    assert x is not None
    low, high = (StepTable(0.8 * end.float()[None]) for end in (x.amin(), x.amax()))
    return LayerRecipe(weight=quantize_weight(weight_OC, weight), act=static_quant(low, high, act))


def kernels(recipe: LayerRecipe):
    """Integer and simulated."""
    assert onednn_int8.unsupported(recipe, CPU) is None
    return onednn_int8.make_kernel(recipe, torch.empty(0)), simulate.make_kernel(recipe, torch.empty(0))


def relative_error(y: Tensor, expected: Tensor) -> float:
    """Of the worst element, against the largest."""
    return float((y - expected).abs().max() / expected.abs().max())


@needs_int8
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("act", ACTS, ids=describe)
@pytest.mark.parametrize("weight", WEIGHTS, ids=describe)
def test_integer_and_simulated_execution_agree(weight, act, shape):
    tokens, width, outputs = shape
    x = normal(tokens, width)
    for name, candidate in {
        "normal": x,
        "one-sided": torch.nn.functional.gelu(2 * x) + 0.1,
        "an outlier": x.index_fill(1, torch.tensor([width // 2]), 1e4),
        "bf16": x.bfloat16(),
    }.items():
        recipe = recipe_for(weight, act, width, outputs, candidate)
        integer, simulated = kernels(recipe)
        asymmetric_error = ASYMMETRIC_ERROR if weight.symmetric else BOTH_ASYMMETRIC_ERROR
        limit = SYMMETRIC_ERROR if act.symmetric else asymmetric_error
        assert relative_error(integer(candidate, None), simulated(candidate, None)) < limit, name


@needs_int8
def test_the_product_is_the_one_of_the_definition():
    """Against whole numbers, without the simulated path: y = s_x s_w Σ (q − u)(w − v)."""
    x, weight_OC = normal(6, 21), normal(4, 21, seed=1) + 0.5
    weight = quantize_weight(weight_OC, QuantSpec(8, "per_channel", symmetric=False))
    kernel = onednn_int8.make_kernel(
        LayerRecipe(weight=weight, act=ActQuant(QuantSpec(8, "per_token", False, True))), weight_OC
    )
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    scale = (high - low) / 255
    zero = torch.round(-low / scale)
    for token in range(6):
        q = (torch.round(x[token] / scale[token]) + zero[token]).clamp(0, 255).long() - int(zero[token])
        for channel in range(4):
            w = weight.codes_OC[channel].long() - int(weight.zero_point_OG[channel])
            expected = int((q * w).sum()) * float(scale[token]) * float(weight.scale_OG[channel])
            assert float(kernel(x, None)[token, channel]) == pytest.approx(expected, rel=1e-5, abs=1e-4)


@needs_int8
@pytest.mark.parametrize("symmetric", [True, False])
def test_static_ranges_follow_the_denoising_step(symmetric):
    x = normal(12, 64)
    spec = QuantSpec(8, "per_tensor", symmetric)
    group_of_step = torch.tensor([0, 0, 1, 2])
    low = StepTable(torch.tensor([-3.0, -1.0, -0.1]), group_of_step)
    high = StepTable(torch.tensor([4.0, 0.5, 2.0]), group_of_step)
    recipe = replace(recipe_for(*PLAIN, 64, 10), act=static_quant(low, high, spec))
    integer, simulated = kernels(recipe)
    outputs = [integer(x, torch.tensor(step)) for step in range(4)]
    for step, y in enumerate(outputs):
        assert relative_error(y, simulated(x, torch.tensor(step))) < ASYMMETRIC_ERROR
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[2], rtol=0.01)
    assert not torch.allclose(outputs[2], outputs[3], rtol=0.01)


@needs_int8
@pytest.mark.parametrize("act", ACTS[:2], ids=describe)
def test_a_token_of_zeros_gives_zeros_and_leaves_the_others_alone(act):
    x = normal(5, 96)
    x[2] = 0
    integer, _ = kernels(recipe_for(WEIGHTS[0], act, 96, 30))
    y = integer(x, None)
    typical = float(y.abs().mean())
    assert float(y[2].abs().max()) <= (0 if act.symmetric else 1e-5 * typical)
    torch.testing.assert_close(integer(x[[0, 1, 3, 4]], None), y[[0, 1, 3, 4]], rtol=0, atol=1e-6 * typical)


@needs_int8
def test_a_token_with_nan_stays_nan():
    x = normal(3, 40)
    x[1, 7] = torch.nan
    integer, _ = kernels(recipe_for(*PLAIN, 40, 8))
    y = integer(x, None)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@needs_int8
def test_the_smallest_numbers_do_not_wrap_around():
    """Among subnormal numbers the scale is coarse: 190 · 2⁻¹⁴⁹ / 127 rounds to 2⁻¹⁴⁹, and 190 is no code."""
    x = torch.full((1, 8), 190 * 2.0**-149)
    kernel = onednn_int8.make_kernel(recipe_for(*PLAIN, 8, 3), torch.empty(0))
    unsigned_MC, _, _ = kernel.quantize(x, x.shape, None, overwrite=False)
    assert (unsigned_MC == 128 + 127).all()


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_batches_keep_their_shape_and_the_input_its_values(dtype):
    x_BTC = normal(2, 5, 24).to(dtype)
    before = x_BTC.clone()
    integer, _ = kernels(recipe_for(*PLAIN, 24, 7))
    y = integer(x_BTC, None)
    assert (y.shape, y.dtype) == ((2, 5, 7), torch.float32)
    assert torch.equal(y.flatten(0, 1), integer(x_BTC.flatten(0, 1), None))
    assert torch.equal(integer(x_BTC.transpose(0, 1), None), y.transpose(0, 1))
    assert torch.equal(x_BTC, before)


@needs_int8
@pytest.mark.parametrize("weight", WEIGHTS[:2], ids=describe)
@pytest.mark.parametrize("act", [ACTS[0], ACTS[5]], ids=describe)
def test_it_survives_saving_copying_and_moving(weight, act):
    x = normal(6, 50)
    recipe = recipe_for(weight, act, 50, 11, x)
    kernel = onednn_int8.make_kernel(recipe, torch.empty(0))
    y = kernel(x, None)

    blank = replace(recipe_for(weight, act, 50, 11, 3 * x), weight=quantize_weight(normal(11, 50, seed=9), weight))
    buffer = io.BytesIO()
    torch.save(kernel.state_dict(), buffer)
    buffer.seek(0)
    loaded = onednn_int8.make_kernel(blank, torch.empty(0))
    assert not torch.allclose(loaded(x, None), y)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(loaded(x, None), y)

    buffer = io.BytesIO()
    torch.save(kernel, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x, None), y)
    assert torch.equal(copy.deepcopy(kernel).to("cpu")(x, None), y)
    assert torch.equal(kernel(x, None), y)


@needs_int8
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (96, 1152), (33, 4608)], ids=str)
def test_the_packed_layout_gives_the_codes_back(shape):
    recipe = recipe_for(*PLAIN, shape[1], shape[0])
    kernel = onednn_int8.make_kernel(recipe, torch.empty(0))
    assert torch.equal(kernel.codes_OC(), recipe.weight.codes_OC)


@needs_int8
def test_the_weight_is_held_once():
    kernel = onednn_int8.make_kernel(recipe_for(*PLAIN, 256, 128), torch.empty(0))
    kernel(normal(4, 256), None)
    per_channel = 4 + 8  # a float32 scale and the zero point that the operator insists on
    assert resident_bytes(kernel) == 128 * 256 + 128 * per_channel
    stored = sum(tensor.nbytes for tensor in kernel.state_dict().values())
    assert stored == 128 * 256 + 128 * 4


@needs_int8
def test_it_is_chosen_for_w8a8_on_a_cpu_where_nothing_faster_runs(monkeypatch):
    monkeypatch.setattr(vnni, "unsupported", lambda recipe, device: "not here")
    assert choose(recipe_for(*PLAIN, 16, 4), CPU).NAME == "onednn_int8"


@pytest.mark.parametrize(
    ("recipe", "device", "reason"),
    [
        (LayerRecipe(), "cpu", "stays in float"),
        (replace(recipe_for(*PLAIN, 16, 4), act=None), "cpu", "stays in float"),
        (recipe_for(replace(WEIGHTS[0], bits=4), ACTS[0], 16, 4), "cpu", "this is W4A8"),
        (recipe_for(WEIGHTS[0], replace(ACTS[0], bits=6), 16, 4), "cpu", "this is W8A6"),
        (recipe_for(QuantSpec(8, "per_group", group_size=8), ACTS[0], 16, 4), "cpu", "these are per_group"),
        (recipe_for(WEIGHTS[0], QuantSpec(8, "per_group", True, True, 8), 16, 4), "cpu", "these are per_group"),
        (recipe_for(*PLAIN, 16, 4), "meta", "the device is meta"),
    ],
)
def test_what_it_cannot_run_it_says(recipe, device, reason):
    with pytest.raises(UserError, match=reason):
        choose(recipe, torch.device(device), "onednn_int8")


def test_a_cpu_without_int8_instructions_simulates(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    for backend in (onednn_int8, vnni):
        backend.cpu_lacks.cache_clear()
    try:
        assert choose(recipe_for(*PLAIN, 16, 4), CPU).NAME == "simulate"
    finally:
        for backend in (onednn_int8, vnni):
            backend.cpu_lacks.cache_clear()


@needs_int8
def test_an_operator_that_returns_wrong_values_is_not_used(monkeypatch):
    class Broken:
        qlinear_prepack = torch.ops.onednn.qlinear_prepack

        @staticmethod
        def qlinear_pointwise(*arguments):
            return torch.ops._broken_original(*arguments) + 1

    monkeypatch.setattr(torch.ops, "_broken_original", torch.ops.onednn.qlinear_pointwise, raising=False)
    monkeypatch.setattr(torch.ops, "onednn", Broken)
    onednn_int8.cpu_lacks.cache_clear()
    try:
        assert "wrong values" in onednn_int8.unsupported(recipe_for(*PLAIN, 16, 4), CPU)
    finally:
        onednn_int8.cpu_lacks.cache_clear()


@needs_int8
def test_a_whole_transformer_agrees_with_its_simulation():
    from ditbench.harness.build.build import build, quant_layers
    from ditbench.harness.models.base import ModelSpec
    from ditbench.harness.models.loading import load_model
    from ditbench.methods import rtn

    shape = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 1, "out_channels": 2, "num_layers": 2}
    shape |= {"sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10}
    model = load_model(ModelSpec(name="tiny", family="dit", random=shape))
    target = model.target()
    bits = Bits(*PLAIN)
    recipe = rtn.apply(target, {}, bits, rtn.Params())
    inputs = model.step_inputs(2)
    integer, simulated = (
        build(target, recipe, dtype=torch.float32, backend=backend) for backend in ("onednn_int8", "simulate")
    )
    assert {layer.kind for layer in quant_layers(integer).values()} == {"measured"}

    # Layer by layer on the same input: behind a layer, a last-bit difference may flip a rounding of the next one.
    seen: dict[str, Tensor] = {}
    for name, layer in quant_layers(simulated).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    expected = simulated(**inputs).sample
    for name, layer in quant_layers(integer).items():
        assert relative_error(layer(seen[name]), quant_layers(simulated)[name](seen[name])) < SYMMETRIC_ERROR, name

    y = integer(**inputs).sample
    assert relative_error(y, expected) < 1e-2
    copied = copy.deepcopy(integer).to("cpu")
    assert torch.equal(copied(**inputs).sample, y)
