from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ditbench.harness.build.build import build, quant_layers
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.conformance import DYNAMIC, STATIC
from ditbench.harness.fitting.registry import check_bits
from ditbench.harness.quant.quantizers import ActQuant, fake_quantize_activation, quantize_weight
from ditbench.harness.quant.spec import QuantSpec
from ditbench.harness.quant.target import Site, Target
from ditbench.methods import q_dit
from ditbench.methods.q_dit import OutputError, Params, bits_by_layer, evolve, mean, nearest_divisor, preset

LAYER = "transformer_blocks.1.ff.net.2"
RTN = Params(group_size=16, weights="rtn")
CHOICES = [(32, 64, 128, 192, 288)] * 8


def group(symmetric: bool, bits: int = 4, size: int = 16, dynamic: bool = False) -> QuantSpec:
    return QuantSpec(bits, "per_group", symmetric, dynamic, size)


def by_hand(values: list[float], bits: int, size: int) -> list[float]:
    """s = (max − min)/(2^b − 1), Z = −round(min/s) group by group, zero inside the range, in Python's float64."""
    rounded = []
    for start in range(0, len(values), size):
        part = values[start : start + size]
        low, high = min(*part, 0.0), max(*part, 0.0)
        scale = (high - low) / (2**bits - 1)
        zero = -round(low / scale)
        rounded += [(min(max(round(v / scale) + zero, 0), 2**bits - 1) - zero) * scale for v in part]
    return rounded


def test_a_layer_is_the_sum_over_groups_of_products_of_rounded_groups(small_target, small_calibration, normal):
    """W3A5 in groups of 24, in plain loops."""
    bits, params = DYNAMIC.with_widths(3, 5), Params(group_size=24, weights="rtn")
    recipe = q_dit.apply(small_target, q_dit.fit(small_target, small_calibration, bits, params), bits, params)
    layer = quant_layers(build(small_target, recipe, dtype=torch.float64))[LAYER]
    x, linear = normal(3, 192) + 0.3, small_target.module(LAYER)
    rows = [by_hand(row, 3, 24) for row in linear.weight.tolist()]
    expected = []
    for token in x.tolist():
        rounded = by_hand(token, 5, 24)
        products = [
            sum(
                sum(a * b for a, b in zip(rounded[u : u + 24], row[u : u + 24], strict=True)) for u in range(0, 192, 24)
            )
            for row in rows
        ]
        expected.append([y + b for y, b in zip(products, linear.bias.tolist(), strict=True)])
    torch.testing.assert_close(layer(x), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", ["gptq", "rtn"])
def test_both_sides_of_a_layer_have_the_group_size_of_its_input(weights, small_target, small_calibration):
    params = Params(weights=weights)
    state = q_dit.fit(small_target, small_calibration, DYNAMIC, params)
    sizes = {site.name: 48 if "ff_mid" not in site.name else 96 for site in small_target.sites}  # 128 divides neither
    assert {name: int(state[f"{name}/group_size"]) for name in sizes} == sizes
    recipe = q_dit.apply(small_target, state, DYNAMIC, params)
    for name in small_target.layers:
        layer, size = recipe.layers[name], sizes[small_target.site_of(name).name]
        assert (layer.weight.spec.group_size, layer.act.spec.group_size) == (size, size)
        assert layer.weight.scale_OG.shape[1] == small_target.module(name).in_features // size
        assert layer.act.spec.dynamic and not layer.act.spec.symmetric and not layer.weight.spec.symmetric


def test_a_state_with_other_sizes_changes_weights_and_activations(small_target, small_calibration):
    """The release's search changed the weights' only."""
    state = q_dit.fit(small_target, small_calibration, DYNAMIC, RTN)
    site = small_target.site_of(LAYER).name
    other = state | {f"{site}/group_size": torch.tensor(64)}
    layers = [q_dit.apply(small_target, s, DYNAMIC, RTN).layers[LAYER] for s in (state, other)]
    assert [layer.weight.spec.group_size for layer in layers] == [16, 64]
    assert [layer.act.spec.group_size for layer in layers] == [16, 64]
    assert [layer.weight.scale_OG.shape[1] for layer in layers] == [12, 3]


def test_the_fitness_sees_each_side_alone(small_target, small_calibration):
    """A candidate differs from the preset in its fitness with only weights, and with only activations, quantized."""
    one = preset(small_target, 16)
    other = (*one[:-1], 96)
    for bits in (replace(DYNAMIC, act=None), replace(DYNAMIC, weight=None)):
        error = OutputError(small_target, small_calibration, bits, RTN)
        assert error(one) != error(other) and error(one) == error(one)


def test_the_fitness_is_the_relative_squared_error_of_the_output(small_target, small_calibration):
    params = replace(RTN, fitness_steps=2, fitness_rows=3)
    error = OutputError(small_target, small_calibration, DYNAMIC, params)
    assert error.steps == [0, 3]
    sizes = preset(small_target, 16)
    recipe = q_dit.apply(small_target, q_dit.fit(small_target, small_calibration, DYNAMIC, RTN), DYNAMIC, RTN)
    model, noise, signal = build(small_target, recipe, dtype=torch.float32), 0.0, 0.0
    with torch.no_grad():
        for step in (0, 3):
            rows = {n: t[[0, 2, 5]] for n, t in small_calibration.per_step[step].items()}
            exact, ours = small_target.transformer(**rows).sample.double(), model(**rows).sample.double()
            noise, signal = noise + float(((ours - exact) ** 2).sum()), signal + float((exact**2).sum())
    assert error(sizes) == pytest.approx(noise / signal, rel=1e-4)


def test_gptq_loses_less_of_the_output_than_rounding_to_nearest(small_target, small_calibration):
    """With the groups of each layer; the model output at 3 bits, activations in float."""
    bits = replace(DYNAMIC.with_widths(3, 8), act=None)
    errors = []
    for weights in ("gptq", "rtn"):
        params = Params(group_size=24, weights=weights)
        recipe = q_dit.apply(small_target, q_dit.fit(small_target, small_calibration, bits, params), bits, params)
        model = build(small_target, recipe, dtype=torch.float32)
        with torch.no_grad():
            errors.append(
                sum(
                    float((model(**i).sample - small_target.transformer(**i).sample).square().sum())
                    for i in small_calibration.per_step
                )
            )
    assert errors[0] < 0.9 * errors[1]


def test_one_group_is_per_channel_and_per_token(normal):
    weight, x = normal(6, 48), normal(5, 48)
    whole, channel = (quantize_weight(weight, s) for s in (group(False, size=48), QuantSpec(4, "per_channel", False)))
    assert torch.equal(whole.codes_OC, channel.codes_OC)
    token = QuantSpec(4, "per_token", False, dynamic=True)
    both = (fake_quantize_activation(x, ActQuant(s)) for s in (group(False, size=48, dynamic=True), token))
    assert torch.equal(*both)


def test_groups_of_one_channel_lose_nothing_when_symmetric(normal):
    x = normal(5, 48)
    rounded = fake_quantize_activation(x, ActQuant(group(True, size=1, dynamic=True)))
    torch.testing.assert_close(rounded, x, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_lose_less_than_tokens_where_channels_differ(bits, normal):
    x = normal(64, 48) * torch.logspace(-1, 1, 48, dtype=torch.float64)
    grouped = ActQuant(group(False, bits, dynamic=True))
    token = ActQuant(QuantSpec(bits, "per_token", False, dynamic=True))
    errors = [float((fake_quantize_activation(x, quant) - x).square().mean()) for quant in (grouped, token)]
    assert errors[0] < 0.8 * errors[1]


def test_a_one_sided_group_is_reproduced_within_one_step():
    x = torch.linspace(5, 10, 16, dtype=torch.float64)
    rounded = fake_quantize_activation(x[None], ActQuant(group(False, dynamic=True)))[0]
    assert float((rounded - x).abs().max()) <= 10 / 15
    weight = quantize_weight(x[None], group(False)).dequantize()[0].double()
    assert float((weight - x).abs().max()) <= 10 / 15


def test_tokens_are_quantized_on_their_own(normal):
    """In any order, and whatever else is in the batch."""
    x, quant, order = normal(2, 5, 48), ActQuant(group(False, dynamic=True)), [3, 0, 4, 1, 2]
    whole = fake_quantize_activation(x, quant)
    assert torch.equal(fake_quantize_activation(x[:, order], quant), whole[:, order])
    assert torch.equal(fake_quantize_activation(x.flip(0), quant), whole.flip(0))
    assert torch.equal(fake_quantize_activation(x[1:, 2:3], quant), whole[1:, 2:3])


@pytest.mark.parametrize(
    ("channels", "size", "taken"),
    [
        (1152, 128, 128),
        (4608, 288, 288),
        (48, 128, 48),
        (96, 64, 48),
        (4, 128, 4),
        (48, 20, 24),
        (7, 32, 7),
        (192, 128, 96),
    ],
)
def test_a_size_that_does_not_divide_gives_way_to_the_nearest_divisor(channels, size, taken):
    assert nearest_divisor(channels, size) == taken


def test_the_papers_sizes_divide_the_widths_of_dit_xl():
    assert all(channels % size == 0 for channels in (1152, 4608) for size in Params().sizes)


def dit_xl() -> Target:
    """The layers of DiT-XL/2 without their memory."""
    layers, sites = nn.ModuleDict(), []
    with torch.device("meta"):
        for block in range(28):
            for name, outputs, inputs in (("q", 1152, 1152), ("k", 1152, 1152), ("v", 1152, 1152), ("o", 1152, 1152),
                                          ("up", 4608, 1152), ("down", 1152, 4608)):  # fmt: skip
                layers[f"{name}{block}"] = nn.Linear(inputs, outputs)
            sites.append(Site(f"in{block}", tuple(f"{n}{block}" for n in "qkv")))
            sites += [Site(f"{n}_in{block}", (f"{n}{block}",)) for n in ("o", "up", "down")]
    return Target(layers, tuple(layers), tuple(sites))


def test_a_candidate_of_dit_xl_has_112_genes_and_the_preset_is_128():
    target = dit_xl()
    assert preset(target, 128) == (128,) * 112
    formats = bits_by_layer(target, DYNAMIC, (64,) * 111 + (288,), Params())
    assert len(formats) == 168 and formats["v3"].act.group_size == 64 and formats["down27"].weight.group_size == 288


def searched(fitness=None, **changes) -> SimpleNamespace:
    """The search on 8 genes with a fitness that has its optimum off the preset."""
    params = replace(Params(), population=12, epochs=6, top=4, mutations=5, crossovers=5, **changes)
    calls = []

    def count(candidate):
        calls.append(candidate)
        return sum((size - (64 if index % 2 else 288)) ** 2 for index, size in enumerate(candidate))

    winner, best = evolve(CHOICES, (128,) * 8, fitness or count, params)
    return SimpleNamespace(winner=winner, best=best, calls=calls, params=params, fitness=count)


def test_the_preset_is_evaluated_first_and_nothing_twice():
    run = searched()
    assert run.calls[0] == (128,) * 8
    assert len(set(run.calls)) == len(run.calls) == 12 * 6


def test_every_candidate_keeps_the_budget_and_takes_sizes_that_are_offered():
    run = searched()
    assert all(len(candidate) == 8 and mean(candidate) >= 128 for candidate in run.calls)
    assert all(size in CHOICES[0] for candidate in run.calls for size in candidate)
    assert min(mean(candidate) for candidate in searched(budget=100).calls) < 128


def test_the_best_fitness_never_rises_and_is_that_of_the_winner():
    run = searched()
    assert len(run.best) == 6 and run.best == sorted(run.best, reverse=True)
    assert run.best[-1] < run.best[0] <= run.fitness((128,) * 8)
    assert run.fitness(run.winner) == run.best[-1] == min(run.fitness(candidate) for candidate in run.calls[: 12 * 6])


def test_the_same_seed_searches_the_same_way():
    assert searched().calls == searched().calls != searched(seed=1).calls


def test_children_come_from_the_best(monkeypatch):
    """Without redrawn genes and without random ones, every gene of a later candidate is a gene of the best before it."""
    run = searched(mutation_probability=0.0)
    first = sorted(run.calls[:12], key=run.fitness)[:4]
    for candidate in run.calls[12:17]:  # crossovers: mutations without a redrawn gene are their parents, seen before
        assert all(size in {parent[gene] for parent in first} for gene, size in enumerate(candidate))


def test_a_candidate_that_just_keeps_the_budget_is_legal():
    """Of the four candidates one has the preset's mean group size, one more, one less."""
    seen = []
    params = replace(Params(), population=4, epochs=2, top=2, mutations=1, crossovers=1)
    winner, _ = evolve([(32, 64)] * 2, (64, 32), lambda c: seen.append(c) or float(c != (32, 64)), params)
    assert winner == (32, 64) and set(seen) == {(64, 32), (32, 64), (64, 64)}


def test_a_space_that_is_used_up_ends_the_search():
    seen = []
    winner, best = evolve([(16, 48)], (48,), lambda c: seen.append(c) or 1.0, Params(epochs=3))
    assert (winner, best, seen) == ((48,), [1.0] * 3, [(48,)])


def test_a_budget_above_the_preset_is_refused():
    with pytest.raises(UserError, match="mean group size is 128"):
        searched(budget=200)


def test_the_search_finds_sizes_that_lose_less_than_the_preset(small_target, small_calibration):
    params = replace(RTN, group_size=48, search="evolution", sizes=(8, 24, 48, 96, 192), population=6, epochs=3,
                     mutations=3, crossovers=2, top=3)  # fmt: skip
    state = q_dit.fit(small_target, small_calibration, DYNAMIC, params)
    sizes = tuple(int(state[f"{site.name}/group_size"]) for site in q_dit.grouped_sites(small_target))
    error = OutputError(small_target, small_calibration, DYNAMIC, params)
    best = state["search/best_fitness"].tolist()
    assert mean(sizes) >= mean(preset(small_target, 48)) == 48 and len(best) == 3
    assert error(sizes) == best[-1] <= error(preset(small_target, 48))
    assert sizes != preset(small_target, 48)


def test_the_search_is_off_unless_asked_for(small_target, small_calibration):
    state = q_dit.fit(small_target, small_calibration, DYNAMIC, RTN)
    assert set(state) == {f"{site.name}/group_size" for site in small_target.sites}


def test_static_activations_are_refused():
    with pytest.raises(UserError, match="set bits.act.dynamic=true"):
        check_bits("q_dit", STATIC)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"group_size": 0}, "group_size must be at least 1"),
        ({"weights": "adaround"}, "weights must be gptq or rtn, got 'adaround'"),
        ({"search": "yes"}, "search must be off or evolution"),
        ({"sizes": ()}, "sizes must be group sizes"),
        ({"mutation_probability": 2.0}, r"mutation_probability must be in \[0, 1\]"),
        ({"epochs": 0}, "epochs must be at least 1"),
    ],
)
def test_parameters_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Params(**wrong)


def test_a_list_from_the_command_line_is_the_same_parameters():
    assert Params(sizes=[32, 64, 128, 192, 288]) == Params()


@pytest.mark.parametrize("top", [1, 3])
def test_parents_are_the_best_and_no_more_of_them(top):
    """What mutations and crossovers draw their parents from."""
    drawn = []

    class Parents(random.Random):
        def choice(self, options):
            if isinstance(options[0], tuple) and isinstance(options[0][1], tuple):
                drawn.append({candidate for _, candidate in options})
            return super().choice(options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(q_dit, "random", SimpleNamespace(Random=Parents))
        evolve(CHOICES, (128,) * 8, lambda c: float(sum(c)), replace(Params(), population=12, epochs=3, top=top))
    assert drawn and {len(parents) for parents in drawn} == {top}
