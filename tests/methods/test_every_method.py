"""The questions that every method answers, asked of each of them."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

from ditbench.harness.build.build import build
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting import registry
from ditbench.harness.fitting.conformance import (
    CHECKS,
    fitting_twice_is_the_same,
    model_and_random_state_are_left_alone,
    relative_error,
    transforms_are_exact,
)
from ditbench.harness.quant.spec import QuantSpec, bits_of

METHODS = list(registry.known_methods())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_conforms(name, check, case_of, in_fresh_process):
    check(case_of(name))


@pytest.mark.parametrize(
    "check",
    [transforms_are_exact, model_and_random_state_are_left_alone, fitting_twice_is_the_same],
    ids=lambda check: check.__name__,
)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_conforms_with_every_layer_in_scope(name, check, case_of):
    """adaLN and the embedders are then quantized too: producers of a fold and consumers of a rounding at once."""
    check(case_of(name, "all"))


ABOUT_INTEGERS = {"flatquant", "lrq_dit", "ptq4dit", "ptq4dm", "q_diffusion", "repq"}
FP8 = bits_of("fp8")
FP8_STATIC = replace(FP8, act=QuantSpec(8, "per_tensor", number="e4m3"))


@pytest.mark.parametrize("bits", [FP8, FP8_STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_runs_in_fp8_or_refuses_it_in_one_line(name, bits, case_of):
    case = case_of(name)
    if name in ABOUT_INTEGERS:
        with pytest.raises(UserError, match=f"^{name} is about integer codes, and bits=fp8 has none"):
            registry.check_bits(name, bits)
        return
    if name == "q_dit" and not bits.act.dynamic:
        with pytest.raises(UserError, match="dynamic"):
            registry.check_bits(name, bits)
        return
    registry.check_bits(name, bits)
    recipe = case.recipe(bits)
    rounded = [layer for layer in recipe.layers.values() if layer.weight is not None]
    assert {side.spec.number for layer in rounded for side in (layer.weight, layer.act)} <= {"e4m3"}
    assert {layer.weight.codes_OC.dtype for layer in rounded} <= {torch.float8_e4m3fn}
    error = relative_error(case.output(build(case.target, recipe, dtype=torch.float32)), case.float_output)
    assert error < 0.1 and (error > 1e-3 or name == registry.FLOAT)


IN_BLOCKS = {label: bits_of(label) for label in ("nvfp4", "mxfp6", "fp8_block", "int4_g64", "wmxfp4_amxfp8")}
IN_BLOCKS["nvfp4 static"] = replace(IN_BLOCKS["nvfp4"], act=replace(IN_BLOCKS["nvfp4"].act, dynamic=False))
CHOOSE_GROUPS = {"q_dit"}


@pytest.mark.parametrize("label", IN_BLOCKS)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_runs_in_blocks_or_refuses_them_in_one_line(name, label, case_of):
    bits, case = IN_BLOCKS[label], case_of(name)
    if name in ABOUT_INTEGERS | CHOOSE_GROUPS:
        with pytest.raises(
            UserError, match=f"^{name} (is about integer codes|chooses the size of its groups)"
        ) as refused:
            registry.check_bits(name, bits)
        assert "\n" not in str(refused.value) and bits.weight.name.lower() in str(refused.value)
        return
    registry.check_bits(name, bits)
    recipe = case.recipe(bits)
    rounded = [layer for layer in recipe.layers.values() if layer.weight is not None]
    assert {layer.weight.spec for layer in rounded} <= {bits.weight}
    acts = {
        replace(layer.act.spec, symmetric=True) for layer in rounded
    }  # SVDQuant's behind a GELU are unsigned integers
    assert acts <= {bits.act} and (rounded or name == registry.FLOAT)
    error = relative_error(case.output(build(case.target, recipe, dtype=torch.float32)), case.float_output)
    assert error < 0.5 and (error > 1e-3 or name == registry.FLOAT)


@pytest.mark.parametrize("name", METHODS)
def test_params_are_frozen_and_a_misspelt_one_is_refused(name):
    params = registry.method(name).Params()
    for field in fields(params):
        with pytest.raises(FrozenInstanceError):
            setattr(params, field.name, None)
    assert registry.params_of(registry.defaults(name)) == params
    with pytest.raises(UserError, match=f"no parameter of method {name} 'strenght'"):
        registry.params_of({"name": name, "strenght": 1})


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_is_in_one_line(name):
    assert 20 < len(registry.summary(name)) <= 160


def test_an_unknown_method_is_refused_with_a_guess():
    with pytest.raises(UserError, match="no method 'smothquant'; did you mean 'smoothquant'"):
        registry.method("smothquant")
