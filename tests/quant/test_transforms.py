from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ditbench.harness.quant.steps import StepTable
from ditbench.harness.quant.transforms import Hadamard, KroneckerMap, Permutation, Transform, random_signs

C = 48
GROUPS = torch.tensor([0, 0, 1, 2])


def parts(width: int = C):
    """The pieces that transforms are made of, none of them trivial."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(3, width, generator=generator, dtype=torch.float64)
    return {
        "shift": StepTable(rows, GROUPS),
        "scale": (0.5 * torch.randn(width, generator=generator, dtype=torch.float64)).exp(),
        "permutation": Permutation(torch.randperm(width, generator=generator)),
        "hadamard": Hadamard(width, random_signs(width, generator)),
        "blocks": Hadamard(width, random_signs(width, generator), block_size=12),
    }


def combination(names: str) -> Transform:
    found = parts()
    chosen = names.split("+")
    return Transform(
        found["shift"] if "shift" in chosen else None,
        found["scale"] if "scale" in chosen else None,
        tuple(found[name] for name in chosen if name not in ("shift", "scale")),
    )


COMBINATIONS = [
    "shift",
    "scale",
    "permutation",
    "hadamard",
    "blocks",
    "shift+scale",
    "scale+hadamard",
    "scale+permutation+blocks",
    "shift+scale+hadamard+permutation",
    "shift+scale+permutation+blocks+permutation",
]


@pytest.mark.parametrize("names", COMBINATIONS)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
def test_the_product_is_unchanged_at_every_step(names, with_bias, normal):
    transform = combination(names)
    x, weight = normal(2, 5, C), normal(7, C, seed=1)
    bias = normal(7, seed=2) if with_bias else None
    expected = torch.nn.functional.linear(x, weight, bias)
    moved = transform.of_bias(bias, weight)
    for step in range(4):
        y = transform(x, torch.tensor(step)) @ transform.of_weight(weight).T
        if moved is not None:
            y = y + moved.at(torch.tensor(step))
        assert float((y - expected).norm() / expected.norm()) < 1e-12


@pytest.mark.parametrize("names", COMBINATIONS)
def test_input_and_weight_follow_the_definition(names, normal):
    """x' = ((x − z) / s) R₁ R₂ …, W' = W diag(s) R₁ R₂ …, by matrices written out."""
    transform, found = combination(names), parts()
    chosen = names.split("+")
    rotation = torch.eye(C, dtype=torch.float64)
    for name in chosen:
        if name not in ("shift", "scale"):
            rotation = rotation @ found[name].matrix()
    scale = found["scale"] if "scale" in chosen else torch.ones(C, dtype=torch.float64)
    x, weight = normal(5, C), normal(7, C, seed=1)
    torch.testing.assert_close(transform.of_weight(weight), weight @ scale.diag() @ rotation, rtol=1e-12, atol=1e-12)
    for step, group in enumerate(GROUPS):
        shift = found["shift"].rows[group] if "shift" in chosen else torch.zeros(C)
        expected = ((x - shift) / scale) @ rotation
        torch.testing.assert_close(transform(x, torch.tensor(step)), expected, rtol=1e-12, atol=1e-12)


def test_a_shift_without_its_bias_is_another_function(normal):
    transform, x, weight = combination("shift"), normal(5, C), normal(7, C, seed=1)
    y = transform(x, torch.tensor(0)) @ transform.of_weight(weight).T
    assert float((y - x @ weight.T).norm() / (x @ weight.T).norm()) > 1e-3


def test_scaling_before_rotating_is_not_rotating_before_scaling(normal):
    x, found = normal(5, C), parts()
    scale_first = Transform(scale_C=found["scale"], rotations=(found["hadamard"],))
    assert not torch.allclose(scale_first(x), found["hadamard"](x) / found["scale"], rtol=1e-3)


def test_rotations_are_applied_in_the_order_given(normal):
    x, found = normal(5, C), parts()
    one, other = found["hadamard"], found["permutation"]
    forwards, backwards = Transform(rotations=(one, other)), Transform(rotations=(other, one))
    assert torch.equal(forwards(x), other(one(x)))
    assert not torch.allclose(forwards(x), backwards(x), rtol=1e-3)


@pytest.mark.parametrize(("width", "block"), [(8, None), (48, None), (48, 12)])
def test_a_randomised_rotation_turns_signs_first_and_then_as_the_plain_one(width, block):
    signs = random_signs(width, torch.Generator().manual_seed(3))
    assert 0 < int((signs == -1).sum()) < width
    plain = Hadamard(width, block_size=block).matrix()
    torch.testing.assert_close(Hadamard(width, signs, block).matrix(), signs.double().diag() @ plain)
    entries = plain[plain != 0].abs() * (block or width) ** 0.5
    torch.testing.assert_close(entries, torch.ones(width * (block or width), dtype=torch.float64))


def test_a_permutation_takes_each_channel_from_its_order(normal):
    x = normal(5, 4)
    assert torch.equal(Permutation(torch.tensor([2, 0, 3, 1]))(x), x[:, [2, 0, 3, 1]])


@pytest.mark.parametrize("order", [[0, 1, 1], [1, 2, 3], [0, 2]])
def test_a_permutation_names_every_channel_once(order):
    with pytest.raises(ValueError, match="exactly once"):
        Permutation(torch.tensor(order))


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_cannot_be_divided_by_is_refused(wrong):
    scale = torch.ones(C)
    scale[3] = wrong
    with pytest.raises(ValueError, match="finite and > 0"):
        Transform(scale_C=scale)


def test_the_two_halves_of_a_transform_make_the_whole(normal):
    transform, x = combination("shift+scale+hadamard+permutation"), normal(5, C)
    step = torch.tensor(2)
    halves = transform.rotations_only()(transform.shift_and_scale_only()(x, step))
    assert torch.equal(halves, transform(x, step))
    assert not transform.shift_and_scale_only().rotations and transform.rotations
    assert Transform().is_identity and not transform.is_identity


def test_nothing_in_a_transform_is_nothing_done(normal):
    x, weight, bias = normal(5, C), normal(7, C, seed=1), normal(7, seed=2)
    assert torch.equal(Transform()(x), x) and torch.equal(Transform().of_weight(weight), weight)
    moved = Transform().of_bias(bias, weight)
    assert moved is not None and torch.equal(moved.at(None), bias)
    assert Transform().of_bias(None, weight) is None


def test_random_signs_follow_the_generator_and_nothing_else():
    def draw(seed: int) -> Tensor:
        return random_signs(200, torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert 60 < int((draw(1) == 1).sum()) < 140


def test_a_kronecker_map_is_undone_by_the_weight(normal):
    """x (L ⊗ R) times W (L ⊗ R)⁻ᵀ is x Wᵀ, though neither matrix is orthogonal."""
    left, right = normal(3, 3), normal(4, 4, seed=1)
    transform = Transform(scale_C=normal(12, seed=2).exp(), rotations=(KroneckerMap(left, right),))
    x, weight = normal(5, 12, seed=3), normal(7, 12, seed=4)
    torch.testing.assert_close(transform.rotations[0](x), x @ torch.kron(left, right))
    torch.testing.assert_close(transform(x) @ transform.of_weight(weight).T, x @ weight.T, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("wrong", [torch.ones(3, 3), torch.ones(2, 3)], ids=["singular", "not square"])
def test_a_kronecker_map_that_cannot_be_undone_is_refused(wrong):
    with pytest.raises(ValueError, match="a Kronecker map takes square, invertible matrices"):
        KroneckerMap(torch.eye(2), wrong)
