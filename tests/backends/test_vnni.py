from __future__ import annotations

import copy
import io
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from ditbench.harness.backends import onednn_int8, simulate, vnni, vnni_extension
from ditbench.harness.backends.base import choose
from ditbench.harness.common.errors import UserError
from ditbench.harness.measurement.latency import resident_bytes
from ditbench.harness.quant.quantizers import ActQuant, QuantizedWeight, quantize_weight, static_quant
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.spec import QuantSpec
from ditbench.harness.quant.steps import StepTable

CPU = torch.device("cpu")
GROUP = 32
WEIGHTS = [
    QuantSpec(bits, granularity, symmetric, group_size=GROUP if granularity == "per_group" else None)
    for bits, granularity, symmetric in product((8, 4), ("per_channel", "per_tensor", "per_group"), (True, False))
]
BETWEEN = [QuantSpec(bits, "per_channel", symmetric) for bits, symmetric in product((7, 6, 5, 3, 2), (True, False))]
ACTS = [
    QuantSpec(bits, granularity, symmetric, dynamic=True, group_size=GROUP if granularity == "per_group" else None)
    for bits, granularity, symmetric in product((8, 4), ("per_token", "per_tensor", "per_group"), (True, False))
]
SHAPES = [
    (1, 1, 1),
    (33, 17, 5),
    (7, 64, 33),
    (20, 1152, 96),
]  # tokens, C, O: no whole panel, row block or quad, and all

needs_vnni = pytest.mark.skipif(vnni.cpu_lacks() is not None, reason=str(vnni.cpu_lacks()))


def describe(spec: QuantSpec) -> str:
    return f"{spec.bits}-{spec.granularity}-{'symmetric' if spec.symmetric else 'asymmetric'}"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def recipe_for(weight: QuantSpec, act: QuantSpec, width: int, outputs: int) -> LayerRecipe:
    weight_OC = normal(outputs, width, seed=1) + (0 if weight.symmetric else 0.5)  # zero points off the middle
    return LayerRecipe(weight=quantize_weight(weight_OC, weight), act=ActQuant(act))


def with_zero_points_off_the_grid(side: str) -> LayerRecipe:
    """Of a range that keeps its bounds instead of an exact zero; integers cannot hold it."""
    asymmetric = next(spec for spec in WEIGHTS if not spec.symmetric)
    recipe = recipe_for(asymmetric, ACTS[0], 16, 4)
    assert isinstance(recipe.weight, QuantizedWeight) and recipe.weight.zero_point_OG is not None
    if side == "weight":
        return replace(recipe, weight=replace(recipe.weight, zero_point_OG=recipe.weight.zero_point_OG + 0.5))
    spec = QuantSpec(8, "per_tensor", symmetric=False)
    scale, zero_point = StepTable(torch.tensor([0.1])), StepTable(torch.tensor([120.5]))
    return replace(recipe, act=ActQuant(spec, scale=scale, zero_point=zero_point))


def kernels(recipe: LayerRecipe):
    """Integer and simulated."""
    assert vnni.unsupported(recipe, CPU) is None
    return vnni.make_kernel(recipe, torch.empty(0)), simulate.make_kernel(recipe, torch.empty(0))


@needs_vnni
@pytest.mark.parametrize(
    ("weight", "act", "shape"),
    [
        pytest.param(weight, act, shape, id=f"{describe(weight)}-{describe(act)}-{shape}")
        for weight, act, shape in (*product(WEIGHTS, ACTS, SHAPES), *product(BETWEEN, ACTS[:2], SHAPES))
        if shape[1] % GROUP == 0 or "per_group" not in (weight.granularity, act.granularity)
    ],
)
def test_integer_and_simulated_execution_give_the_same_bits(weight, act, shape):
    tokens, width, outputs = shape
    x = normal(2, tokens, width) + 0.3
    for candidate in (x, x.index_fill(2, torch.tensor([width // 2]), 1e3), x.bfloat16()):
        integer, simulated = kernels(recipe_for(weight, act, width, outputs))
        assert torch.equal(integer(candidate, None), simulated(candidate, None))


@needs_vnni
@pytest.mark.parametrize(("weight_bits", "tokens"), [(8, 600), (4, 1100)])
def test_rows_are_shared_out_in_pieces_without_a_seam(weight_bits, tokens):
    recipe = recipe_for(QuantSpec(weight_bits, "per_channel"), ACTS[0], 40, 80)
    integer, simulated = kernels(recipe)
    x = normal(tokens, 40)
    assert torch.equal(integer(x, None), simulated(x, None))
    assert torch.equal(integer(x[517:530], None), integer(x, None)[517:530])


@needs_vnni
def test_the_product_is_the_one_of_the_definition():
    """Against whole numbers, without the simulated path: y = Σ_g s_x s_w Σ (q − u)(w − v)."""
    x, weight_OC = normal(6, 64), normal(4, 64, seed=1) + 0.5
    weight = quantize_weight(weight_OC, QuantSpec(4, "per_group", symmetric=False, group_size=32))
    act = ActQuant(QuantSpec(8, "per_token", False, True))
    y = vnni.make_kernel(LayerRecipe(weight=weight, act=act), weight_OC)(x, None)
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    scale = (high - low) / 255
    zero = torch.round(-low / scale)
    for token, channel in product(range(6), range(4)):
        q = (torch.round(x[token] / scale[token]) + zero[token]).clamp(0, 255).long() - int(zero[token])
        expected = 0.0
        for group in range(2):
            here = slice(32 * group, 32 * group + 32)
            w = weight.codes_OC[channel, here].long() - int(weight.zero_point_OG[channel, group])
            expected += int((q[here] * w).sum()) * float(scale[token]) * float(weight.scale_OG[channel, group])
        assert float(y[token, channel]) == pytest.approx(expected, rel=1e-5, abs=1e-4)


@needs_vnni
def test_bias_and_cast_are_part_of_the_product():
    """Rounded once to bfloat16, after everything was added."""
    x = normal(9, 40).bfloat16()
    integer, _ = kernels(recipe_for(WEIGHTS[0], ACTS[0], 40, 21))
    bias = normal(1, 21, seed=3)
    y = integer.layer(x, None, None, None, StepTable(bias))
    assert torch.equal(y, (integer(x, None) + bias).bfloat16())


@needs_vnni
def test_rounding_to_bfloat16_takes_ties_to_even():
    integer, _ = kernels(recipe_for(WEIGHTS[0], ACTS[0], 8, 40))
    bias = torch.randint(-(2**31), 2**31 - 1, (1, 40), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    bias = ((bias & ~0xFFFF) | 0x8000).view(torch.float32).nan_to_num(1.0, 1.0, 1.0)  # halfway between two
    y = integer.layer(torch.zeros(1, 8, dtype=torch.bfloat16), None, None, None, StepTable(bias))
    assert torch.equal(y, bias.bfloat16())


@needs_vnni
@pytest.mark.parametrize("biased", [False, True])
def test_a_low_rank_branch_is_added_before_the_bias_and_both_before_the_cast(biased):
    """The order of the simulated path: another one rounds differently."""
    x = normal(5, 24).bfloat16()
    integer, _ = kernels(recipe_for(WEIGHTS[6], ACTS[0], 24, 9))
    down, up = normal(2, 24, seed=4).bfloat16(), normal(9, 2, seed=5).bfloat16()
    bias = normal(1, 9, seed=6) * 1e3
    expected = integer(x, None) + (x @ down.T) @ up.T
    expected = (expected + bias if biased else expected).bfloat16()
    assert torch.equal(integer.layer(x, None, None, (down, up), StepTable(bias) if biased else None), expected)


@needs_vnni
@pytest.mark.parametrize("symmetric", [True, False])
def test_static_ranges_follow_the_denoising_step(symmetric):
    x = normal(12, 64)
    low = StepTable(torch.tensor([-3.0, -1.0, -0.1]), torch.tensor([0, 0, 1, 2]))
    high = StepTable(torch.tensor([4.0, 0.5, 2.0]), torch.tensor([0, 0, 1, 2]))
    act = static_quant(low, high, QuantSpec(8, "per_tensor", symmetric))
    integer, simulated = kernels(replace(recipe_for(WEIGHTS[6], ACTS[0], 64, 10), act=act))
    outputs = [integer(x, torch.tensor(step)) for step in range(4)]
    for step, y in enumerate(outputs):
        assert torch.equal(y, simulated(x, torch.tensor(step)))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[2], rtol=0.01)


@needs_vnni
def test_a_clipped_range_is_the_simulated_one():
    recipe = recipe_for(WEIGHTS[0], ACTS[0], 64, 10)
    integer, simulated = kernels(replace(recipe, act=replace(recipe.act, clip=0.6)))
    x = normal(12, 64)
    assert torch.equal(integer(x, None), simulated(x, None))


@needs_vnni
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("width", [16, 41])
def test_a_token_with_nan_stays_nan_and_one_of_zeros_zero(width, static):
    x = normal(4, width)
    x[1, width - 1], x[2] = torch.nan, 0
    recipe = recipe_for(WEIGHTS[0], ACTS[0], width, 8)
    if static:
        ends = (StepTable(torch.tensor([end])) for end in (-3.0, 3.0))
        recipe = replace(recipe, act=static_quant(*ends, QuantSpec(8, "per_tensor")))
    y = kernels(recipe)[0](x, None)
    assert y[1].isnan().all()
    assert y[[0, 3]].isfinite().all()
    assert (y[2] == 0).all()


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_batches_keep_their_shape_and_the_input_its_values(dtype):
    x_BTC = normal(2, 5, 24).to(dtype)
    before = x_BTC.clone()
    integer, _ = kernels(recipe_for(WEIGHTS[0], ACTS[0], 24, 7))
    y = integer(x_BTC, None)
    assert (y.shape, y.dtype) == ((2, 5, 7), torch.float32)
    assert torch.equal(integer(x_BTC.transpose(0, 1), None), y.transpose(0, 1))
    assert integer.layer(x_BTC, None, None, None, None).dtype == dtype
    assert torch.equal(x_BTC, before)


@needs_vnni
@pytest.mark.parametrize("weight", [WEIGHTS[0], WEIGHTS[7], WEIGHTS[11]], ids=describe)
def test_it_survives_saving_and_copying(weight):
    x = normal(6, 64)
    kernel = kernels(recipe_for(weight, ACTS[0], 64, 11))[0]
    y = kernel(x, None)
    buffer = io.BytesIO()
    torch.save(kernel.state_dict(), buffer)
    buffer.seek(0)
    blank = replace(recipe_for(weight, ACTS[0], 64, 11), weight=quantize_weight(normal(11, 64, seed=9), weight))
    loaded = vnni.make_kernel(blank, torch.empty(0))
    assert not torch.allclose(loaded(x, None), y)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(loaded(x, None), y)
    assert torch.equal(copy.deepcopy(kernel)(x, None), y)


@needs_vnni
@pytest.mark.parametrize(("bits", "bytes_per_weight"), [(8, 1), (5, 1), (4, 0.5), (3, 0.5)])
def test_weights_are_held_once_in_bytes_or_half_bytes(bits, bytes_per_weight):
    kernel = kernels(recipe_for(QuantSpec(bits, "per_channel"), ACTS[0], 256, 128))[0]
    kernel(normal(4, 256), None)
    per_channel = 4 + 4  # a float32 scale and the sum of the codes
    assert resident_bytes(kernel) == 128 * 256 * bytes_per_weight + 128 * per_channel


@needs_vnni
def test_a_compiled_layer_has_no_graph_break():
    kernel = kernels(recipe_for(WEIGHTS[6], ACTS[0], 64, 32))[0]
    x = normal(6, 64).bfloat16()
    run = torch.compile(lambda x: kernel.layer(x, None, None, None, None), backend="aot_eager", fullgraph=True)
    assert torch.equal(run(x), kernel.layer(x, None, None, None, None))


@needs_vnni
@pytest.mark.parametrize(
    ("weight", "act"),
    [(WEIGHTS[0], ACTS[0]), (WEIGHTS[6], ACTS[0]), (WEIGHTS[6], ACTS[6]), (WEIGHTS[10], replace(ACTS[0], bits=6))],
    ids=["w8a8", "w4a8", "w4a4", "w4a6-groups"],
)
def test_it_is_chosen_on_the_cpu(weight, act, monkeypatch):
    monkeypatch.setattr(onednn_int8, "unsupported", lambda recipe, device: "not here")  # with AMX it goes first
    assert choose(recipe_for(weight, act, 64, 4), CPU).NAME == "vnni"


@pytest.mark.parametrize(
    ("recipe", "device", "reason"),
    [
        (LayerRecipe(), "cpu", "stays in float"),
        (recipe_for(replace(WEIGHTS[4], group_size=8), replace(ACTS[4], group_size=16), 32, 4), "cpu", r"\[8, 16\]"),
        (recipe_for(replace(WEIGHTS[4], group_size=2), ACTS[0], 16, 4), "cpu", "multiple of 4"),
        (recipe_for(WEIGHTS[0], ACTS[0], 33_004, 1), "cpu", "33004 input channels could overflow"),
        (with_zero_points_off_the_grid("weight"), "cpu", "zero points of weights that are whole"),
        (with_zero_points_off_the_grid("act"), "cpu", "zero points of activations that are whole"),
        (recipe_for(WEIGHTS[0], ACTS[0], 16, 4), "meta", "the device is meta"),
    ],
)
def test_what_it_cannot_run_it_says(recipe, device, reason):
    with pytest.raises(UserError, match=reason):
        choose(recipe, torch.device(device), "vnni")


@pytest.mark.parametrize(
    ("place", "name", "answer", "reason"),
    [(torch.cpu, "_is_vnni_supported", False, "AVX512-VNNI"), (vnni_extension.shutil, "which", None, "on the PATH")],
)
def test_a_machine_that_lacks_something_says_what(place, name, answer, reason, monkeypatch):
    monkeypatch.setattr(place, name, lambda *_: answer)
    vnni_extension.cpu_lacks.cache_clear()
    try:
        assert reason in str(vnni.unsupported(recipe_for(WEIGHTS[0], ACTS[0], 16, 4), CPU))
    finally:
        vnni_extension.cpu_lacks.cache_clear()
