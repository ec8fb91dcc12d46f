"""The conformance checks themselves: each catches the fault that it is there for."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting import conformance, registry
from ditbench.harness.fitting.conformance import Case, Nonconforming, check_methods
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.steps import StepTable
from ditbench.harness.quant.transforms import Rotation, Transform
from ditbench.methods import rtn

FIRST = "transformer_blocks.0.attn1.to_q"


def method(**parts) -> SimpleNamespace:
    """RTN with some of its parts replaced."""
    return SimpleNamespace(
        **{"__doc__": "A test's method.", "Params": rtn.Params, "fit": rtn.fit, "apply": rtn.apply} | parts
    )


def with_layer(name: str, change) -> SimpleNamespace:
    """RTN, with change(recipe) for one of its layers."""

    def apply(target, state, bits, params):
        recipe = rtn.apply(target, state, bits, params)
        return replace(recipe, layers=recipe.layers | {name: change(recipe.layers[name])})

    return method(apply=apply)


class Stretch(Rotation):
    """Not orthogonal."""

    size = 48

    def forward(self, x):
        return x * 1.01


def mutating_fit(target, calibration, bits, params):
    target.module(FIRST).weight.mul_(1.001)
    return {}


def seeding_fit(target, calibration, bits, params):
    torch.manual_seed(0)
    return {}


def drawing_fit(target, calibration, bits, params):
    return {"signs": torch.randn(3)}


def unguarded_apply(target, state, bits, params):
    """Divides by the range of each channel, a dead one included."""
    site = target.sites[0]
    shared = Transform(scale_C=state["range"])
    return ModelRecipe({name: LayerRecipe(shared) for name in site.consumers}, frozenset({site.name}))


def unguarded_fit(target, calibration, bits, params):
    from ditbench.harness.calibration.channel_statistics import channel_stats

    return {"range": channel_stats(target, calibration)[FIRST].absmax_C}


def blind_to_bits(target, state, bits, params):
    return rtn.apply(target, state, conformance.DYNAMIC, params)


def twice_too_large(layer: LayerRecipe) -> LayerRecipe:
    return replace(layer, weight=replace(layer.weight, scale_OG=4 * layer.weight.scale_OG))


def without_num_steps(target, state, bits, params):
    shared = Transform(StepTable(torch.ones(2, 48), torch.tensor([0, 0, 1])))
    return ModelRecipe({name: LayerRecipe(shared) for name in target.sites[0].consumers})


counter = itertools.count()
BROKEN = {
    "a transform that is not exact": (
        with_layer(FIRST, lambda layer: replace(layer, transform=Transform(rotations=(Stretch(),)))),
        conformance.transforms_are_exact,
        "relative error .* expected < 1e-10",
    ),
    "tables by step without their number": (
        method(apply=without_num_steps),
        conformance.transforms_are_exact,
        "num_steps=None",
    ),
    "rounding at 16 bits": (method(apply=blind_to_bits), conformance.sixteen_bits_change_nothing, "at W16A16"),
    "a wrong scale": (
        with_layer(FIRST.replace("attn1.to_q", "ff.net.2"), twice_too_large),
        conformance.eight_bits_come_close,
        "expected < 0.2",
    ),
    "a state that is not tensors": (
        method(fit=lambda *_: {"strength": 0.5}),
        conformance.state_survives_a_fresh_process,
        r"state\['strength'\] of fit is a float",
    ),
    "a changed model": (
        method(fit=mutating_fit),
        conformance.model_and_random_state_are_left_alone,
        "model passed in was changed",
    ),
    "the global random state drawn from": (
        method(fit=drawing_fit),
        conformance.model_and_random_state_are_left_alone,
        "global random state was changed",
    ),
    "the global random state seeded": (
        method(fit=seeding_fit),
        conformance.model_and_random_state_are_left_alone,
        "global random state was changed",
    ),
    "a fit that differs from time to time": (
        method(fit=lambda *_: {"count": torch.tensor(next(counter))}),
        conformance.fitting_twice_is_the_same,
        "two fits .* differ",
    ),
    "a division by a dead channel": (
        method(fit=unguarded_fit, apply=unguarded_apply),
        conformance.ugly_channels_are_borne,
        "finite",
    ),
    "a layer skipped in silence": (
        with_layer(FIRST, lambda layer: replace(layer, weight=None)),
        conformance.every_layer_is_accounted_for,
        FIRST,
    ),
}


@pytest.fixture
def register(monkeypatch):
    def put(module) -> Case:
        monkeypatch.setattr(registry, "known_methods", lambda: {"broken": module})
        return Case("broken")

    return put


@pytest.mark.parametrize("fault", BROKEN)
def test_a_fault_is_caught_by_the_check_that_is_there_for_it(fault, register):
    module, check, message = BROKEN[fault]
    random_state = torch.get_rng_state()
    with pytest.raises((Nonconforming, ValueError, UserError), match=message):
        check(register(module))
    torch.set_rng_state(random_state)


@pytest.mark.parametrize(
    "check", [c for c in conformance.CHECKS if "process" not in c.__name__], ids=lambda c: c.__name__
)
def test_the_method_that_the_broken_ones_are_made_from_passes(check, register):
    check(register(method()))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"apply": lambda *_: {}}, "method broken: apply returned a dict, expected a ModelRecipe"),
        ({"fit": lambda *_: None}, "method broken: fit returned a NoneType, expected tensors by name"),
    ],
)
def test_what_is_no_recipe_or_no_state_is_said_as_a_run_says_it(parts, words, monkeypatch, capsys):
    monkeypatch.setattr(registry, "known_methods", lambda: {"broken": method(**parts)})
    assert conformance.check_methods("broken") == 1
    said = capsys.readouterr().out
    assert words in said and "AttributeError" not in said and "UserError" not in said


def forgetful() -> SimpleNamespace:
    """Keeps in the process what belongs in the state."""
    kept: dict[str, float] = {}

    def fit(target, calibration, bits, params):
        kept["scale"] = 2.0
        return {}

    def apply(target, state, bits, params):
        scale = Transform(scale_C=torch.full((48,), kept.get("scale", 1.0)).scatter(0, torch.tensor([3]), 0.1))
        recipe = rtn.apply(target, state, bits, params)
        return rtn.nearest(target, bits, state, {FIRST: scale}) if "scale" in kept else recipe

    return method(fit=fit, apply=apply)


def test_a_state_that_leaves_something_out_is_caught(register, monkeypatch):
    """The other process is played by a second copy of the module, which has fitted nothing."""

    def run(command, **unused):
        name, folder, seed, scope = command[3:]
        monkeypatch.setattr(registry, "known_methods", lambda: {"broken": forgetful()})
        conformance.apply_saved(name, folder, int(seed), scope)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(conformance, "subprocess", SimpleNamespace(run=run))
    with pytest.raises(Nonconforming, match="outputs differ .* after saving"):
        conformance.state_survives_a_fresh_process(register(forgetful()))


def test_a_fresh_process_that_fails_is_reported_with_its_last_line(register, monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="Traceback\nKeyError: 'scale'\n")
    monkeypatch.setattr(conformance, "subprocess", SimpleNamespace(run=lambda *_, **__: failed))
    with pytest.raises(Nonconforming, match="KeyError: 'scale'"):
        conformance.state_survives_a_fresh_process(register(method()))


def test_a_layer_may_stay_in_float_if_the_method_says_so(register):
    module = BROKEN["a layer skipped in silence"][0]
    conformance.every_layer_is_accounted_for(
        register(SimpleNamespace(**vars(module), LEAVES_IN_FLOAT=r"0\.attn1\.to_q$"))
    )
    with pytest.raises(Nonconforming):
        conformance.every_layer_is_accounted_for(register(SimpleNamespace(**vars(module), LEAVES_IN_FLOAT=r"to_k$")))


def test_the_command_names_the_failed_check_and_its_exit_code_says_so(register, monkeypatch, capsys):
    checks = (conformance.transforms_are_exact, conformance.every_layer_is_accounted_for)
    monkeypatch.setattr(conformance, "CHECKS", checks)
    register(BROKEN["a layer skipped in silence"][0])
    assert check_methods("broken") == 1
    printed = capsys.readouterr().out
    assert "broken: A test's method." in printed
    assert "ok    Before rounding the output is the float model's" in printed
    assert "FAIL  Each layer has both sides quantized" in printed and FIRST in printed
    register(method())
    assert check_methods("all") == 0
