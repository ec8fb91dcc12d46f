"""CLQ's orthogonal block smoothing, and the clips its quantizers carry."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from clq_cases import BLOCK, BOTH, FAST, LAST, generator

from ditbench.harness.build.build import float_copy
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.conformance import DYNAMIC, STATIC
from ditbench.harness.quant.quantizers import (
    ActQuant,
    activation_affine,
    fake_quantize_activation,
    quantize_weight,
    to_codes,
)
from ditbench.harness.quant.spec import QuantSpec
from ditbench.harness.quant.transforms import Permutation
from ditbench.methods import clq
from ditbench.methods.clq import Params, channel_order


@pytest.mark.parametrize("permutation", clq.CHOICES["permutation"])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_g_is_orthogonal_and_leaves_the_product_unchanged(permutation, blocks, small_target, normal):
    site = small_target.sites[3]
    order = channel_order(normal(192).abs(), blocks, permutation, generator()) if permutation != "none" else None
    params = Params(permutation=permutation, blocks=blocks)
    transform = clq.transforms(small_target, {f"{site.name}/order": order}, params, [site])[site.consumers[0]]
    g = transform(torch.eye(192, dtype=torch.float64))
    assert float((g @ g.T - torch.eye(192)).abs().max()) < 1e-10
    x, weight = normal(7, 192), normal(5, 192, seed=1)
    torch.testing.assert_close(transform(x).norm(dim=1), x.norm(dim=1), rtol=1e-10, atol=0)
    product = x @ weight.T
    assert float((transform(x) @ transform.of_weight(weight).T - product).abs().max()) <= 1e-10 * product.abs().max()
    halves = g if order is None else g[order]  # rows of H: the permutation undone
    inside = torch.block_diag(*[torch.ones(192 // blocks, 192 // blocks)] * blocks).bool()
    assert bool((halves[~inside] == 0).all())
    torch.testing.assert_close(halves[inside].abs(), torch.full_like(halves[inside], (blocks / 192) ** 0.5))


@pytest.mark.parametrize("permutation", ["group", "deal", "random"])
def test_the_permutation_is_a_bijection_that_can_be_undone(permutation, normal):
    order = channel_order(normal(48).abs(), 2, permutation, generator())
    s = Permutation(order).matrix()
    assert torch.equal(s @ s.T, torch.eye(48, dtype=torch.float64))
    x = normal(5, 48)
    assert torch.equal(Permutation(order)(x)[:, order.argsort()], x)
    assert torch.equal(Permutation(order)(x), x @ s)


@pytest.mark.parametrize("blocks", [2, 3, 4])
def test_grouping_puts_the_largest_scores_first_and_keeps_the_order_inside(blocks, normal):
    score = normal(48).abs()
    parts = channel_order(score, blocks, "group", generator()).reshape(blocks, -1)
    for first, second in zip(parts[:-1], parts[1:], strict=True):
        assert float(score[first].min()) >= float(score[second].max())
    assert all(torch.equal(part, part.sort().values) for part in parts)


def test_two_groups_are_the_paper_s_stable_partition_written_out(normal):
    score = normal(12).abs()
    score[5] = score[2]  # a tie goes to the earlier channel
    ranked = sorted(range(12), key=lambda j: (-float(score[j]), j))
    high = sorted(ranked[:6])
    expected = high + [j for j in range(12) if j not in high]
    assert channel_order(score, 2, "group", generator()).tolist() == expected


def test_dealing_gives_every_block_its_share_of_large_channels():
    order = channel_order(torch.arange(12, 0, -1.0), 3, "deal", generator()).reshape(3, 4)
    assert order.tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


def test_the_energy_of_a_block_is_kept(small_target, normal):
    site = small_target.sites[0]
    order = channel_order(normal(48).abs(), 2, "group", generator())
    transform = clq.transforms(small_target, {f"{site.name}/order": order}, Params(), [site])[site.consumers[0]]
    x = normal(5, 48)
    before, after = (t.unflatten(1, (2, 24)).norm(dim=2) for t in (x[:, order], transform(x)))
    torch.testing.assert_close(after, before, rtol=1e-10, atol=0)


def test_the_order_is_that_of_the_scores_on_the_blocks_own_inputs(small_target, small_calibration):
    """The first block reads what the float model gives it; scores from the raw inputs of its layers."""
    state = clq.fit(small_target, small_calibration, DYNAMIC, replace(FAST, parts="cbc+obs"))
    model, peaks = float_copy(small_target, dtype=torch.float32), []
    site = next(s for s in small_target.sites if s.name == f"{BLOCK}.ff_mid")
    model.get_submodule(site.consumers[0]).register_forward_pre_hook(
        lambda _, args: peaks.append(args[0].abs().amax((0, 1)))
    )
    with torch.no_grad():
        for _, inputs in small_calibration.batches():
            model(**inputs)
    score = torch.stack(peaks).amax(0)
    high = set(state[f"{site.name}/order"][:96].tolist())
    assert high == set(score.topk(96).indices.tolist())


def test_grouped_channels_get_one_scale_per_token_and_block(small_target, small_calibration):
    cases = {
        ("group", "auto"): [("per_group", 24), ("per_group", 96)],
        ("deal", "auto"): [("per_token", None)] * 2,
        ("group", "token"): [("per_token", None)] * 2,
        ("none", "token_block"): [("per_group", 24), ("per_group", 96)],
    }
    for (permutation, act_scale), expected in cases.items():
        params = replace(FAST, parts="obs", permutation=permutation, act_scale=act_scale)
        recipe = clq.apply(small_target, clq.fit(small_target, small_calibration, DYNAMIC, params), DYNAMIC, params)
        specs = [recipe.layers[f"{LAST}.ff.net.{n}"].act.spec for n in ("0.proj", "2")]
        assert [(spec.granularity, spec.group_size) for spec in specs] == expected


def test_static_activations_have_no_scale_per_block(small_target, small_calibration):
    with pytest.raises(UserError, match="act_scale=token_block needs dynamic activations"):
        clq.fit(small_target, small_calibration, STATIC, replace(FAST, act_scale="token_block"))


@pytest.mark.parametrize(
    "spec", [QuantSpec(4, "per_token", dynamic=True), QuantSpec(4, "per_group", dynamic=True, group_size=6)]
)
def test_codes_stay_in_range_and_errors_within_half_a_step_of_what_is_not_clipped(spec, normal):
    x = normal(9, 12)
    x[4] = 0
    quant = ActQuant(spec, clip=0.6)
    groups = x.unflatten(-1, (-1, 6)) if spec.group_size else x
    scale, zero_point = activation_affine(groups, quant, None)
    codes = to_codes(groups, scale, zero_point, spec)
    assert int(codes.min()) >= -8 and int(codes.max()) <= 7
    inside = groups.abs() <= 7 * scale
    rounded = fake_quantize_activation(x, quant).reshape(groups.shape)
    assert bool(((groups - rounded).abs() <= scale / 2 + 1e-12)[inside].all()) and not bool(inside.all())
    assert bool((rounded[4] == 0).all())
    torch.testing.assert_close(scale[scale != 1], (0.6 * groups.abs().amax(-1, keepdim=True) / 7)[scale != 1])
    assert torch.equal(fake_quantize_activation(x[2:3], quant), fake_quantize_activation(x, quant)[2:3])


def test_a_clip_is_of_dynamic_ranges_and_between_0_and_1():
    dynamic = QuantSpec(4, "per_token", dynamic=True)
    for spec, clip in ((dynamic, 0.0), (dynamic, 1.1), (QuantSpec(4, "per_tensor"), 0.5)):
        with pytest.raises(ValueError, match="clip is in"):
            ActQuant(spec, clip=clip)


@pytest.mark.parametrize("symmetric", [True, False])
def test_weight_ratios_shrink_each_row_s_own_ends(symmetric, normal):
    weight, spec = normal(4, 32), QuantSpec(4, "per_channel", symmetric=symmetric)
    low, high = 0.5 * weight.amin(1), 0.8 * weight.amax(1)
    expected = torch.maximum(-low, high) / 7 if symmetric else (high - low) / 15
    found = quantize_weight(weight, spec, ratios=(0.5, 0.8))
    torch.testing.assert_close(found.scale_OG[:, 0].double(), expected, rtol=1e-5, atol=0)
    values = found.dequantize().double()
    step = expected[:, None]
    assert bool((values >= (-torch.maximum(-low, high) if symmetric else low)[:, None] - step).all())
    assert bool((values <= torch.maximum(-low, high)[:, None] + step).all())


@pytest.mark.parametrize(
    "spec", [QuantSpec(8, "per_token", dynamic=True), QuantSpec(8, "per_token", symmetric=False, dynamic=True)]
)
def test_both_backends_clip_alike(spec, small_target, small_calibration, normal):
    from ditbench.harness.backends import onednn_int8
    from ditbench.harness.quant.recipe import LayerRecipe

    recipe = LayerRecipe(
        weight=quantize_weight(normal(6, 48), QuantSpec(8, "per_channel")), act=ActQuant(spec, clip=0.5)
    )
    if onednn_int8.unsupported(recipe, torch.device("cpu")):
        pytest.skip("no int8 dot products here")
    from ditbench.harness.backends import simulate

    x = normal(5, 48).float()
    one, other = (b.make_kernel(recipe, torch.zeros(6, 48))(x.clone(), None) for b in (onednn_int8, simulate))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    unclipped = simulate.make_kernel(replace(recipe, act=ActQuant(spec)), torch.zeros(6, 48))(x.clone(), None)
    assert not torch.allclose(other, unclipped, rtol=1e-2)


def test_the_rotations_have_random_signs_or_none(small_target, small_calibration):
    signed, plain, other = (
        clq.fit(small_target, small_calibration, BOTH, replace(FAST, parts="obs", **more))
        for more in ({"signs": "random"}, {"signs": "none"}, {"signs": "random", "seed": 5})
    )
    names = [name for name in signed if name.endswith("/signs")]
    assert len(names) == len(small_target.linear_sites()) and not any(name.endswith("/signs") for name in plain)
    assert all(set(signed[name].tolist()) == {-1, 1} and not torch.equal(signed[name], other[name]) for name in names)
    orders = [name for name in plain if name.endswith("/order")]
    assert orders and all(
        torch.equal(plain[f], signed[f]) for f in orders[:1]
    )  # the first block's: nothing is rounded yet
    site = small_target.linear_sites()[0]
    layer = site.consumers[0]
    found, bare = (
        clq.apply(small_target, state, BOTH, replace(FAST, parts="obs", signs=signs)).layers[layer].transform
        for state, signs in ((signed, "random"), (plain, "none"))
    )
    signs = signed[f"{site.name}/signs"].double()
    eye = torch.eye(len(signs), dtype=torch.float64)
    order, hadamard = bare.rotations
    torch.testing.assert_close(found(eye), hadamard(order(eye) * signs))
    assert not torch.allclose(found(eye), bare(eye))
