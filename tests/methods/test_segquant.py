from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ditbench.harness.build.build import build, quant_layers
from ditbench.harness.calibration.channel_statistics import channel_stats
from ditbench.harness.fitting.conformance import DYNAMIC, relative_error
from ditbench.harness.quant.spec import Bits, QuantSpec, bits_of
from ditbench.harness.quant.uneven import DualScaleQuant
from ditbench.methods import segquant
from ditbench.methods.segquant import Params

LAYER, SITE = "transformer_blocks.1.ff.net.2", "transformer_blocks.1.ff_mid"  # reads a GELU; nothing is folded
ADALN = "transformer_blocks.0.norm1.linear"
PUBLISHED = Bits(QuantSpec(8, "per_tensor"), QuantSpec(8, "per_tensor"))  # bits of method.form=published, at W8A8


@pytest.fixture
def whole_target(small_model):
    """adaLN and the embedders are quantized too."""
    return small_model.target("all")


def test_a_layer_behind_a_gelu_computes_two_products_one_for_each_sign(small_target, small_calibration, normal):
    """Written out in float64, token by token: Y = s₊ Q(X₊ / s) Ŵᵀ + s₋ Q(X₋ / s) Ŵᵀ + b, away from the default α."""
    params = Params(alpha=0.7)
    state = segquant.fit(small_target, small_calibration, DYNAMIC, params)
    recipe = segquant.apply(small_target, state, DYNAMIC, params)
    layer = quant_layers(build(small_target, recipe, dtype=torch.float64))[LAYER]
    linear = small_target.module(LAYER)
    act_C = channel_stats(small_target, small_calibration)[LAYER].absmax_C.double()
    smooth_C = act_C**0.7 / linear.weight.double().abs().amax(0) ** 0.3
    torch.testing.assert_close(state[f"{SITE}/scale"].double(), smooth_C, rtol=1e-5, atol=1e-6)
    weight = linear.weight.double() * state[f"{SITE}/scale"].double()
    step = weight.abs().amax(1, keepdim=True).float().double() / 7
    rounded_weight = (weight / step).round().clamp(-7, 7) * step
    x = torch.nn.functional.gelu(normal(6, 192))
    expected = []
    for token in x / state[f"{SITE}/scale"].double():
        positive, negative = token.clamp(min=0), token.clamp(max=0)
        above, below = positive.max() / 127, -negative.min() / 128
        first, second = (positive / above).round() @ rounded_weight.T, (negative / below).round() @ rounded_weight.T
        expected.append(above * first + below * second)
    assert relative_error(layer(x), torch.stack(expected) + linear.bias.double()) < 1e-5


def test_only_layers_behind_an_activation_have_two_scales(whole_target, small_calibration):
    recipe = segquant.apply(
        whole_target, segquant.fit(whole_target, small_calibration, DYNAMIC, Params()), DYNAMIC, Params()
    )
    dual = {name for name, layer in recipe.layers.items() if isinstance(layer.act, DualScaleQuant)}
    assert {name for name in dual if name.startswith("transformer_blocks.0.")} == {
        "transformer_blocks.0.ff.net.2", "transformer_blocks.0.norm1.linear",
        "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2",
    }  # fmt: skip
    assert "proj_out_1" in dual and "proj_out_2" not in dual


def test_inputs_of_the_layers_with_two_scales_are_never_far_below_zero(whole_target, small_calibration):
    """SiLU is at least −0.279 and GELU −0.171."""
    stats, state = (
        channel_stats(whole_target, small_calibration),
        segquant.fit(whole_target, small_calibration, DYNAMIC, Params(parts="dual")),
    )
    dual = [name for name in stats if f"{name}/dual" in state]
    assert len(dual) > 4 and all(float(stats[name].min_SC.min()) > -0.28 for name in dual)


def test_two_scales_keep_small_negative_values_that_one_loses(normal):
    x = torch.nn.functional.gelu(4 * normal(1, 64, 32))
    spec = QuantSpec(4, "per_token", dynamic=True)
    one, two = (
        segquant.fake_quantize_activation(x, quant) for quant in (segquant.ActQuant(spec), DualScaleQuant(spec))
    )
    negative = x < 0
    assert relative_error(two[negative], x[negative]) < 0.1 < 0.8 < relative_error(one[negative], x[negative])


def test_segments_are_the_rows_that_the_network_takes_apart(small_target):
    """adaLN-Zero: shift, scale and gate of the attention, then of the feed-forward layer; six of 48 rows."""
    assert [(s.start, s.stop) for s in segquant.segments(small_target, ADALN)] == [
        (48 * i, 48 * i + 48) for i in range(6)
    ]
    assert len(segquant.segments(small_target, LAYER)) == 1


@pytest.mark.parametrize("weights", ["nearest", "gptq"])
def test_each_segment_is_rounded_with_a_scale_of_its_own(weights, whole_target, small_calibration):
    """With one range per tensor, as published; without the part, and in layers of one segment, one scale is for all rows."""
    params = Params(weights=weights)
    state = segquant.fit(whole_target, small_calibration, PUBLISHED, params)
    recipe = segquant.apply(whole_target, state, PUBLISHED, params)
    scale_O = recipe.layers[ADALN].weight.scale_OG[:, 0]
    for rows in segquant.segments(whole_target, ADALN):
        assert len(scale_O[rows].unique()) == 1
        codes = recipe.layers[ADALN].weight.codes_OC[rows]
        assert int(codes.abs().max()) == 127
    assert len(scale_O.unique()) == 6 and len(recipe.layers[LAYER].weight.scale_OG.unique()) == 1
    whole = replace(params, parts="smooth+dual")
    state = segquant.fit(whole_target, small_calibration, PUBLISHED, whole)
    plain = segquant.apply(whole_target, state, PUBLISHED, whole).layers[ADALN].weight
    assert len(plain.scale_OG.unique()) == 1 and plain.spec.granularity == "per_tensor"


def test_rows_with_scales_of_their_own_are_left_as_they_are(whole_target, small_calibration):
    state = segquant.fit(whole_target, small_calibration, DYNAMIC, Params())
    weight = segquant.apply(whole_target, state, DYNAMIC, Params()).layers[ADALN].weight
    assert len(weight.scale_OG.unique()) == 288 and weight.spec == DYNAMIC.weight


def test_static_scales_are_the_ends_of_the_calibrated_range(small_target, small_calibration, normal):
    state = segquant.fit(small_target, small_calibration, PUBLISHED, Params())
    act = segquant.apply(small_target, state, PUBLISHED, Params()).layers[LAYER].act
    low, high = (float(state[f"{LAYER}/act_{end}"]) for end in ("low", "high"))
    assert low < 0 < high and len(act.tables) == 2
    torch.testing.assert_close(float(act.scale.rows), high / 127)
    torch.testing.assert_close(float(act.negative_scale.rows), -low / 128)
    x = torch.tensor([[low, high, 2 * low, 2 * high, 0.0]])
    torch.testing.assert_close(act.rounded(x, None), torch.tensor([[low, high, low, high, 0.0]]))


def test_the_search_takes_the_alpha_with_the_least_output_error(small_target, small_calibration):
    params, bits = Params(search=True, tokens=64), bits_of("w4a4")
    state = segquant.fit(small_target, small_calibration, bits, params)
    stats, (site,) = (
        channel_stats(small_target, small_calibration),
        [each for each in small_target.linear_sites() if each.name == SITE],
    )
    tokens = segquant.token_sample(small_target, small_calibration, [site], 64)
    weight = small_target.module(LAYER).weight.double()

    def error(alpha: float) -> float:
        scale = (stats[LAYER].absmax_C ** alpha / weight.abs().amax(0).float() ** (1 - alpha)).double()
        x, w = tokens[LAYER].double() / scale, weight * scale
        above, below = x.clamp(min=0).amax(1, keepdim=True) / 7, -x.clamp(max=0).amin(1, keepdim=True) / 8
        rounded = torch.where(x >= 0, (x / above).round() * above, (x / below).round() * below)
        step = w.abs().amax(1, keepdim=True).float().double() / 7
        return float((rounded @ ((w / step).round() * step).T - tokens[LAYER].double() @ weight.T).square().sum())

    best = min(segquant.ALPHAS, key=error)
    expected = stats[LAYER].absmax_C ** best / weight.abs().amax(0).float() ** (1 - best)
    torch.testing.assert_close(state[f"{SITE}/scale"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": "smooth+split"}, "parts must be some of smooth, dual, segment"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\]"),
        ({"weights": "adaround"}, "weights must be one of nearest, gptq"),
        ({"tokens": 0}, "tokens must be at least 1"),
    ],
)
def test_params_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Params(**options)
