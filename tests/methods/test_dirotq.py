from __future__ import annotations

import pytest
import torch

from ditbench.harness.build.build import build, float_copy, quant_layers
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.conformance import DYNAMIC, STATIC, relative_error
from ditbench.harness.quant.accounting import account
from ditbench.harness.quant.quantizers import quantize_weight
from ditbench.harness.quant.spec import Bits, QuantSpec
from ditbench.methods import dirotq, rtn
from ditbench.methods.dirotq import Params

LAYER, SITE = "transformer_blocks.1.ff.net.2", "transformer_blocks.1.ff_mid"
PLAIN = Params(weights="nearest")
GROUPS = Bits(
    QuantSpec(4, "per_block", group_size=64),
    QuantSpec(4, "per_block", symmetric=False, dynamic=True, group_size=64),
)  # bits of method.form=published


@pytest.fixture(scope="module")
def inputs(small_target, small_calibration):
    """All that LAYER reads in the recording, float64 (N, 192)."""
    model, seen = float_copy(small_target, dtype=torch.float32), []
    handle = model.get_submodule(LAYER).register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, -2)))
    with torch.no_grad():
        for step, call in small_calibration.batches():
            small_calibration.call(model, step, call)
    handle.remove()
    return torch.cat(seen).double()


def recipe_of(target, calibration, bits=DYNAMIC, params=PLAIN):
    return dirotq.apply(target, dirotq.fit(target, calibration, bits, params), bits, params)


def test_the_basis_is_the_principal_axes_and_the_low_ones_are_rotated(small_target, small_calibration, inputs):
    """E[x xᵀ] of the raw inputs; the last 24 of 192 axes carry the most, in rising order, and nothing mixes with them."""
    state = dirotq.fit(small_target, small_calibration, DYNAMIC, PLAIN)
    basis = state[f"{SITE}/basis"]
    torch.testing.assert_close(basis @ basis.T, torch.eye(192).double(), atol=1e-10, rtol=0)
    moment = inputs.T @ inputs / len(inputs)
    in_axes = basis.T @ moment @ basis
    largest = torch.linalg.eigvalsh(moment)[-24:]
    torch.testing.assert_close(in_axes.diagonal()[-24:], largest, rtol=1e-4, atol=1e-6)
    scale = float(moment.diagonal().mean())
    assert float(in_axes[:-24, -24:].abs().max()) < 1e-3 * scale
    low = in_axes[:-24, :-24]
    assert float((low - low.diagonal().diag()).abs().max()) > 0.01 * float(low.diagonal().mean()), "R mixes them"
    straight = dirotq.fit(small_target, small_calibration, DYNAMIC, Params(residual="identity", weights="nearest"))
    axes = straight[f"{SITE}/basis"].T @ moment @ straight[f"{SITE}/basis"]
    assert float((axes - axes.diagonal().diag()).abs().max()) < 1e-3 * scale


@pytest.mark.parametrize("bits", [DYNAMIC, GROUPS], ids=["per token", "groups of 64"])
def test_a_layer_computes_the_rounded_low_part_and_the_high_part_beside_it(
    bits, small_target, small_calibration, normal
):
    """Y = Q(X V_low) Q(W V_low)ᵀ + (X V_high)(W V_high)ᵀ + b, group by group in float64."""
    recipe = recipe_of(small_target, small_calibration, bits)
    layer = quant_layers(build(small_target, recipe, dtype=torch.float64))[LAYER]
    basis = recipe.layers[LAYER].transform.rotations[0].matrix_gg
    x, linear = normal(6, 192), small_target.module(LAYER)
    low = 192 - 24
    size = bits.weight.group_size or low
    turned, weight = x @ basis, linear.weight.double() @ basis
    expected = linear.bias.double() + turned[:, low:] @ weight[:, low:].bfloat16().double().T
    for start in range(0, low, size):
        part, own = turned[:, start : min(start + size, low)], weight[:, start : min(start + size, low)]
        step = own.abs().amax(1, keepdim=True).float().double() / 7
        rounded = (own / step).round().clamp(-7, 7) * step
        if bits.act.symmetric:
            scale = part.abs().amax(1, keepdim=True) / bits.act.quant_max
            values = (part / scale).round() * scale
        else:
            smallest, largest = part.amin(1, keepdim=True).clamp(max=0), part.amax(1, keepdim=True).clamp(min=0)
            scale = (largest - smallest) / 15
            zero = (-smallest / scale).round()
            values = (((part / scale).round() + zero).clamp(0, 15) - zero) * scale
        expected = expected + values @ rounded.T
    assert relative_error(layer(x), expected) < 2e-5


def test_the_high_part_is_up_to_whole_groups_where_there_are_enough():
    assert [dirotq.high(width, Params()) for width in (48, 96, 192, 512, 1152, 3072)] == [6, 12, 24, 64, 192, 384]
    assert dirotq.high(1152, Params(share=0.0)) == 0


def test_gptq_moves_no_error_to_the_high_part_and_less_is_left_than_to_nearest(small_target, small_calibration, inputs):
    state = dirotq.fit(small_target, small_calibration, DYNAMIC, Params())
    weight = dirotq.apply(small_target, state, DYNAMIC, Params()).layers[LAYER].weight
    assert not weight.codes_OC[:, -24:].any()
    basis = state[f"{SITE}/basis"]
    turned = inputs @ basis
    turned[:, -24:] = 0
    exact = small_target.module(LAYER).weight.double() @ basis
    plain = quantize_weight(dirotq.without_high(exact, True, Params()), DYNAMIC.weight)
    errors = [float(((each.dequantize().double() - exact) @ turned.T).square().sum()) for each in (weight, plain)]
    assert errors[0] < 0.95 * errors[1]


def test_the_low_part_is_damped_as_much_as_the_whole_would_be(normal):
    """GPTQ adds damp · mean(diagonal) to the diagonal: of all axes, though the high ones are a hundred times as large."""
    params, spec = Params(damp=0.05), QuantSpec(3, "per_channel")
    root, weight = normal(12, 12), normal(5, 12, seed=1)
    hessian = root @ root.T
    hessian[9:, 9:] = 4000 * torch.eye(3).double()  # and what both have in common is left out
    found = dirotq.rounded_low(weight, hessian, 9, params, spec).dequantize()[:, :9]
    low = hessian[:9, :9]
    damp = 0.05 * float(hessian.diagonal().mean() / low.diagonal().mean())
    expected = dirotq.gptq(weight[:, :9], low, spec, damp=damp).dequantize()
    assert torch.equal(found, expected)
    assert not torch.equal(found, dirotq.gptq(weight[:, :9], low, spec, damp=0.05).dequantize())


def test_static_ranges_are_those_of_the_low_part(small_target, small_calibration, inputs):
    state = dirotq.fit(small_target, small_calibration, STATIC, PLAIN)
    low = (inputs @ state[f"{SITE}/basis"])[:, :-24]
    torch.testing.assert_close(float(state[f"{LAYER}/act_low"]), float(low.min()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(float(state[f"{LAYER}/act_high"]), float(low.max()), rtol=1e-4, atol=1e-4)


def test_moments_are_gathered_in_as_many_passes_as_memory_asks_for(small_target, small_calibration, monkeypatch):
    passes = []
    run = dirotq.run_calibration
    monkeypatch.setattr(dirotq, "run_calibration", lambda *given: passes.append(1) or run(*given))
    once = dirotq.bases(small_target, small_calibration, PLAIN)
    assert len(passes) == 1
    in_turn = dirotq.bases(small_target, small_calibration, Params(max_bytes=4 * 192**2))
    assert len(passes) > 3 and all(torch.equal(once[name], in_turn[name]) for name in once)


def test_inputs_with_large_axes_lose_less_than_by_rounding_alone(own_model, small_calibration):
    """Activations at 4 bits, weights in float: an axis that no channel shows."""
    bits = Bits(None, QuantSpec(4, "per_token", dynamic=True))
    target = own_model.target()
    given = own_model.step_inputs(4)
    with torch.no_grad():
        expected = float_copy(target, dtype=torch.float32)(**given).sample
        errors = [
            relative_error(build(target, recipe, dtype=torch.float32)(**given).sample, expected)
            for recipe in (recipe_of(target, small_calibration, bits), rtn.apply(target, {}, bits, rtn.Params()))
        ]
    assert errors[0] < 0.8 * errors[1], errors


@pytest.mark.parametrize("act", [DYNAMIC, None])
def test_the_axes_in_16_bits_are_quantized_on_neither_side(small_target, small_calibration, small_model, act):
    """An eighth of each layer's axes; weights alone too, whose quantizer of activations cannot say so."""
    bits = Bits(QuantSpec(4, "per_channel", symmetric=False), act and act.act)
    found, _ = account(small_target, recipe_of(small_target, small_calibration, bits), small_model.macs, "")
    layers = sum(small_model.macs[name] for name in small_target.layers)
    expected = 7 / 8 * layers / small_model.macs[""]
    assert found["mac_share_weight_quantized"] == pytest.approx(expected)
    assert found["mac_share_quantized"] == pytest.approx(expected if act else 0)


def test_a_branch_of_no_axes_is_left_out(small_target, small_calibration):
    recipe = recipe_of(small_target, small_calibration, params=Params(share=0.0, weights="nearest"))
    assert not len(recipe.layers[LAYER].low_rank.down_rC)
    build(small_target, recipe, dtype=torch.float32)


def test_a_share_that_leaves_no_axis_to_round_is_refused():
    """0.999 of 96 is 96; 0.9 of 512, up to whole groups, is 512."""
    for width, share in ((96, 0.999), (512, 0.9)):
        with pytest.raises(UserError, match=f"share={share} leaves none of {width} axes to round; set method.share"):
            dirotq.low_channels(width, Params(share=share))
    assert dirotq.low_channels(512, Params(share=0.875)) == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.0}, r"share must be in \[0, 1\)"),
        ({"residual": "hadamard"}, "residual must be one of random, identity"),
        ({"weights": "rtn"}, "weights must be one of gptq, nearest"),
        ({"damp": -1.0}, "damp must be at least 0"),
    ],
)
def test_params_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Params(**options)
