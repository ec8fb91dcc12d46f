from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from harness import methods
from harness.calibrate import Calibration, calibrate
from harness.conformance import DYNAMIC, SMALL_DIT, STATIC, relative_error
from harness.errors import UserError
from harness.models.base import ModelSpec, Sampler, load_model
from harness.quant.build import build, float_copy, quant_layers
from harness.quant.quantizers import ActQuant, activation_affine, fake_quantize_activation, quantize_weight, to_codes
from harness.quant.spec import Bits, QuantSpec
from harness.quant.steps import StepClock
from harness.quant.target import Site, Target
from harness.quant.transforms import Hadamard, Permutation
from harness.stream import BlockStream
from harness.trial import float_model
from methods import clq, rtn
from methods.clq import Params, Quantizer, Score, channel_order, hadamard_blocks, loudest, search

FAST = Params(probe=(0.5, 1.0), grid=5, lowest=0.4, search_samples=2, search_steps=2)
BLOCK, LAST = "transformer_blocks.0", "transformer_blocks.1"
BOTH = Bits(QuantSpec(4, "per_channel", symmetric=False), QuantSpec(4, "per_token", dynamic=True))
BOTH_STATIC = Bits(QuantSpec(4, "per_channel", symmetric=False), QuantSpec(4, "per_tensor", symmetric=False))
FLOAT = Bits(None, None)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def five_blocks():
    """(target, calibration): enough blocks that three behind the first are not all of them."""
    model = load_model(ModelSpec("five-random-blocks", "dit", random=SMALL_DIT | {"num_layers": 5}))
    return model.target(), calibrate(model, Sampler("ddim", steps=2, guidance=1.0), n=2, seed=0)


def entered(target, calibration, bits, params, monkeypatch):
    """fit → {block: the hidden states it was calibrated on}."""
    seen = {}
    watch = BlockStream.watch

    def look(self, block, hooks):
        name = next(n for n, m in self.model.named_modules() if m is block)
        seen[name] = torch.cat([call.hidden_BTC for call in self.inputs]).clone()
        return watch(self, block, hooks)

    with monkeypatch.context() as patch:
        patch.setattr(BlockStream, "watch", look)
        state = clq.fit(target, calibration, bits, params)
    return seen, state


def block_inputs(model, calibration, blocks):
    """The same from a whole run of a model."""
    seen = {name: [] for name in blocks}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda _, args, n=n: seen[n].append(args[0])) for n in blocks
    ]
    with torch.no_grad():
        for step, inputs in calibration.batches():
            model.clock.set(step, calibration.num_steps)
            model(**inputs)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


# --- OBS


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


@pytest.mark.parametrize(
    ("width", "wanted", "expected"),
    [
        (1152, 2, (2, 576)),
        (4608, 2, (2, 2304)),
        (3072, 3, (3, 1024)),
        (20, 2, (1, 20)),  # no Hadamard matrix of order 10: one block
        (2432, 2, (2, 1216)),  # 19·128, by Paley's 76
        (184, 2, (2, 4)),  # 8·23: none for 92 or 184
        (48, 5, (4, 12)),  # 5 does not divide 48
    ],
)
def test_the_number_of_blocks_and_its_fallbacks(width, wanted, expected):
    assert hadamard_blocks(width, wanted) == expected
    matrix = Hadamard(width, block_size=expected[1])
    ones = torch.ones(1, width, dtype=torch.float64)
    assert float(matrix(ones).norm()) == pytest.approx(width**0.5)


def test_scores_are_those_of_all_rows_seen(normal):
    calls = [normal(2, 600, 5), 3 * normal(1, 900, 5, seed=1)]
    rows = torch.cat([call.flatten(0, 1) for call in calls]).abs()
    expected = {
        "absmax": rows.amax(0),
        "rms": rows.square().mean(0).sqrt(),
        "p999": torch.stack(
            [call.flatten(0, 1).abs().sort(0).values[place] for call, place in zip(calls, (1198, 898), strict=True)]
        ).amax(0),
    }
    for kind, score in expected.items():
        found = Score(kind)
        for call in calls:
            found.see(call)
        torch.testing.assert_close(found.of_channels("x"), score, rtol=1e-12, atol=0)
    assert not torch.equal(expected["absmax"], expected["p999"])


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


# --- the quantizers' clips


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
    from harness.backends import onednn_int8
    from harness.quant.recipe import LayerRecipe

    recipe = LayerRecipe(
        weight=quantize_weight(normal(6, 48), QuantSpec(8, "per_channel")), act=ActQuant(spec, clip=0.5)
    )
    if onednn_int8.unsupported(recipe, torch.device("cpu")):
        pytest.skip("no int8 dot products here")
    from harness.backends import simulate

    x = normal(5, 48).float()
    one, other = (b.make_kernel(recipe, torch.zeros(6, 48))(x.clone(), None) for b in (onednn_int8, simulate))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    unclipped = simulate.make_kernel(replace(recipe, act=ActQuant(spec)), torch.zeros(6, 48))(x.clone(), None)
    assert not torch.allclose(other, unclipped, rtol=1e-2)


# --- CBC


@pytest.mark.parametrize("depth", ["all", "1"])
def test_without_rounding_a_block_is_calibrated_on_what_the_float_model_gives(depth, five_blocks, monkeypatch):
    target, calibration = five_blocks
    params = replace(FAST, parts="cbc+obs", cbc_depth=depth, permutation="group")
    # the rotation itself rounds in the last place of a float32, so it is taken out for "exactly"
    monkeypatch.setattr(clq, "transforms", lambda *args: {})
    seen, _ = entered(target, calibration, FLOAT, params, monkeypatch)
    expected = block_inputs(clq.float_model(target, target.layers, torch.float32), calibration, target.blocks)
    assert list(seen) == list(target.blocks)
    assert all(torch.equal(seen[name], expected[name]) for name in target.blocks)


def test_a_block_is_calibrated_on_what_the_finished_model_gives_it(five_blocks, monkeypatch):
    target, calibration = five_blocks
    params = replace(FAST, reach=1)
    seen, state = entered(target, calibration, BOTH, params, monkeypatch)
    finished = build(target, clq.apply(target, state, BOTH, params), dtype=torch.float32)
    expected = block_inputs(finished, calibration, target.blocks)
    floats = block_inputs(float_copy(target, dtype=torch.float32), calibration, target.blocks)
    for name in target.blocks:
        assert relative_error(seen[name], expected[name]) < 1e-6
        assert name == BLOCK or relative_error(seen[name], floats[name]) > 1e-3


def test_at_depth_one_only_the_block_before_is_rounded(five_blocks, monkeypatch):
    target, calibration = five_blocks
    params = replace(FAST, parts="cbc+obs", cbc_depth="1")
    seen, state = entered(target, calibration, BOTH, params, monkeypatch)
    recipe = clq.apply(target, state, BOTH, params)
    for index in (1, 3):
        before = clq.layers_of(target, target.blocks[index - 1])
        one = build(target, replace(recipe, layers={n: recipe.layers[n] for n in before}), dtype=torch.float32)
        expected = block_inputs(one, calibration, target.blocks[index : index + 1])[target.blocks[index]]
        assert relative_error(seen[target.blocks[index]], expected) < 1e-6
    deep, _ = entered(target, calibration, BOTH, replace(params, cbc_depth="all"), monkeypatch)
    assert torch.equal(deep[target.blocks[1]], seen[target.blocks[1]])
    assert relative_error(deep[target.blocks[3]], seen[target.blocks[3]]) > 1e-3


def test_without_cbc_every_block_is_calibrated_on_the_float_network(five_blocks, monkeypatch):
    target, calibration = five_blocks
    seen, _ = entered(target, calibration, BOTH, replace(FAST, parts="obs"), monkeypatch)
    expected = block_inputs(float_copy(target, dtype=torch.float32), calibration, target.blocks)
    assert all(relative_error(seen[name], expected[name]) < 1e-5 for name in target.blocks)


def test_a_blocks_inputs_depend_on_the_quantizers_before_it_only(five_blocks, monkeypatch):
    target, calibration = five_blocks
    params = replace(FAST, parts="cbc+obs")
    plain, _ = entered(target, calibration, BOTH, params, monkeypatch)
    third, round_layer = clq.layers_of(target, target.blocks[2]), clq.round_layer

    def coarser(target, layer, state, bits, params, name):
        round_layer(target, layer, state, bits.with_widths(2, 2) if name in third else bits, params, name)

    monkeypatch.setattr(clq, "round_layer", coarser)
    changed, _ = entered(target, calibration, BOTH, params, monkeypatch)
    assert [torch.equal(plain[name], changed[name]) for name in target.blocks] == [True, True, True, False, False]


def test_the_sampler_is_not_run_again_and_nothing_runs_through_the_whole_model(five_blocks, monkeypatch):
    """What runs up to the first block, once per recorded call and stream, is all that the model's own forward does."""
    target, calibration = five_blocks
    entrances, finals = [], []
    first = type(target.transformer).forward
    monkeypatch.setattr(
        type(target.transformer), "forward", lambda self, *a, **k: entrances.append(1) or first(self, *a, **k)
    )
    handle = target.transformer.proj_out_2.register_forward_hook(lambda *_: finals.append(1))  # copies take it along
    clq.fit(target, calibration, BOTH, FAST)
    handle.remove()
    assert len(entrances) == 2 * (1 + calibration.num_batches()) and not finals


# --- CLPS


def chain(normal, *, blocks: int = 2):
    """Blocks of two linears with a nonlinearity, small enough for loops: (target, calibration-like stream inputs)."""

    class Block(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            for place, linear in enumerate((self.one, self.two)):
                linear.weight = nn.Parameter(normal(4, 4, seed=10 * seed + place).float(), requires_grad=False)
                linear.bias = nn.Parameter(normal(4, seed=10 * seed + 5 + place).float(), requires_grad=False)

        def forward(self, x):
            return self.two(torch.relu(self.one(x)))

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(seed + 1) for seed in range(blocks))
            self.clock = StepClock(None)
            self.dtype_of_inputs = nn.Parameter(torch.zeros(()), requires_grad=False)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return SimpleNamespace(sample=x)

    names = tuple(f"blocks.{b}.{n}" for b in range(blocks) for n in ("one", "two"))
    target = Target(
        Chain(), names, tuple(Site(f"{n}.in", (n,)) for n in names), blocks=tuple(f"blocks.{b}" for b in range(blocks))
    )
    steps = [normal(3, 5, 4, seed=70 + s).float() for s in range(2)]
    calibration = Calibration(tuple({"x": x} for x in steps), key="chain")
    return target, calibration, torch.cat(steps).double()


def looped_rounding(weight, low_ratio, high_ratio):
    """Asymmetric, 3 bits, row by row, value by value; zero inside the range."""
    rounded = torch.zeros_like(weight)
    for row in range(len(weight)):
        low = min(low_ratio * min(weight[row].tolist()), 0.0)
        high = max(high_ratio * max(weight[row].tolist()), 0.0)
        scale = (high - low) / 7
        zero = round(-low / scale)
        for column in range(weight.shape[1]):
            code = min(max(round(float(weight[row, column]) / scale) + zero, 0), 7)
            rounded[row, column] = (code - zero) * scale
    return rounded


@pytest.mark.parametrize("choose", ["variance", "peak"])
def test_the_search_is_the_papers_equations_written_out(choose, normal):
    """Slow, float64, away from the defaults: K = 8, Δ = {.5, .8, 1}, reach 1; weights of 3 bits, activations in float."""
    target, calibration, x = chain(normal, blocks=3)
    bits = Bits(QuantSpec(3, "per_channel", symmetric=False), None)
    params = Params(
        parts="cbc+clps", probe=(0.5, 0.8, 1.0), choose=choose, reach=1, grid=8, lowest=0.3, local=2,
        search_samples=9, search_steps=9,
    )  # fmt: skip
    state = clq.fit(target, calibration, bits, params)

    weights = {n: target.module(n).weight.double() for n in target.layers}
    bias = {n: target.module(n).bias.double() for n in target.layers}

    def outputs(hidden, first, weights):
        found = {}
        for block in range(first, min(first + 2, 3)):
            one = found[f"blocks.{block}.one"] = hidden @ weights[f"blocks.{block}.one"].T + bias[f"blocks.{block}.one"]
            hidden = one.clamp(min=0) @ weights[f"blocks.{block}.two"].T + bias[f"blocks.{block}.two"]
            found[f"blocks.{block}.two"] = hidden
        return found

    shares = [1 - i / 8 for i in range(6)]
    hidden, goals = x, []
    for block in range(3):
        exact = outputs(hidden, block, weights)
        chosen = {}
        for name in (f"blocks.{block}.one", f"blocks.{block}.two"):
            after = list(exact)[list(exact).index(name) + 1 :]
            goal, best = name, -1.0
            for other in after:
                errors = []
                for share in params.probe:
                    rounded = outputs(hidden, block, weights | {name: looped_rounding(weights[name], share, share)})
                    error = sum(abs(float(v)) for v in (rounded[other] - exact[other]).flatten())
                    errors.append(error / sum(abs(float(v)) for v in exact[other].flatten()))
                mean = sum(errors) / 3
                judged = sum((e - mean) ** 2 for e in errors) / 3 if choose == "variance" else mean
                if judged > best:
                    goal, best = other, judged
            goals.append(goal)

            def loss(i, j, name=name, goal=goal, hidden=hidden, block=block, exact=exact):
                changed = weights | {name: looped_rounding(weights[name], shares[i], shares[j])}
                return float(((outputs(hidden, block, changed)[goal] - exact[goal]) ** 2).sum())

            middle = min(range(6), key=lambda i: loss(i, i))
            near = [i for i in range(6) if abs(i - middle) <= 2]
            pair = min([(i, j) for i in near for j in near], key=lambda p: loss(*p))
            chosen[name] = shares[pair[0]], shares[pair[1]]
            assert state[f"{name}/weight_ratios"].tolist() == pytest.approx(chosen[name])
        final = weights | {n: looped_rounding(weights[n], *ends) for n, ends in chosen.items()}
        hidden = outputs(hidden, block, final)[f"blocks.{block}.two"]
    found = [state[f"{n}/weight_ratios"].tolist() for n in target.layers]
    assert any(low != high for low, high in found) and goals[-1] == "blocks.2.two"
    assert any(goal.split(".")[1] != name.split(".")[1] for goal, name in zip(goals, target.layers, strict=True))


def searching(target, calibration, bits, params, block, monkeypatch):
    """The search of one block as fit sets it up."""
    found = []

    class Kept(clq.CrossLayerSearch):
        def __init__(self, *args):
            super().__init__(*args)
            if self.block == block:
                found.append(self)
                raise StopIteration

    with monkeypatch.context() as patch:
        patch.setattr(clq, "CrossLayerSearch", Kept)
        with pytest.raises((StopIteration, RuntimeError)):
            clq.fit(target, calibration, bits, params)
    return found[0]


@pytest.mark.parametrize("bits", [BOTH, BOTH_STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("where", ["fp_block", "fp_network"])
def test_what_is_found_is_never_worse_than_the_full_range(bits, where, small_target, small_calibration, monkeypatch):
    params = replace(FAST, target=where)
    one = searching(small_target, small_calibration, bits, params, LAST, monkeypatch)
    sites = [s for s in small_target.sites if s.name.startswith(LAST)]
    for quantizer in clq.quantizers(sites, one.layers, bits)[:4]:
        goal = one.goal(quantizer)
        tried = {}

        def loss(low, high, quantizer=quantizer, goal=goal, tried=tried):
            output = one.outputs(quantizer, low, high, [goal])[goal]
            tried[low, high] = float((output - one.expected[goal]).double().square().sum())
            return tried[low, high]

        ends = search(loss, params, one_ratio=quantizer.one_ratio)
        assert tried[ends] == min(tried.values()) <= tried[1.0, 1.0]
        assert max(tried.values()) > tried[ends]
        found = one.ends(quantizer)
        assert all(torch.equal(value, found[key]) for key, value in quantizer.ends(*ends, one.found).items())


def test_the_target_lies_behind_within_three_blocks_and_falls_back_to_the_layer_itself(five_blocks, monkeypatch):
    target, calibration = five_blocks
    for block, reachable in ((target.blocks[0], target.blocks[:4]), (target.blocks[4], target.blocks[4:])):
        one = searching(target, calibration, BOTH, FAST, block, monkeypatch)
        assert list(one.expected) == [n for b in reachable for n in clq.layers_of(target, b)]
        sites = [s for s in target.sites if s.name.startswith(f"{block}.")]
        for quantizer in clq.quantizers(sites, one.layers, BOTH):
            goal, own = one.goal(quantizer), quantizer.layers[-1]
            if own == f"{target.blocks[4]}.ff.net.2":
                assert goal == own
            else:
                assert target.layers.index(goal) > target.layers.index(own)


def test_the_target_is_of_the_largest_variance_or_of_the_largest_error():
    errors = torch.tensor([[0.1, 0.9, 0.4], [0.5, 0.8, 0.4], [0.1, 0.9, 0.4]], dtype=torch.float64)
    assert (loudest(errors, "variance"), loudest(errors, "peak")) == (0, 1)


def test_a_later_layers_reference_is_the_float_blocks_or_the_float_networks(five_blocks, monkeypatch):
    target, calibration = five_blocks
    last = target.blocks[4]
    layer = f"{last}.ff.net.2"
    plain = float_copy(target, dtype=torch.float32)
    kept = []
    plain.get_submodule(layer).register_forward_hook(lambda *a: kept.append(a[2].flatten(0, -2)))
    with torch.no_grad():
        for _, inputs in calibration.batches():
            plain(**inputs)
    block, network = (
        searching(target, calibration, BOTH, replace(FAST, target=t), last, monkeypatch).expected[layer]
        for t in ("fp_block", "fp_network")
    )
    torch.testing.assert_close(network, torch.cat(kept), rtol=1e-4, atol=1e-4)
    assert relative_error(block, network) > 1e-3


def test_everything_but_the_quantizer_under_search_is_in_float(small_target, small_calibration, monkeypatch):
    one = searching(small_target, small_calibration, BOTH, FAST, BLOCK, monkeypatch)
    name = f"{BLOCK}.attn1.to_out.0"
    at_16_bits = one.stream.layer_outputs(BLOCK, 3, one.calls, list(one.expected))
    for quantizer in (Quantizer("weight", (name,), BOTH.weight), Quantizer("act", (name,), BOTH.act)):
        rounded = one.outputs(quantizer, 0.6, 0.6, [f"{BLOCK}.attn1.to_v", name])
        assert torch.equal(rounded[f"{BLOCK}.attn1.to_v"], at_16_bits[f"{BLOCK}.attn1.to_v"])
        assert not torch.equal(rounded[name], at_16_bits[name])
        kernel = one.layers[name].kernel
        again = one.stream.layer_outputs(BLOCK, 3, one.calls, [name])
        assert kernel.act is None and torch.equal(again[name], at_16_bits[name])
    sides = []
    monkeypatch.setattr(clq, "round_layer", lambda t, layer, state, bits, params, n: sides.append(bits))
    for side in ("weight", "act"):
        one.outputs(Quantizer(side, (name,), getattr(BOTH, side)), 0.6, 0.6, [name])
    assert sides == [replace(BOTH, act=None), replace(BOTH, weight=None)]


def test_the_grid_stops_at_its_lowest_share_and_both_ends_move_only_around_the_best():
    tried = []

    def loss(low, high):
        tried.append((low, high))
        return (low - 0.65) ** 2 + (high - 0.75) ** 2

    params = Params(grid=20, lowest=0.5, local=2)
    assert search(loss, params, one_ratio=False) == pytest.approx((0.65, 0.75))
    assert min(low for low, _ in tried) == pytest.approx(0.5) and (1.0, 1.0) in tried
    assert len(tried) == 11 + (25 - 5) and len(set(tried)) == len(tried)
    tried.clear()
    assert search(loss, params, one_ratio=True) == pytest.approx((0.7, 0.7))
    assert len(tried) == 11 and all(low == high for low, high in tried)


def test_a_full_range_wins_a_tie():
    assert search(lambda low, high: 0.0, Params(), one_ratio=False) == (1.0, 1.0)


# --- the whole


@pytest.mark.parametrize("bits", [BOTH, BOTH_STATIC], ids=["dynamic", "static"])
def test_with_no_part_it_is_rounding_to_nearest(bits, small_target, small_calibration):
    params = replace(FAST, parts="none")
    state = clq.fit(small_target, small_calibration, bits, params)
    plain = rtn.fit(small_target, small_calibration, bits, rtn.Params())
    assert {n: t.tolist() for n, t in state.items()} == {n: t.tolist() for n, t in plain.items()}
    models = [
        build(small_target, module.apply(small_target, own, bits, p), dtype=torch.float32, backend="simulate")
        for module, own, p in ((clq, state, params), (rtn, plain, rtn.Params()))
    ]
    for one, other in zip(*(quant_layers(model).values() for model in models), strict=True):
        assert torch.equal(one.kernel.unpacked(), other.kernel.unpacked())
        assert one.kernel.act.spec == other.kernel.act.spec


def test_each_part_leaves_its_own_traces(small_target, small_calibration):
    kinds = {
        parts: {
            key.rsplit("/", 1)[1] for key in clq.fit(small_target, small_calibration, BOTH, replace(FAST, parts=parts))
        }
        for parts in ("cbc", "cbc+obs", "clps", "cbc+obs+clps")
    }
    assert kinds == {
        "cbc": set(),
        "cbc+obs": {"order"},
        "clps": {"weight_ratios", "act_clip"},
        "cbc+obs+clps": {"order", "weight_ratios", "act_clip"},
    }


def test_layers_that_share_an_input_share_its_clip(small_target, small_calibration):
    for bits, key in ((BOTH, "act_clip"), (BOTH_STATIC, "act_low")):
        state = clq.fit(small_target, small_calibration, bits, FAST)
        assert len({float(state[f"{LAST}.attn1.to_{operand}/{key}"]) for operand in "qkv"}) == 1


def test_cbc_changes_static_ranges_and_clps_lies_inside_them(small_target, small_calibration):
    floats, crossed, clipped = (
        clq.fit(small_target, small_calibration, BOTH_STATIC, replace(FAST, parts=parts))
        for parts in ("none", "cbc", "cbc+clps")
    )
    name = f"{LAST}.ff.net.2"
    assert float(crossed[f"{name}/act_high"]) != float(floats[f"{name}/act_high"])
    first = f"{BLOCK}.attn1.to_q"
    torch.testing.assert_close(crossed[f"{first}/act_high"], floats[f"{first}/act_high"])
    for end in ("low", "high"):
        for layer in small_target.layers[:6]:  # the first block reads the same in both
            ratio = float(clipped[f"{layer}/act_{end}"] / crossed[f"{layer}/act_{end}"])
            assert min(abs(ratio - share) for share in (1.0, 0.8, 0.6, 0.4)) < 1e-5


def test_with_outlier_channels_it_loses_less_than_rounding_alone(own_model, small_calibration):
    own_model.inject_outliers(channels=4, log2_factor=5, seed=0)
    target = own_model.target()
    inputs = own_model.step_inputs(4)
    params = replace(FAST, grid=10)
    with torch.no_grad():
        expected = float_copy(target, dtype=torch.float32)(**inputs).sample
        recipes = (
            clq.apply(target, clq.fit(target, small_calibration, BOTH, params), BOTH, params),
            rtn.apply(target, {}, BOTH, rtn.Params()),
        )
        errors = [relative_error(build(target, r, dtype=torch.float32)(**inputs).sample, expected) for r in recipes]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("bits", [Bits(BOTH.weight, None), Bits(None, BOTH.act)], ids=["W4A16", "W16A4"])
def test_one_side_alone_is_searched_alone(bits, small_target, small_calibration):
    state = clq.fit(small_target, small_calibration, bits, FAST)
    assert any(key.endswith("weight_ratios") for key in state) == (bits.weight is not None)
    assert any(key.endswith("act_clip") for key in state) == (bits.act is not None)
    clq.apply(small_target, state, bits, FAST)


def test_layers_outside_the_blocks_are_rounded_plainly(small_model, small_calibration):
    target = small_model.target("all")
    params = replace(FAST, parts="obs")
    recipe = clq.apply(target, clq.fit(target, small_calibration, DYNAMIC, params), DYNAMIC, params)
    outside = [name for name in target.layers if not name.startswith("transformer_blocks.")]
    assert outside and all(recipe.layers[name].transform.is_identity for name in outside)
    assert all(recipe.layers[name].act.spec == DYNAMIC.act for name in outside)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"parts": "cbc+osb"}, "parts are none, or some of cbc, obs, clps"),
        ({"parts": "obs+obs"}, "parts are none"),
        ({"cbc_depth": "2"}, "cbc_depth must be one of all, 1"),
        ({"permutation": "sorted"}, "permutation must be one of"),
        ({"blocks": 0}, "blocks must be at least 1"),
        ({"probe": ()}, "probe and lowest"),
        ({"probe": (0.0, 1.0)}, "probe and lowest"),
        ({"reach": -1}, "reach must be at least 0"),
    ],
)
def test_values_that_cannot_be_used_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        Params(**values)


def test_what_hydra_gives_is_what_python_gives():
    assert Params(cbc_depth=1, probe=[0.5, 1.0]) == Params(cbc_depth="1", probe=(0.5, 1.0))
    given = methods.defaults("clq") | {"cbc_depth": 1, "probe": [0.5, 1.0]}  # as the command line gives them
    assert methods.params_of(given) == Params(cbc_depth="1", probe=(0.5, 1.0))


@pytest.mark.parametrize(("rows_of_tokens", "rows"), [(100, 6), (4, 4), (1, 2)])
def test_the_search_has_a_budget_of_tokens_but_sees_every_step(rows_of_tokens, rows, small_target, small_calibration):
    stream = BlockStream(float_model(small_target, [], torch.float32), small_target, small_calibration)
    per_row = stream.inputs[0].hidden_BTC.shape[1]
    calls = stream.sample(steps=2, rows=3, tokens=rows_of_tokens * per_row)
    assert sum(len(call.hidden_BTC) for call in calls) == rows
