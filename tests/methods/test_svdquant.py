from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from newer_pipelines import NEWER, NEWER_SIZES
from small_pipelines import SIZES, SMALL

from ditbench.harness.build.build import build, float_copy, quant_layers
from ditbench.harness.calibration.channel_statistics import channel_stats
from ditbench.harness.calibration.recording import calibrate
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.conformance import DYNAMIC, STATIC, relative_error
from ditbench.harness.models.base import LoadedModel, ModelSpec, Sampler
from ditbench.harness.models.known_families import family
from ditbench.harness.quant.accounting import account
from ditbench.harness.quant.gptq import gptq
from ditbench.harness.quant.quantizers import activation_affine, quantize_weight
from ditbench.harness.quant.spec import Bits, QuantSpec
from ditbench.harness.samples.samples import Prompt
from ditbench.methods import rtn, svdquant
from ditbench.methods.svdquant import Params, candidates, site_samples, smoothing_scale

W4A4 = Bits(QuantSpec(4, "per_channel"), QuantSpec(4, "per_token", dynamic=True))
GELU_LAYER, GELU_SITE = "transformer_blocks.1.ff.net.2", "transformer_blocks.1.ff_mid"
QKV = tuple(f"transformer_blocks.0.attn1.to_{operand}" for operand in "qkv")
QUICK = Params(smooth="half")


def recipe_of(target, calibration, bits=W4A4, params=QUICK):
    return svdquant.apply(target, svdquant.fit(target, calibration, bits, params), bits, params)


def inputs_of(target, calibration, name: str) -> torch.Tensor:
    """All inputs of one float layer over the calibration, (T, C), float64."""
    model, seen = float_copy(target, dtype=torch.float32), []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        for step, inputs in calibration.batches():
            model.clock.set(step, calibration.num_steps)
            model(**inputs)
    return torch.cat(seen)


def output_of(model, small_model, dtype=torch.float32, step: int = 2) -> torch.Tensor:
    inputs = small_model.step_inputs(2)
    model.clock.set(step, 4)
    with torch.no_grad():
        return model(**{n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}).sample


def round_in_groups(matrix: np.ndarray, group: int, lowest: int, highest: int) -> np.ndarray:
    """One scale per row and group of columns, codes from lowest to highest, zero at code 0."""
    result = np.zeros_like(matrix)
    for row in range(matrix.shape[0]):
        for start in range(0, matrix.shape[1], group):
            values = matrix[row, start : start + group]
            scale = np.abs(values).max() / highest or 1.0
            result[row, start : start + group] = np.clip(np.round(values / scale), lowest, highest) * scale
    return result


def sixteen_bits(matrix: np.ndarray) -> np.ndarray:
    return torch.from_numpy(matrix.copy()).bfloat16().double().numpy()


def layer_by_hand(x, weight, bias, scale, rank, group, *, shift):
    """Y = (X̂ aᵀ) bᵀ + Q(X̂) Q(R)ᵀ + (b − W·shift), X̂ = (X + shift) / λ."""
    x_hat, w_hat = (x + shift) / scale, weight * scale
    left, singular, right = np.linalg.svd(w_hat)
    down, up = sixteen_bits(right[:rank]), sixteen_bits(left[:, :rank] * singular[:rank])
    rounded_x = round_in_groups(x_hat, group, *((0, 15) if shift else (-7, 7)))
    rounded_r = round_in_groups(w_hat - up @ down, group, -7, 7)
    return x_hat @ down.T @ up.T + rounded_x @ rounded_r.T + bias - weight.sum(1) * shift


@pytest.mark.parametrize(
    ("name", "site", "shift"),
    [(GELU_LAYER, GELU_SITE, 0.1875), ("transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff_in", 0.0)],
    ids=["behind a GELU", "signed"],
)
def test_a_layer_is_the_papers_in_slow_loops(name, site, shift, small_target, small_calibration):
    """Away from the defaults: rank 5, groups of 12, 3 grids, another shift."""
    params = Params(rank=5, group_size=12, num_grids=3, gelu_shift=0.1875, sample_rows=10**6)
    state = svdquant.fit(small_target, small_calibration, W4A4, params)
    x = inputs_of(small_target, small_calibration, name).numpy()
    linear = small_target.module(name)
    weight, bias = linear.weight.double().numpy(), linear.bias.double().numpy()
    errors, scales = [], []
    for alpha, beta in [(0, 0), (1 / 3, 0), (2 / 3, 0), (1 / 3, 2 / 3), (2 / 3, 1 / 3)]:
        scales.append(np.abs(x + shift).max(0) ** alpha / np.abs(weight).max(0) ** beta)
        output = layer_by_hand(x, weight, bias, scales[-1], 5, 12, shift=shift)
        errors.append(np.square(x @ weight.T + bias - output).sum())
    best = int(np.argmin(errors))
    assert best != 0 and sorted(errors)[1] > 1.003 * min(errors), "the search has to have something to find"
    scale = state[f"{site}/scale"].double().numpy()
    np.testing.assert_allclose(scale, scales[best], rtol=1e-5)

    recipe = svdquant.apply(small_target, state, W4A4, params)
    layer = quant_layers(build(small_target, recipe, dtype=torch.float64))[name]
    expected = layer_by_hand(x[:40], weight, bias, scale, 5, 12, shift=shift)
    np.testing.assert_allclose(layer(torch.from_numpy(x[:40])), expected, rtol=1e-6, atol=1e-6)


def test_the_candidates_of_the_paper_are_thirty_nine():
    found = candidates(20)
    assert len(found) == len(set(found)) == 39 and found[0] == (0, 0)
    assert found[1:20] == [(pytest.approx(i / 20), 0) for i in range(1, 20)]
    assert found[20:] == [(pytest.approx(i / 20), pytest.approx(1 - i / 20)) for i in range(1, 20)]
    assert candidates(1) == [(0, 0)]


def test_half_takes_the_square_root_of_both_ranges(small_target, small_calibration):
    bits = Bits(QuantSpec(8, "per_channel"), None)
    state = svdquant.fit(small_target, small_calibration, bits, Params(smooth="half", rank=0))
    site, stats = small_target.sites[0], channel_stats(small_target, small_calibration)
    act_C = stats[site.consumers[0]].absmax_C
    weight_C = torch.cat([small_target.weight(name) for name in site.consumers]).abs().amax(0)
    torch.testing.assert_close(state[f"{site.name}/scale"], act_C.sqrt() / weight_C.sqrt())


def test_lambda_is_activation_range_over_weight_range():
    scale = smoothing_scale(torch.tensor([4.0, 0.0]), torch.tensor([2.0, 0.0]), 0.25, 0.5, floor=1e-4)
    torch.testing.assert_close(scale, torch.tensor([4**0.25 / 2**0.5, 1e-4**-0.25]))


@pytest.mark.parametrize("fold", [False, True], ids=["online", "folded"])
@pytest.mark.parametrize("smooth", ["off", "half", "grid"])
def test_the_output_is_unchanged_before_anything_is_rounded(smooth, fold, small_model, small_target, small_calibration):
    """X diag(λ)⁻¹ · diag(λ) W = X W, with the shift behind GELU and the bias that gives it back."""
    params = Params(smooth=smooth, fold=fold, num_grids=2)
    recipe = recipe_of(small_target, small_calibration, params=params)
    shifted = {name for name, layer in recipe.layers.items() if layer.transform.shift is not None}
    assert shifted == {name for name in small_target.layers if name.endswith("net.2")}
    assert (recipe.layers[GELU_LAYER].transform.scale_C is None) == (smooth == "off")
    assert len(recipe.folded) == (6 if fold and smooth != "off" else 0)
    unrounded = build(small_target, recipe.without_rounding(), dtype=torch.float64)
    expected = output_of(float_copy(small_target, dtype=torch.float64), small_model, torch.float64)
    assert relative_error(output_of(unrounded, small_model, torch.float64), expected) < 1e-10


@pytest.mark.parametrize("skip", ["attn1.to_k", "attn1.to_q", "attn1.to_v"])
@pytest.mark.parametrize("fold", [False, True], ids=["online", "folded"])
def test_a_layer_that_stays_in_float_follows_a_fold_and_nothing_else(skip, fold, small_model, small_calibration):
    target = small_model.target(skip=[skip])
    recipe = recipe_of(target, small_calibration, params=replace(QUICK, fold=fold))
    assert {name for name, layer in recipe.layers.items() if layer.low_rank is not None} == set(target.layers)
    assert any(skip in name for name in recipe.layers) == fold
    unrounded = build(target, recipe.without_rounding(), dtype=torch.float64)
    expected = output_of(float_copy(target, dtype=torch.float64), small_model, torch.float64)
    assert relative_error(output_of(unrounded, small_model, torch.float64), expected) < 1e-10


def test_with_everything_in_scope_the_plain_layers_are_rounded_after_the_fold(small_model, small_calibration):
    target = small_model.target("all")
    recipe = recipe_of(target, small_calibration, params=replace(QUICK, fold=True))
    plain = {name for name, layer in recipe.layers.items() if layer.low_rank is None}
    assert plain == set(target.layers) - set(small_model.target().layers)
    adaln = "transformer_blocks.0.norm1.linear"
    scale_C = recipe.layers[QKV[0]].transform.scale_C
    weight = target.module(adaln).weight.double()[:48] / scale_C.double()[:, None]  # the rows of shift_msa
    assert torch.equal(
        recipe.layers[adaln].weight.codes_OC[:48], quantize_weight(weight, QuantSpec(4, "per_channel")).codes_OC
    )
    assert recipe.layers[adaln].act.spec == QuantSpec(4, "per_group", dynamic=True, group_size=48)


def test_q_k_and_v_share_one_down_projection_of_their_stacked_weights(small_target, small_calibration):
    recipe = recipe_of(small_target, small_calibration, params=replace(QUICK, rank=7))
    branches = [recipe.layers[name].low_rank for name in QKV]
    assert all(branch.down_rC is branches[0].down_rC for branch in branches)
    scale_C = recipe.layers[QKV[0]].transform.scale_C.double()
    stacked = torch.cat([small_target.module(name).weight.double() * scale_C for name in QKV])
    left, singular, right = torch.linalg.svd(stacked, full_matrices=False)
    signs = (branches[0].down_rC * right[:7]).sum(1).sign()  # a pair of singular vectors is one up to its sign
    up = torch.cat([branch.up_Or for branch in branches]) * signs
    torch.testing.assert_close(branches[0].down_rC * signs[:, None], right[:7], rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(up, left[:, :7] * singular[:7], rtol=2**-8, atol=1e-6)


def test_below_eight_bits_the_format_is_groups_and_at_eight_that_of_bits(small_target, small_calibration):
    for bits, weights, acts in (
        (W4A4, QuantSpec(4, "per_group", group_size=64), QuantSpec(4, "per_group", dynamic=True, group_size=64)),
        (W4A4.with_widths(3, 8), QuantSpec(3, "per_group", group_size=64), replace(W4A4.act, bits=8)),
        (STATIC, STATIC.weight, STATIC.act),
        (Bits(None, W4A4.act), None, QuantSpec(4, "per_group", dynamic=True, group_size=64)),
        (Bits(W4A4.weight, None), QuantSpec(4, "per_group", group_size=64), None),
        (
            Bits(QuantSpec(4, "per_group", False, group_size=24), None),
            QuantSpec(4, "per_group", group_size=24),
            None,
        ),
    ):
        layer = recipe_of(small_target, small_calibration, bits).layers[GELU_LAYER]
        assert (layer.weight.spec if layer.weight else None) == weights
        if acts is not None and acts.bits < 8:
            acts = replace(acts, symmetric=False)  # unsigned behind the GELU
        assert (layer.act.spec if layer.act else None) == acts
        assert (layer.transform.shift is not None) == (acts is not None and acts.bits < 8)
    narrow = recipe_of(small_target, small_calibration).layers[QKV[0]]
    assert (narrow.weight.spec.group_size, narrow.act.spec.group_size, narrow.act.spec.symmetric) == (48, 48, True)


@pytest.mark.parametrize(("width", "size"), [(1152, 64), (4608, 64), (96, 48), (100, 50), (48, 48), (67, 1)])
def test_a_group_is_the_largest_divisor_within_reach(width, size):
    assert svdquant.group_size(QuantSpec(4, "per_channel"), width, Params()) == size


def test_a_group_size_of_bits_that_does_not_fit_is_refused(small_target, small_calibration):
    with pytest.raises(UserError, match="group_size 64 does not divide C=48"):
        recipe_of(small_target, small_calibration, Bits(QuantSpec(4, "per_group", group_size=64), None))


def test_static_activations_of_few_bits_are_refused(small_target, small_calibration):
    static = Bits(W4A4.weight, replace(STATIC.act, bits=4))
    for refuse in (
        lambda: svdquant.check_bits(static),
        lambda: svdquant.fit(small_target, small_calibration, static, QUICK),
    ):
        with pytest.raises(UserError, match="4 bits .* cannot be static; set bits.act.dynamic=true"):
            refuse()
    svdquant.check_bits(STATIC)


def test_a_gelu_never_falls_to_minus_its_shift():
    x = torch.linspace(-6, 6, 2_000_001, dtype=torch.float64)
    for approximate in ("none", "tanh"):
        assert -Params().gelu_shift < float(F.gelu(x, approximate=approximate).amin()) < -0.1699


def test_behind_a_gelu_codes_are_unsigned_and_all_of_them_are_used(small_target, small_calibration):
    recipe = recipe_of(small_target, small_calibration)
    model = build(small_target, recipe, dtype=torch.float32)
    layer = quant_layers(model)[GELU_LAYER]
    x = layer.transform(inputs_of(small_target, small_calibration, GELU_LAYER).float())
    assert float(x.amin()) > 0
    act = recipe.layers[GELU_LAYER].act
    scale, zero_point = activation_affine(x.unflatten(1, (-1, 64)), act, None)
    assert not zero_point.any(), "nothing below 0, so that zero is code 0"
    codes = torch.round(x.unflatten(1, (-1, 64)) / scale)
    assert (float(codes.amin()), float(codes.amax())) == (0, 15)


@pytest.mark.parametrize(("name", "folder"), [("wan", "blocks.0.ffn"), ("qwen_image", "transformer_blocks.0.txt_mlp")])
def test_a_gelu_is_known_whatever_its_layers_are_called(name, folder):
    """Wan's and Qwen-Image's feed-forward layers have names of their own."""
    torch.manual_seed(0)
    adapter, pipe = family(name), (SMALL | NEWER)[name]()
    pipe.transformer.eval().requires_grad_(False)
    model = LoadedModel(ModelSpec(name, name), pipe, replace(adapter, size=(SIZES | NEWER_SIZES)[name]))
    calibration = calibrate(model, Sampler(adapter.SAMPLERS[0], 1, 1.0), n=1, seed=0, prompts=[Prompt("a cross")])
    recipe = recipe_of(model.target(), calibration)
    behind, before = recipe.layers[f"{folder}.net.2"], recipe.layers[f"{folder}.net.0.proj"]
    assert float(behind.transform.shift.rows.unique()) == -Params().gelu_shift and not behind.act.spec.symmetric
    assert before.transform.shift is None and before.act.spec.symmetric


def test_without_a_shift_the_codes_behind_a_gelu_are_signed(small_target, small_calibration):
    layer = recipe_of(small_target, small_calibration, params=replace(QUICK, gelu_shift=0.0)).layers[GELU_LAYER]
    assert layer.transform.shift is None and layer.act.spec.symmetric


def test_at_rank_zero_without_smoothing_and_shift_it_is_plain_rounding(small_model, small_target, small_calibration):
    params = Params(rank=0, smooth="off", gelu_shift=0.0, group_size=48)
    recipe = recipe_of(small_target, small_calibration, params=params)
    assert all(layer.low_rank is None for layer in recipe.layers.values())
    grouped = Bits(QuantSpec(4, "per_group", group_size=48), QuantSpec(4, "per_group", dynamic=True, group_size=48))
    plain = rtn.apply(small_target, {}, grouped, rtn.Params())
    outputs = [output_of(build(small_target, r, dtype=torch.float32), small_model) for r in (recipe, plain)]
    assert torch.equal(*outputs)


def test_it_loses_less_than_rounding_in_the_same_groups(own_model, small_calibration):
    """On a model with outlier channels; smoothing and branch each help."""
    own_model.inject_outliers(channels=4, log2_factor=5, seed=0)
    target = own_model.target()
    expected = output_of(float_copy(target, dtype=torch.float32), own_model)

    def error(params: Params) -> float:
        model = build(target, recipe_of(target, small_calibration, params=params), dtype=torch.float32)
        return relative_error(output_of(model, own_model), expected)

    plain = error(Params(rank=0, smooth="off", gelu_shift=0.0))
    branch = error(Params(rank=8, smooth="off", gelu_shift=0.0))
    both = error(Params(rank=8))
    assert both < 0.7 * branch < 0.7 * plain


def test_iterations_lower_the_error_on_the_sample(small_target, small_calibration):
    """The layer's output error with what `fit` found, on the tokens that it looked at."""
    errors = []
    for iterations in (1, 30):
        params = replace(QUICK, rank=6, iterations=iterations)
        recipe = recipe_of(small_target, small_calibration, params=params)
        layer = quant_layers(build(small_target, recipe, dtype=torch.float64))[GELU_LAYER]
        x = site_samples(small_target, small_calibration, replace(params, iterations=2))[GELU_LAYER].double()
        linear = small_target.module(GELU_LAYER)
        errors.append(float((layer(x) - F.linear(x, linear.weight.double(), linear.bias.double())).square().sum()))
    assert errors[1] < 0.98 * errors[0]


def test_gptq_rounds_the_residual_against_the_smoothed_input(small_target, small_calibration):
    """The first layer of the first block: nothing before it is rounded, so its input is the float model's."""
    params = replace(QUICK, rank=6, residual="gptq", damp=0.05)
    recipe = recipe_of(small_target, small_calibration, params=params)
    layer, linear = recipe.layers[QKV[1]], small_target.module(QKV[1])
    x = inputs_of(small_target, small_calibration, QKV[1]) / layer.transform.scale_C.double()
    branch = layer.low_rank.up_Or.double() @ layer.low_rank.down_rC.double()
    left = linear.weight.double() * layer.transform.scale_C.double() - branch
    expected = gptq(left, x.T @ x / len(x), layer.weight.spec, damp=0.05)
    different = (expected.codes_OC != layer.weight.codes_OC).float().mean()
    assert float(different) < 0.01, "up to ties, by the rounding of float32"
    nearest = quantize_weight(left, layer.weight.spec)
    assert float((nearest.codes_OC != layer.weight.codes_OC).float().mean()) > 0.02

    def error(weight) -> float:
        return float((x @ (left - weight.dequantize().double()).T).square().sum())

    assert error(layer.weight) < 0.9 * error(nearest)


def test_gptq_sees_blocks_whose_branches_are_in_place(small_target, small_calibration):
    """The second block's input, from the rounded first block with its branches: without them it would be far off."""
    params = replace(QUICK, residual="gptq")
    state = svdquant.fit(small_target, small_calibration, DYNAMIC, params)
    name, site = "transformer_blocks.1.attn1.to_q", "transformer_blocks.1.attn_in"
    recipe = svdquant.apply(small_target, state, DYNAMIC, params)
    weights_only = replace(recipe, layers={n: replace(r, act=None) for n, r in recipe.layers.items()})
    model, seen = build(small_target, weights_only, dtype=torch.float32), []
    model.get_submodule(name).kernel.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for step, inputs in small_calibration.batches():
            model.clock.set(step, small_calibration.num_steps)
            model(**inputs)
    x = torch.cat(seen).double()
    branch = state[f"{name}/up"].double() @ state[f"{site}/down"].double()
    left = small_target.module(name).weight.double() * state[f"{site}/scale"].double() - branch
    expected = gptq(left, x.T @ x / len(x), recipe.layers[name].weight.spec)
    assert float((expected.codes_OC != recipe.layers[name].weight.codes_OC).float().mean()) < 0.01


def test_the_sample_is_bounded_and_sees_every_step_and_row(small_target, small_calibration):
    everything = inputs_of(small_target, small_calibration, QKV[0]).float()
    for wanted in (1, 64, 10**6):
        sample = site_samples(small_target, small_calibration, Params(sample_rows=wanted))[QKV[0]]
        assert len(sample) == min(max(wanted, 4), len(everything))
    assert torch.equal(sample, everything)
    sample = site_samples(small_target, small_calibration, Params(sample_rows=64))[QKV[0]]
    places = [int((everything == token).all(1).nonzero()[0]) for token in sample]
    rows = 2 * 3  # guided calls of three samples, 16 tokens each
    assert {(place // (16 * rows), place // 16 % rows) for place in places} == {
        (s, r) for s in range(4) for r in range(rows)
    }
    assert len({place % (16 * rows) for place in places}) > 32, "not the same tokens at every step"
    assert site_samples(small_target, small_calibration, QUICK) == {}


def test_the_bytes_of_branches_are_counted(small_target, small_calibration, small_model):
    recipe = recipe_of(small_target, small_calibration, params=replace(QUICK, rank=5))
    without = replace(recipe, layers={n: replace(r, low_rank=None) for n, r in recipe.layers.items()})
    sizes = [account(small_target, each, small_model.macs, "W4A4")[1]["model_bytes"] for each in (recipe, without)]
    per_block = 4 * 5 * (48 + 48) + 2 * 5 * (48 + 192)  # q, k, v each with its copy of a
    assert sizes[0] - sizes[1] == 2 * 2 * per_block
    stored = [
        sum(t.nbytes for q in quant_layers(build(small_target, each)).values() for t in q.state_dict().values())
        for each in (recipe, without)
    ]
    assert stored[0] - stored[1] == sizes[0] - sizes[1]


def test_states_hold_sixteen_bit_factors(small_target, small_calibration):
    state = svdquant.fit(small_target, small_calibration, W4A4, QUICK)
    factors = [tensor for name, tensor in state.items() if name.endswith(("/up", "/down"))]
    assert len(factors) == 2 * (6 + 4) and all(tensor.dtype == torch.bfloat16 for tensor in factors)
    assert all(math.isfinite(float(tensor.float().sum())) for tensor in factors)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": -1}, "rank must be at least 0, got -1"),
        ({"num_grids": 0}, "num_grids must be at least 1"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"group_size": 0}, "group_size must be at least 1"),
        ({"sample_rows": 0}, "sample_rows must be at least 1"),
        ({"smooth": "full"}, "smooth must be one of grid, half, off, got 'full'"),
        ({"residual": "rtn"}, "residual must be one of nearest, gptq"),
        ({"gelu_shift": 0.1}, "gelu_shift must be 0, or at least 0.17005"),
    ],
    ids=str,
)
def test_parameters_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=f"svdquant: {message}"):
        Params(**wrong)
