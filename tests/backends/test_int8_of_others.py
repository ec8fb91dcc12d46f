"""Other libraries' int8 products beside simulated execution, on the same codes and scales."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from ditbench.harness.backends import kitchen_int8, simulate, torchao_int8
from ditbench.harness.backends.base import choose
from ditbench.harness.common.errors import UserError
from ditbench.harness.measurement.latency import resident_bytes
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.spec import QuantSpec

CPU = torch.device("cpu")
WEIGHT, ACT = QuantSpec(8, "per_channel", True), QuantSpec(8, "per_token", True, True)
THEIRS = (torchao_int8, kitchen_int8)
everybody = pytest.mark.parametrize("backend", THEIRS, ids=lambda backend: backend.NAME)
whoever_is_here = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(each, id=each.NAME, marks=pytest.mark.skipif(each.lacks() is not None, reason=str(each.lacks())))
        for each in THEIRS
    ],
)


def recipe_of(normal, width: int = 96, outputs: int = 40, weight: QuantSpec = WEIGHT, act: QuantSpec = ACT, clip=1.0):
    return LayerRecipe(
        weight=quantize_weight(normal(outputs, width, seed=1).float(), weight), act=ActQuant(act, clip=clip)
    )


def both(backend, recipe: LayerRecipe, x: Tensor) -> tuple[Tensor, Tensor]:
    return (module.make_kernel(recipe, torch.empty(0))(x, None) for module in (backend, simulate))  # type: ignore[return-value]


@whoever_is_here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, width, outputs", [(1, 13, 7), (33, 96, 40), (20, 1152, 96)])
def test_it_is_simulated_execution_but_for_the_order_of_its_scales(backend, normal, tokens, width, outputs, dtype):
    theirs, ours = both(backend, recipe_of(normal, width, outputs), normal(2, tokens, width, seed=2).to(dtype))
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() <= 1e-6 * ours.abs().max()


@whoever_is_here
def test_codes_and_scales_are_all_that_is_held_and_move_with_it(backend, normal):
    kernel = backend.make_kernel(recipe_of(normal), torch.empty(0))
    assert resident_bytes(kernel) == 40 * 96 + 4 * 40
    other, x = copy.deepcopy(kernel), normal(3, 96).float()
    other.load_state_dict(kernel.state_dict())
    assert torch.equal(other(x, None), kernel(x, None))


@whoever_is_here
def test_a_row_of_zeros_stays_zero(backend, normal):
    x = normal(3, 96).float()
    x[1] = 0
    theirs, ours = both(backend, recipe_of(normal), x)
    assert not theirs[1].any() and not ours[1].any()


@everybody
def test_it_is_never_chosen_by_itself(backend, normal):
    assert choose(recipe_of(normal), CPU).NAME != backend.NAME


@everybody
@pytest.mark.parametrize(
    "weight, act",
    [
        (QuantSpec(4, "per_channel", True), ACT),
        (QuantSpec(8, "per_tensor", True), ACT),
        (QuantSpec(8, "per_channel", False), ACT),
        (WEIGHT, QuantSpec(8, "per_token", False, True)),
        (WEIGHT, QuantSpec(8, "per_tensor", True, True)),
    ],
)
def test_other_formats_are_refused_with_what_it_takes(backend, normal, weight, act):
    with pytest.raises(UserError, match=f"{backend.NAME} takes W8A8, symmetric"):
        choose(recipe_of(normal, weight=weight, act=act), CPU, backend.NAME)


def test_kitchen_has_no_clip(normal):
    with pytest.raises(
        UserError, match="kitchen_int8 quantizes tokens by their largest value; this layer keeps 0.9 of"
    ):
        choose(recipe_of(normal, clip=0.9), CPU, "kitchen_int8")
