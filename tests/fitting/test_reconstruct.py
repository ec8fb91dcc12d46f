"""Block reconstruction: what it is trained on, that it helps, and that it disturbs nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ditbench.harness.build.attention import QuantAttention
from ditbench.harness.build.build import build, quant_layers
from ditbench.harness.calibration.block_stream import BlockStream
from ditbench.harness.fitting import reconstruct as module
from ditbench.harness.fitting.conformance import DYNAMIC, STATIC
from ditbench.harness.fitting.reconstruct import Reconstruction, learned_weights, output_error, reconstruct
from ditbench.harness.fitting.rounding import nearest, static_ranges
from ditbench.harness.quant.effective import effective_linear
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.spec import Bits
from ditbench.harness.quant.transforms import Transform
from ditbench.methods import htg

W4A8_STATIC = STATIC.with_widths(4, 8)
SHORT = Reconstruction(iterations=60)
module_learn = module._BlockLearner.learn  # as it is before a test puts something in its place


def start(target, calibration, bits, **options):
    state = static_ranges(target, bits, calibration)
    return state, nearest(target, bits, state, **options)


def learned(target, calibration, bits, settings=SHORT, widen=1.0):
    """Before and after: (recipe, state), (recipe, state)."""
    state = {name: widen * value for name, value in static_ranges(target, bits, calibration).items()}
    before = nearest(target, bits, state)
    after = state | reconstruct(target, before, calibration, settings)
    weights = learned_weights(target, after, bits.weight)
    return (before, state), (nearest(target, bits, after, weights=weights), after)


def block_errors(target, calibration, recipe) -> list[float]:
    """Σ (f̂(x̂) − f(x))² of each block's output, over the calibration."""
    outputs, errors = {}, dict.fromkeys(target.blocks, 0.0)
    exact = build(target, ModelRecipe({}), dtype=torch.float32)
    rounded = build(target, recipe, dtype=torch.float32, backend="simulate")
    for name in target.blocks:
        exact.get_submodule(name).register_forward_hook(lambda _, i, out, name=name: outputs.update({name: out}))
        rounded.get_submodule(name).register_forward_hook(
            lambda _, i, out, name=name: errors.update(
                {name: errors[name] + float((out - outputs[name]).square().sum())}
            )
        )
    with torch.no_grad():
        for step, inputs in calibration.batches():
            for model in (exact, rounded):
                model.clock.set(step, calibration.num_steps)
                model(**inputs)
    return list(errors.values())


KINKED = {
    "Clamp",
    "ClampMin",
    "ClampMax",
    "Hardtanh",
    "Relu",
    "Threshold",
    "Hardsigmoid",
    "Hardswish",
    "Maximum",
    "Minimum",
}
KINKED |= {
    "Max",
    "Min",
    "Amax",
    "Amin",
    "Aminmax",
    "Quantile",
    "Sort",
    "Topk",
    "Round",
    "Floor",
    "Ceil",
    "Trunc",
    "Sign",
}


def test_no_gradient_is_left_to_what_torch_does_at_a_kink(small_model, small_calibration, monkeypatch):
    """Of what lies between the loss and what is learned, only `abs` has one, under a power above 1: smooth."""
    target, seen = small_model.target(attention=True), set()
    kept = torch.autograd.grad

    def look(loss, parameters):
        waiting = [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                waiting += [before for before, _ in node.next_functions]
        return kept(loss, parameters)

    monkeypatch.setattr(torch.autograd, "grad", look)
    settings = replace(SHORT, iterations=3, warmup=0.0, input_prob=0.5, act_prob=0.5, scale_iterations=2)
    learned(target, small_calibration, W4A8_STATIC, settings)
    names = {node.name().partition("Backward")[0] for node in seen}
    assert {"_ClampWithEnds", "Abs", "Softmax"} <= names and not names & KINKED, names


@pytest.fixture
def recorded(monkeypatch):
    """[(learner, samples)] of each block, with nothing learned."""
    seen = []
    monkeypatch.setattr(module._BlockLearner, "learn", lambda self, block, samples: seen.append((self, block, samples)))
    return seen


@pytest.mark.parametrize("bits", [DYNAMIC, W4A8_STATIC, DYNAMIC.with_widths(3, 8)], ids=["dynamic", "static", "w3"])
def test_blocks_come_closer_to_float_than_with_rounding_to_nearest(bits, small_target, small_calibration):
    (before, _), (after, _) = learned(small_target, small_calibration, bits)
    errors = [block_errors(small_target, small_calibration, recipe) for recipe in (before, after)]
    assert all(new < 0.75 * old for old, new in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("bits", [DYNAMIC, W4A8_STATIC], ids=["dynamic", "static"])
def test_every_learned_weight_is_a_neighbour_on_the_grid(bits, small_target, small_calibration):
    (before, _), (after, _) = learned(small_target, small_calibration, bits)
    moved = 0
    for name in small_target.layers:
        weight_OC = effective_linear(small_target, name, {}, frozenset()).weight_OC
        rounded, plain = after.layers[name].weight, before.layers[name].weight
        assert torch.equal(rounded.scale_OG, plain.scale_OG)
        assert bool(((rounded.dequantize() - weight_OC).abs() <= 1.0001 * rounded.scale_OG).all())
        moved += int((rounded.codes_OC != plain.codes_OC).sum())
    assert moved > 100


def test_static_scales_that_are_too_wide_are_learned_narrower(small_target, small_calibration):
    """Weights in float: only the scales of activations can have done it."""
    bits = Bits(None, STATIC.act)
    settings = replace(SHORT, scale_learning_rate=4e-3)
    bits = bits.with_widths(16, 4)
    (before, old), (after, new) = learned(small_target, small_calibration, bits, settings, widen=2.0)
    errors = [block_errors(small_target, small_calibration, recipe) for recipe in (before, after)]
    assert all(b < 0.7 * a for a, b in zip(*errors, strict=True)), errors
    narrower = [float(new[f"{n}/act_high"]) < float(old[f"{n}/act_high"]) for n in small_target.layers]
    assert all(narrower) and not any("codes" in name for name in new)


def test_scales_learned_after_the_rounding_leave_the_rounding_alone(small_target, small_calibration):
    apart, without = (
        learned(
            small_target, small_calibration, W4A8_STATIC, replace(SHORT, scale_iterations=n, scale_learning_rate=rate)
        )
        for n, rate in ((20, 4e-3), (1, 0.0))
    )
    first = [name for name in small_target.layers if name.startswith("transformer_blocks.0.")]
    (_, kept), (_, moved), start_ranges = without[1], apart[1], apart[0][1]
    for name in first:
        assert torch.equal(kept[f"{name}/codes"], moved[f"{name}/codes"])
        torch.testing.assert_close(kept[f"{name}/act_high"], start_ranges[f"{name}/act_high"], rtol=0.05, atol=0)
        assert not torch.allclose(kept[f"{name}/act_high"], moved[f"{name}/act_high"], rtol=1e-3)


def test_scales_that_are_learned_after_the_rounding_see_rounded_weights(small_target, small_calibration, monkeypatch):
    kept, soft = module._BlockLearner._descend, []

    def descend(self, block, samples, roundings, static, *more):
        soft.append([layer.kernel.rounding is not None for layer in self.layers.values()])
        kept(self, block, samples, roundings, static, *more)

    monkeypatch.setattr(module._BlockLearner, "_descend", descend)
    learned(small_target, small_calibration, W4A8_STATIC, replace(SHORT, iterations=2, scale_iterations=2))
    assert [any(each) for each in soft] == [True, False] * len(small_target.blocks)


def test_attention_operands_are_learned_too_and_put_back_as_plain_quantizers(
    small_model, small_calibration, monkeypatch
):
    target = small_model.target(attention=True)
    bits, models = W4A8_STATIC, []
    monkeypatch.setattr(module, "build", lambda *a, **k: models.append(build(*a, **k)) or models[-1])
    settings = replace(SHORT, scale_learning_rate=1e-3)
    (before, old), (after, new) = learned(target, small_calibration, bits, settings)
    errors = [block_errors(target, small_calibration, recipe) for recipe in (before, after)]
    assert all(b < 0.75 * a for a, b in zip(*errors, strict=True)), errors
    for name in target.attention:
        for operand in ("query", "key", "value", "probabilities"):
            assert float(new[f"{name}.{operand}/act_high"]) != pytest.approx(
                float(old[f"{name}.{operand}/act_high"]), rel=1e-5
            )
        assert type(models[1].get_submodule(name).attend) is QuantAttention
        torch.testing.assert_close(
            models[1].get_submodule(name).attend.quant["key"].scale.rows, after.attention[name].key.scale.rows
        )


def test_targets_are_the_float_blocks_on_float_inputs_row_by_row(recorded, small_target, small_calibration):
    """With input_prob 0 a minibatch is float inputs, and the float block makes its targets from them."""
    _, recipe = start(small_target, small_calibration, DYNAMIC)
    reconstruct(small_target, recipe, small_calibration, replace(SHORT, input_prob=0.0, batch_size=9))
    exact = build(small_target, ModelRecipe({}), dtype=torch.float32)
    assert len(recorded) == 2
    for name, (_, _, samples) in zip(small_target.blocks, recorded, strict=True):
        hidden, target, kwargs = samples.draw()
        assert len(hidden) == len(target) == 9
        with torch.no_grad():
            torch.testing.assert_close(exact.get_submodule(name)(hidden, **kwargs), target)
        assert len(kwargs["timestep"].unique()) > 1


@pytest.mark.parametrize(("rows_of_tokens", "rows"), [(100, 9), (4, 4), (0.5, 1)])
def test_a_minibatch_has_a_budget_of_tokens(recorded, rows_of_tokens, rows, small_target, small_calibration):
    _, recipe = start(small_target, small_calibration, DYNAMIC)
    tokens = BlockStream(build(small_target, ModelRecipe({})), small_target, small_calibration).inputs[0]
    budget = int(rows_of_tokens * tokens.hidden_BTC.shape[1])
    reconstruct(small_target, recipe, small_calibration, replace(SHORT, batch_size=9, batch_tokens=budget))
    hidden, target, _ = recorded[0][2].draw()
    assert len(hidden) == len(target) == rows


def test_inputs_are_those_that_the_rounded_blocks_before_give(recorded, small_target, small_calibration):
    """Nothing is learned here, so block 0 is rounded to nearest when block 1 is reached."""
    _, recipe = start(small_target, small_calibration, DYNAMIC)
    given = []
    module._BlockLearner.learn = lambda self, block, samples: given.append(
        [call.hidden_BTC for call in samples.stream.inputs]
    )
    reconstruct(small_target, recipe, small_calibration, SHORT)
    rounded, seen = build(small_target, recipe, dtype=torch.float32), []
    rounded.get_submodule(small_target.blocks[1]).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for inputs in small_calibration.per_step:
            rounded(**inputs)
    for ours, theirs in zip(given[1], seen, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_share_of_the_inputs_elements_is_float(recorded, small_target, small_calibration):
    """QDrop at 0.3: away from one half, a swap could be seen."""
    _, recipe = start(small_target, small_calibration, DYNAMIC.with_widths(3, 8))
    shares = []

    def look(self, block, samples):
        hidden, _, _ = samples.draw()
        recorded.append((self, block, samples))
        exact = torch.cat(samples.float_inputs)
        row_of = torch.cdist(hidden.flatten(1), exact.flatten(1)).argmin(1)
        shares.append(float((hidden != exact[row_of]).float().mean()))

    module._BlockLearner.learn = look  # monkeypatched by `recorded`, and put back by it
    reconstruct(small_target, recipe, small_calibration, replace(SHORT, input_prob=0.3, batch_size=32))
    assert shares[0] == 0  # nothing is quantized before the first block
    assert 0.25 < shares[1] < 0.35


def test_a_share_of_a_layers_input_elements_is_quantized_while_training(
    recorded, small_target, small_calibration, normal
):
    _, recipe = start(small_target, small_calibration, DYNAMIC.with_widths(4, 3))
    seen = []

    def look(self, block, samples):
        layer = next(iter(self.layers.values()))
        x = normal(50, 48).float()
        seen.append((x, layer.kernel.act(x, None), self.acts[next(iter(self.layers))](x, None)))

    module._BlockLearner.learn = look
    reconstruct(small_target, recipe, small_calibration, replace(SHORT, act_prob=0.3))
    x, mixed, quantized = seen[0]
    assert bool(((mixed == x) | (mixed == quantized)).all())
    assert 0.25 < float((mixed != x).float().mean()) < 0.35


def test_where_tables_depend_on_the_step_a_minibatch_is_of_one_step(recorded, small_target, small_calibration):
    state = htg.fit(small_target, small_calibration, DYNAMIC, htg.Params(groups=2))
    recipe = htg.apply(small_target, state, DYNAMIC, htg.Params(groups=2))
    reconstruct(small_target, recipe, small_calibration, SHORT)
    samples, steps = recorded[0][2], set()
    for _ in range(20):
        _, _, kwargs = samples.draw()
        assert len(kwargs["timestep"].unique()) == 1
        step = int(samples.stream.model.clock.step)
        assert float(kwargs["timestep"][0]) == float(small_calibration.per_step[step]["timestep"][0])
        steps.add(step)
    assert len(steps) > 1


def test_what_is_held_stays_within_the_budget(recorded, small_target, small_calibration):
    _, recipe = start(small_target, small_calibration, DYNAMIC)
    reconstruct(small_target, recipe, small_calibration, replace(SHORT, max_bytes=100_000))
    for _, _, samples in recorded:
        held = [*samples.float_inputs, *samples.targets, *(call.hidden_BTC for call in samples.stream.inputs)]
        assert 50_000 < sum(tensor.nbytes for tensor in held) <= 100_000


def test_layers_outside_the_blocks_keep_their_rounding(small_model, small_calibration):
    target = small_model.target("all")
    (before, _), (after, state) = learned(target, small_calibration, DYNAMIC, replace(SHORT, iterations=5))
    outside = [name for name in target.layers if not name.startswith("transformer_blocks.")]
    assert outside
    for name in target.layers:
        assert (f"{name}/codes" in state) == (name not in outside)
    for name in outside:
        assert torch.equal(before.layers[name].weight.codes_OC, after.layers[name].weight.codes_OC)


def test_the_seed_decides_and_nothing_else_is_disturbed(small_target, small_calibration):
    """The global random state, the gradient mode and the caller's no_grad stay as they were."""
    _, recipe = start(small_target, small_calibration, DYNAMIC)
    random_state = torch.get_rng_state()
    settings = replace(SHORT, iterations=12, input_prob=0.5, act_prob=0.5)
    with torch.no_grad():
        first, second, other = (
            reconstruct(small_target, recipe, small_calibration, replace(settings, seed=seed)) for seed in (3, 3, 4)
        )
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert not any(p.requires_grad and p.grad is not None for p in small_target.transformer.parameters())
    assert not any(tensor.requires_grad for tensor in first.values())


@pytest.mark.parametrize(
    ("bits", "options"),
    [(Bits(None, None), {}), (Bits(None, DYNAMIC.act), {}), (DYNAMIC, {"reconstruct": "none"})],
    ids=["float", "dynamic activations only", "switched off"],
)
def test_where_nothing_can_be_learned_nothing_is_returned(bits, options, small_target, small_calibration):
    _, recipe = start(small_target, small_calibration, bits)
    assert reconstruct(small_target, recipe, small_calibration, Reconstruction(**options)) == {}


def test_the_weight_that_is_learned_is_the_transformed_one(small_target, small_calibration):
    scale = Transform(scale_C=torch.linspace(0.2, 5, 48))
    name = "transformer_blocks.1.ff.net.0.proj"
    _, recipe = start(small_target, small_calibration, DYNAMIC, transforms={name: scale})
    weight = learned_weights(small_target, reconstruct(small_target, recipe, small_calibration, SHORT), DYNAMIC.weight)[
        name
    ]
    expected = small_target.module(name).weight * torch.linspace(0.2, 5, 48)
    assert bool(((weight.dequantize() - expected).abs() <= 1.0001 * weight.scale_OG).all())
    assert quant_layers(build(small_target, recipe, dtype=torch.float32))[name].transform is not None


def test_the_regulariser_pulls_the_roundings_to_a_decision(small_target, small_calibration, monkeypatch):
    """Without it more weights stay between their neighbours."""
    _, recipe = start(small_target, small_calibration, DYNAMIC)
    undecided = {}
    put_back = module._BlockLearner.put_back
    for strength in (0.0, 1.0):

        def look(self, recipe, strength=strength):
            undecided[strength] = sum(float(r.regulariser(2.0)) for r in self.roundings.values())
            return put_back(self, recipe)

        monkeypatch.setattr(module._BlockLearner, "put_back", look)
        reconstruct(small_target, recipe, small_calibration, replace(SHORT, regulariser=strength))
    assert undecided[1.0] < 0.7 * undecided[0.0]


def test_the_error_is_summed_over_channels_and_averaged_over_the_rest(normal):
    output, target = normal(2, 3, 5), normal(2, 3, 5, seed=1)
    total = 0.0
    for b in range(2):
        for t in range(3):
            total += sum(abs(float(output[b, t, c] - target[b, t, c])) ** 2.4 for c in range(5)) / 6
    assert float(output_error(output, target, 2.4)) == pytest.approx(total, rel=1e-12)


def test_roundings_are_learned_on_float_inputs_and_scales_on_rounded_ones(
    recorded, small_target, small_calibration, normal
):
    """As Q-Diffusion and BRECQ do it: activations are quantized only while their scales are learned."""
    _, recipe = start(small_target, small_calibration, W4A8_STATIC.with_widths(4, 3))
    settings = replace(SHORT, float_inputs=True, iterations=2, scale_iterations=3)
    x, seen = normal(5, 48).float(), []

    def learn(self, block, samples):
        layer = next(iter(self.layers.values()))

        def look(block, samples, roundings, static, iterations, power=2.0):
            seen.append((bool(roundings), bool(static), torch.equal(layer.kernel.act(x, None), x)))

        self._descend = look
        module_learn(self, block, samples)

    module._BlockLearner.learn = learn  # monkeypatched by `recorded`, and put back by it
    reconstruct(small_target, recipe, small_calibration, settings)
    assert seen == [(True, False, True), (False, True, False)] * len(small_target.blocks)
