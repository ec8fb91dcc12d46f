"""Folding: what runs in the producer's rows is what would have run online."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ditbench.harness.build.build import build, quant_layers
from ditbench.harness.fitting.conformance import relative_error
from ditbench.harness.quant.effective import effective_linear, touched_layers
from ditbench.harness.quant.quantizers import quantize_weight
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.spec import QuantSpec
from ditbench.harness.quant.steps import StepTable
from ditbench.harness.quant.target import AdaLNRows, Site, Target, ValueRows
from ditbench.harness.quant.transforms import Hadamard, Transform, random_signs

STEPS = 4
PARTITIONS = ([0, 0, 1, 1], [0, 1, 1, 2], [0, 1, 2, 3], [0, 0, 0, 0])


def transform_of(width: int, seed: int, rotate: bool = False) -> Transform:
    """A shift by step (each seed its own partition), a scale over two orders of magnitude, perhaps a rotation."""
    random = torch.Generator().manual_seed(seed)
    groups = torch.tensor(PARTITIONS[seed % len(PARTITIONS)])
    rows = torch.randn(int(groups.max()) + 1, width, generator=random, dtype=torch.float64)
    scale = (1.2 * torch.randn(width, generator=random, dtype=torch.float64)).exp()
    rotations = (Hadamard(width, random_signs(width, random)),) if rotate else ()
    return Transform(StepTable(rows, groups), scale, rotations)


def transforms_of(target: Target, rotate: bool = False) -> dict[str, Transform]:
    found = {}
    for seed, site in enumerate(target.linear_sites()):
        shared = transform_of(target.module(site.consumers[0]).in_features, seed, rotate)
        found |= dict.fromkeys(site.consumers, shared)
    return found


def foldable(target: Target) -> frozenset[str]:
    return frozenset(site.name for site in target.sites if site.foldable)


def site_with(target: Target, producer: type) -> Site:
    return next(site for site in target.sites if isinstance(next(iter(site.producers), None), producer))


def unrounded(target: Target, transforms: dict[str, Transform], folded: frozenset[str]) -> torch.nn.Module:
    layers = {name: LayerRecipe(transform=transform) for name, transform in transforms.items()}
    return build(target, ModelRecipe(layers, folded, num_steps=STEPS), dtype=torch.float64)


def errors_by_step(target: Target, model: torch.nn.Module, inputs: dict[str, Tensor]) -> list[float]:
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    found = []
    with torch.no_grad():
        reference = build(target, ModelRecipe({}), dtype=torch.float64)(**inputs).sample
        for step in range(STEPS):
            model.clock.set(step, STEPS)
            found.append(relative_error(model(**inputs).sample, reference))
    return found


@pytest.fixture(scope="module")
def inputs(small_model) -> dict[str, Tensor]:
    return small_model.step_inputs(3)


@pytest.mark.parametrize("index", [0, 1], ids=["attention input", "feed-forward input"])
def test_folded_adaln_rows_make_the_shifted_and_scaled_input(index, small_target, normal):
    """HTG Alg. 2 with DiT's 1 + γ: LN(x)(1 + γ') + β' = (LN(x)(1 + γ) + β − z) / s at every step, < 1e-10."""
    sites = [site for site in small_target.sites if site.modulated]
    transforms = transforms_of(small_target)
    producer, transform = sites[index].producers[0], transforms[sites[index].consumers[0]]
    plain = small_target.module(producer.linear)
    folded = effective_linear(small_target, producer.linear, transforms, frozenset({sites[index].name}))
    condition, normed = F.silu(normal(5, 48)), F.layer_norm(normal(5, 48, seed=1), (48,))
    modulation = F.linear(condition, plain.weight.double(), plain.bias.double())
    explicit = normed * (1 + modulation[:, producer.scale_rows]) + modulation[:, producer.shift_rows]
    for step in map(torch.tensor, range(STEPS)):
        modulation = F.linear(condition, folded.weight_OC, folded.bias.at(step))
        made = normed * (1 + modulation[:, producer.scale_rows]) + modulation[:, producer.shift_rows]
        assert float((made - transform(explicit, step)).abs().max()) < 1e-10


def test_rows_that_no_fold_names_stay_as_they_are(small_target):
    site = site_with(small_target, AdaLNRows)
    plain = small_target.module(site.producers[0].linear)
    folded = effective_linear(
        small_target, site.producers[0].linear, transforms_of(small_target), frozenset({site.name})
    )
    others = torch.ones(len(plain.weight), dtype=torch.bool)
    others[site.producers[0].shift_rows] = others[site.producers[0].scale_rows] = False
    assert int(others.sum()) == 4 * 48
    assert torch.equal(folded.weight_OC[others], plain.weight[others].double())
    for step in map(torch.tensor, range(STEPS)):
        assert torch.equal(folded.bias.at(step)[others], plain.bias[others].double())


def test_folded_value_rows_pass_the_shift_through_any_row_stochastic_map(small_target, normal):
    """A (Z W_vᵀ + b_v)' = (A (Z W_vᵀ + b_v) − z) / s for every A whose rows sum to one."""
    site, transforms = site_with(small_target, ValueRows), transforms_of(small_target)
    values = small_target.module(site.producers[0].linear)
    folded = effective_linear(
        small_target, site.producers[0].linear, {n: transforms[n] for n in site.consumers}, frozenset({site.name})
    )
    z, attention = normal(6, 48), normal(6, 6, seed=1).softmax(-1)
    explicit = attention @ F.linear(z, values.weight.double(), values.bias.double())
    for step in map(torch.tensor, range(STEPS)):
        made = attention @ F.linear(z, folded.weight_OC, folded.bias.at(step))
        torch.testing.assert_close(made, transforms[site.consumers[0]](explicit, step), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rotate", [False, True], ids=["shift+scale", "shift+scale+rotation"])
@pytest.mark.parametrize("where", ["online", "folded", "attention only"])
def test_the_model_is_unchanged_at_every_step_wherever_the_transform_runs(where, rotate, small_target, inputs):
    """Every site its own partition of the steps; V is consumer of one fold and producer of the next."""
    folded = {
        "online": frozenset(),
        "folded": foldable(small_target),
        "attention only": frozenset(name for name in foldable(small_target) if "attn" in name),
    }[where]
    model = unrounded(small_target, transforms_of(small_target, rotate), folded)
    assert max(errors_by_step(small_target, model, inputs)) < 1e-10
    online = [name for name, layer in quant_layers(model).items() if layer.transform is not None]
    expected = set(transforms_of(small_target))
    if not rotate:
        expected -= {name for site in small_target.sites if site.name in folded for name in site.consumers}
    assert set(online) == expected, "what is folded costs nothing at run time"


def test_the_transforms_do_change_with_the_step(small_target, inputs):
    """Else the test above would hold for a model that ignores the clock."""
    model = unrounded(small_target, transforms_of(small_target), foldable(small_target))
    seen: list[Tensor] = []
    layer = quant_layers(model)["transformer_blocks.0.attn1.to_q"]
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    errors_by_step(small_target, model, inputs)
    differ = [not torch.allclose(a, b) for a, b in zip(seen, seen[1:], strict=False)]
    assert differ == [False, True, False]  # partition [0, 0, 1, 1]


def test_a_bias_without_the_weight_times_the_shift_is_seen(small_target, inputs, monkeypatch):
    """One of the two re-implementations of HTG leaves b + W z out: the output is then another one."""

    def without_moving(self, bias_O, weight_OC):
        return None if bias_O is None else StepTable.constant(bias_O)

    monkeypatch.setattr(Transform, "of_bias", without_moving)
    model = unrounded(small_target, transforms_of(small_target), foldable(small_target))
    assert min(errors_by_step(small_target, model, inputs)) > 1e-3


def test_consumers_with_different_transforms_refuse_to_be_folded(small_target):
    site = site_with(small_target, AdaLNRows)
    transforms = transforms_of(small_target)
    transforms[site.consumers[1]] = transform_of(48, 1)
    with pytest.raises(ValueError, match=f"{site.name}: .*one transform object.*to_k"):
        unrounded(small_target, transforms, frozenset({site.name}))


def test_a_consumer_without_its_transform_refuses_to_be_folded(small_target):
    """A q that stays in float still reads the scaled input."""
    site = site_with(small_target, AdaLNRows)
    transforms = transforms_of(small_target)
    del transforms[site.consumers[2]]
    with pytest.raises(ValueError, match=f"{site.name}: .*one transform object"):
        effective_linear(small_target, site.producers[0].linear, transforms, frozenset({site.name}))


def test_folds_rebuild_the_producers_too(small_target):
    transforms = transforms_of(small_target)
    recipe = ModelRecipe({n: LayerRecipe(transform=t) for n, t in transforms.items()}, foldable(small_target))
    adaln = {f"transformer_blocks.{block}.norm1.linear" for block in (0, 1)}
    assert set(touched_layers(small_target, recipe)) == set(small_target.layers) | adaln
    assert len(touched_layers(small_target, recipe)) == len(small_target.layers) + 2


def test_one_integer_weight_serves_every_group_of_steps(small_target):
    """Ŵ = W diag(s) does not depend on the shift, so neither do its codes; only the biases have rows by group."""
    transforms = transforms_of(small_target)
    scale_only = {n: Transform(scale_C=t.scale_C) for n, t in transforms.items()}
    spec = QuantSpec(4, "per_channel", symmetric=False)
    for name in small_target.layers:
        shifted = effective_linear(small_target, name, transforms, frozenset())
        unshifted = effective_linear(small_target, name, scale_only, frozenset())
        codes = [quantize_weight(each.weight_OC, spec).codes_OC for each in (shifted, unshifted)]
        assert torch.equal(*codes)
        assert len(unshifted.bias.rows) == 1
    assert len(effective_linear(small_target, small_target.layers[0], transforms, frozenset()).bias.rows) == 2


def test_nothing_folded_is_the_layers_own_weight_in_float64(small_target):
    for name in small_target.layers:
        found = effective_linear(small_target, name, {}, frozenset())
        assert torch.equal(found.weight_OC, small_target.module(name).weight.double())
        assert torch.equal(found.bias.at(None), small_target.module(name).bias.double())
