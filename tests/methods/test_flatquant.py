from __future__ import annotations

import pytest
import torch

from ditbench.harness.build.build import build, quant_layers
from ditbench.harness.calibration.channel_statistics import channel_stats
from ditbench.harness.fitting.conformance import DYNAMIC, STATIC, relative_error
from ditbench.harness.quant.quantizers import ActQuant, fake_quantize_activation, quantize_weight
from ditbench.harness.quant.spec import QuantSpec, bits_of
from ditbench.methods import flatquant
from ditbench.methods.flatquant import Factor, Params

LAYER, SITE = "transformer_blocks.1.ff.net.2", "transformer_blocks.1.ff_mid"
SHORT = Params(iterations=6)
BITS = bits_of("w4a4")


@pytest.fixture(scope="module")
def learned(small_target, small_calibration):
    """The state of SHORT at W4A4."""
    return flatquant.fit(small_target, small_calibration, BITS, SHORT)


def recipe_of(target, calibration, bits=DYNAMIC, params=SHORT):
    return flatquant.apply(target, flatquant.fit(target, calibration, bits, params), bits, params)


def test_a_layer_computes_the_product_of_both_flattened_sides(small_target, learned, normal):
    """Y = Q((X / s) P) Q(W s P⁻ᵀ)ᵀ + b with P = P₁ ⊗ P₂ written out, each range cut by its learned share; float64."""
    bits, state = BITS, learned
    layer = quant_layers(build(small_target, flatquant.apply(small_target, state, bits, SHORT), dtype=torch.float64))[
        LAYER
    ]
    whole = torch.kron(state[f"{SITE}/left"], state[f"{SITE}/right"])
    scale, linear = state[f"{SITE}/scale"].double(), small_target.module(LAYER)
    x, share = normal(6, 192), float(state[f"{LAYER}/act_clip"])
    flat = (x / scale) @ whole
    step = share * flat.abs().amax(1, keepdim=True) / 7
    rounded = (flat / step).round().clamp(-7, 7) * step
    exact = (linear.weight.double() * scale) @ torch.linalg.inv(whole).T
    step_O1 = state[f"{LAYER}/weight_scale"].double()
    weight = (exact / step_O1).round().clamp(-7, 7) * step_O1
    assert 0.9 < float((step_O1 * 7 / exact.abs().amax(1, keepdim=True)).min()) < 1.0, "shares below one"
    assert relative_error(layer(x), rounded @ weight.T + linear.bias.double()) < 1e-5


def test_the_maps_are_near_square_and_not_orthogonal_once_learned(small_target, small_calibration, learned):
    assert [flatquant.near_square(width) for width in (48, 192, 96, 3072, 7)] == [
        (6, 8),
        (12, 16),
        (8, 12),
        (48, 64),
        (1, 7),
    ]
    start = flatquant.fit(small_target, small_calibration, BITS, Params(iterations=0))
    for state, orthogonal in ((start, True), (learned, False)):
        left = state[f"{SITE}/left"]
        assert left.shape == (12, 12) and torch.allclose(left @ left.T, torch.eye(12).double(), atol=1e-5) == orthogonal
    stats, weight = channel_stats(small_target, small_calibration)[LAYER], small_target.module(LAYER).weight
    torch.testing.assert_close(
        start[f"{SITE}/scale"], stats.absmax_C**0.3 / weight.detach().abs().amax(0) ** 0.7, rtol=1e-4, atol=1e-6
    )
    assert not torch.allclose(start[f"{SITE}/scale"], learned[f"{SITE}/scale"], rtol=1e-4)


def test_a_factor_and_its_inverse_undo_each_other():
    factor = Factor(9, torch.Generator().manual_seed(0), torch.device("cpu"))
    with torch.no_grad():
        factor.turns[0] += torch.randn(9, 9, generator=torch.Generator().manual_seed(1))
        factor.log_stretch += torch.linspace(-1, 1, 9)
    made = factor.matrix()
    torch.testing.assert_close(made @ factor.inverse_transposed().T, torch.eye(9), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.svdvals(made), torch.linspace(1, -1, 9).exp(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(4, "per_token", dynamic=True),
        QuantSpec(4, "per_token", symmetric=False, dynamic=True),
        QuantSpec(4, "per_tensor", dynamic=True),
        QuantSpec(4, "per_group", dynamic=True, group_size=6),
    ],
    ids=lambda spec: f"{spec.granularity} {spec.symmetric}",
)
def test_what_is_learned_with_is_what_is_built(spec, normal):
    """The rounding that gradients pass through gives the numbers of the quantizer."""
    x, share = normal(3, 5, 12), torch.tensor(0.8, dtype=torch.float64)
    ours = flatquant.straight_through(x, spec, share, share)
    torch.testing.assert_close(ours, fake_quantize_activation(x, ActQuant(spec, clip=0.8)))


@pytest.mark.parametrize(
    "spec",
    [QuantSpec(4, "per_channel"), QuantSpec(4, "per_group", group_size=6), QuantSpec(4, "per_tensor", symmetric=False)],
    ids=lambda spec: spec.granularity,
)
def test_weights_are_cut_by_row_while_learning_as_in_the_end(spec, normal):
    weight = normal(8, 12).float()
    rows = flatquant.rows_of(weight, spec)
    low, high = torch.linspace(0.7, 0.9, rows), torch.linspace(0.95, 0.6, rows)
    built = flatquant.clipped_weight(weight, spec, low, high).dequantize()
    shape = (-1, 1) if spec.granularity == "per_group" else (-1,)
    learning = flatquant.straight_through(weight, spec, *(each.reshape(shape)[..., None] for each in (low, high)))
    torch.testing.assert_close(learning, built)
    assert not torch.equal(built, quantize_weight(weight, spec).dequantize())


def test_learning_lowers_the_error_of_every_blocks_output(small_target, small_calibration, monkeypatch):
    """On the float network's inputs, over all of them; what is minimised sees a few rows at a time."""
    errors, descend = [], flatquant.descend

    def error(block, stream, targets) -> float:
        outputs = (stream.run(block, call.hidden_BTC, call.kwargs) for call in stream.inputs)
        with torch.no_grad():
            return sum(float((y - wanted).square().sum()) for y, wanted in zip(outputs, targets, strict=True))

    def watched(block, stream, targets, *others) -> None:
        before = error(block, stream, targets)
        descend(block, stream, targets, *others)
        errors.append((before, error(block, stream, targets)))

    monkeypatch.setattr(flatquant, "descend", watched)
    flatquant.learn(small_target, small_calibration, BITS, Params(iterations=40))
    assert len(errors) == 2 and all(after < 0.85 * before for before, after in errors), errors


def test_clips_take_steps_ten_times_as_long(small_target, small_calibration):
    """Adam's first step has the learning rate's length whatever the gradient."""
    before, after = (
        flatquant.fit(small_target, small_calibration, BITS, Params(iterations=count, learning_rate=0.003))
        for count in (0, 1)
    )
    of_scale = (after[f"{SITE}/scale"] / before[f"{SITE}/scale"]).log().abs()
    torch.testing.assert_close(of_scale.amax(), torch.tensor(0.003), rtol=0.02, atol=0)
    of_clip = (after[f"{LAYER}/act_clip"].logit() - before[f"{LAYER}/act_clip"].logit()).abs()
    torch.testing.assert_close(of_clip, torch.tensor(0.03), rtol=0.02, atol=0)


def test_the_seed_and_nothing_else_draws_starts_and_minibatches(small_target, small_calibration):
    torch.manual_seed(1)
    one = flatquant.fit(small_target, small_calibration, DYNAMIC, Params(iterations=3, seed=5))
    torch.manual_seed(2)
    same, other = (
        flatquant.fit(small_target, small_calibration, DYNAMIC, Params(iterations=3, seed=seed)) for seed in (5, 6)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one[f"{SITE}/left"], other[f"{SITE}/left"])


def test_scales_are_folded_and_maps_run_online(small_target, small_calibration):
    recipe = recipe_of(small_target, small_calibration, params=Params(iterations=0))
    assert recipe.folded == {site.name for site in small_target.sites if site.foldable}
    online = quant_layers(build(small_target, recipe, dtype=torch.float32))
    assert online["transformer_blocks.0.attn1.to_q"].transform.scale_C is None
    assert len(online["transformer_blocks.0.attn1.to_q"].transform.rotations) == 1


def test_static_activations_have_the_range_behind_the_map_and_no_clip(small_target, small_calibration):
    state = flatquant.fit(small_target, small_calibration, STATIC, Params(iterations=1))
    assert f"{LAYER}/act_low" in state and f"{LAYER}/act_clip" not in state


@pytest.mark.parametrize(
    ("options", "message"), [({"alpha": 2.0}, r"alpha must be in \[0, 1\]"), ({"batch_size": 0}, "at least 1")]
)
def test_params_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Params(**options)
