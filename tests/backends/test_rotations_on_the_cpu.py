"""Rotations by our own kernel: the map that the matrix says, row by row, and codes of its result as of any other rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ditbench.harness.backends import simulate, vnni
from ditbench.harness.backends.rotations import transformed
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight, static_quant
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.rotations import BlockRotation
from ditbench.harness.quant.spec import QuantSpec
from ditbench.harness.quant.steps import StepTable
from ditbench.harness.quant.transforms import (
    Hadamard,
    KroneckerMap,
    Permutation,
    RegularHadamard,
    Rotation,
    Transform,
    random_signs,
)

pytestmark = pytest.mark.skipif(vnni.cpu_lacks() is not None, reason=str(vnni.cpu_lacks()))


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def signs(size: int) -> Tensor:
    return random_signs(size, torch.Generator().manual_seed(1))


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(drawn(size, size, dtype=torch.float64)).Q


ROTATIONS: dict[str, Rotation] = {
    "Hadamard, 96 = 8 · 12": Hadamard(96, signs(96)),
    "Hadamard, 1152 = 32 · 36": Hadamard(1152, signs(1152)),
    "Hadamard, 4608 = 64 · 72": Hadamard(4608, signs(4608)),
    "Hadamard without signs": Hadamard(256),
    "Hadamard in blocks": Hadamard(184, signs(184), block_size=4),
    "one block of two": Hadamard(2),
    "regular Hadamard in blocks": RegularHadamard(192, 64),
    "Kronecker map": KroneckerMap(drawn(5, 5, dtype=torch.float64), drawn(17, 17, dtype=torch.float64)),
    "one matrix for all blocks": BlockRotation(144, orthogonal(72)),
    "one matrix of odd width": BlockRotation(21, orthogonal(7)),
    "a matrix for torch": BlockRotation(300, orthogonal(300)),
}


def only(*rotations: Rotation) -> Transform:
    return Transform(rotations=rotations).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROTATIONS)
def test_it_is_the_map_that_the_matrix_says(name, dtype):
    rotation = ROTATIONS[name]
    x = drawn(2, 3, rotation.size).to(dtype)
    y, exact = transformed(only(rotation), x, None), x.double() @ rotation.matrix()
    assert y.dtype == torch.float32 and y.shape == x.shape
    assert (y - exact).norm() < 1e-6 * exact.norm()


def test_shift_and_scale_come_before_and_rotations_follow_each_other():
    scale_C, order_C = drawn(48, seed=2).abs() + 0.5, torch.randperm(48)
    shift = StepTable(drawn(2, 48, seed=3), torch.tensor([0, 1]))
    rotations = (Hadamard(48, signs(48)), Permutation(order_C), BlockRotation(48, orthogonal(16)))
    transform, x = Transform(shift, scale_C, rotations).float(), drawn(7, 48).bfloat16()
    y = transformed(transform, x, torch.tensor(1))
    exact = Transform(shift, scale_C, rotations)(x.double(), torch.tensor(1))
    assert (y - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("name", ROTATIONS)
def test_a_row_alone_has_the_bits_that_it_has_among_others(name):
    rotation = ROTATIONS[name]
    if name == "a matrix for torch":
        pytest.skip("its sums are torch's")
    x = drawn(37, rotation.size)
    y = transformed(only(rotation), x, None)
    assert all(torch.equal(transformed(only(rotation), row, None), y[i]) for i, row in enumerate(x))


def test_float64_stays_and_what_learns_has_its_gradient():
    rotation, x = Hadamard(96, signs(96)), drawn(4, 96, dtype=torch.float64)
    assert torch.equal(transformed(Transform(rotations=(rotation,)), x, None), rotation(x))
    learns = drawn(4, 96).requires_grad_()
    transformed(only(rotation), learns, None).square().sum().backward()
    assert torch.allclose(learns.grad, 2 * learns, atol=1e-5)  # a rotation keeps lengths


ACTS = {
    "per token": ActQuant(QuantSpec(8, "per_token", dynamic=True)),
    "asymmetric, 4 bits": ActQuant(QuantSpec(4, "per_token", symmetric=False, dynamic=True)),
    "groups": ActQuant(QuantSpec(8, "per_group", dynamic=True, group_size=24)),
    "per sample": ActQuant(QuantSpec(8, "per_tensor", dynamic=True)),
    "static": static_quant(
        *(StepTable.constant(torch.tensor(end)) for end in (-2.0, 3.0)), QuantSpec(8, "per_tensor", symmetric=False)
    ),
}


@pytest.mark.parametrize("branch", [False, True], ids=["", "branch"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_of_what_was_rotated_are_the_simulated_ones(act, branch, dtype):
    recipe = LayerRecipe(weight=quantize_weight(drawn(20, 96, seed=4), QuantSpec(8, "per_channel")), act=ACTS[act])
    transform = only(Hadamard(96, signs(96)))
    integer, simulated = (backend.make_kernel(recipe, drawn(20, 96, seed=4)) for backend in (vnni, simulate))
    x = drawn(2, 33, 96, seed=5).to(dtype)
    moved = transformed(transform, x, None)
    rows = integer.rows(x, None, transform, keep=branch)
    assert torch.equal(integer.product(rows.codes, x.shape, None, torch.float32), simulated(moved, None))
    assert torch.equal(rows.kept, moved) if branch else rows.kept is None


def test_a_token_with_nan_is_nan_and_no_other():
    recipe = LayerRecipe(weight=quantize_weight(drawn(4, 96), QuantSpec(8, "per_channel")), act=ACTS["per token"])
    x = drawn(3, 96)
    x[1, 5] = torch.nan
    y = vnni.make_kernel(recipe, drawn(4, 96)).layer(x, None, only(Hadamard(96)), None, None)
    assert y.isnan().all(1).tolist() == [False, True, False] and not y[::2].isnan().any()
