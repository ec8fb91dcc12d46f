"""The questions that every method answers, asked of each of them."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest

from harness import methods
from harness.conformance import (
    CHECKS,
    fitting_twice_is_the_same,
    model_and_random_state_are_left_alone,
    transforms_are_exact,
)
from harness.errors import UserError

METHODS = list(methods.known_methods())


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


@pytest.mark.parametrize("name", METHODS)
def test_params_are_frozen_and_a_misspelt_one_is_refused(name):
    params = methods.method(name).Params()
    for field in fields(params):
        with pytest.raises(FrozenInstanceError):
            setattr(params, field.name, None)
    assert methods.params_of(methods.defaults(name)) == params
    with pytest.raises(UserError, match=f"no parameter of method {name} 'strenght'"):
        methods.params_of({"name": name, "strenght": 1})


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_is_in_one_line(name):
    assert 20 < len(methods.summary(name)) <= 160


def test_an_unknown_method_is_refused_with_a_guess():
    with pytest.raises(UserError, match="no method 'smothquant'; did you mean 'smoothquant'"):
        methods.method("smothquant")
