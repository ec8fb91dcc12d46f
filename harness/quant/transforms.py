"""Invertible input transforms: x' = ((x − shift) / scale) · R, with W' = W · diag(scale) · R⁻ᵀ and b' = b + W · shift.

The output of the layer is unchanged until something is rounded. `R` is a product of maps, orthogonal ones (R⁻ᵀ = R: permutations,
Hadamard and block-Hadamard rotations) and invertible ones (a Kronecker product); `shift` may depend on the denoising step; `scale` does not, so that there is one
integer weight for all steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditbench.harness.quant import hadamard as orders
from ditbench.harness.quant.steps import StepTable


class Rotation(nn.Module):
    """An orthogonal map of the channel axis: forward(x) = x · R."""

    size: int

    def matrix(self) -> Tensor:
        """R, float64 (C, C)."""
        device = next((buffer.device for buffer in self.buffers()), None)
        return self(torch.eye(self.size, dtype=torch.float64, device=device))

    def of_weight(self, weight_OC: Tensor) -> Tensor:
        """W · R⁻ᵀ, which is W · R of an orthogonal map."""
        return self(weight_OC)

    def factors(self) -> tuple[Tensor | None, Tensor, Tensor] | None:
        """(signs_C, L, R) of a map that is diag(signs) · blockdiag(L ⊗ R, …), for who computes it another way."""
        return None


class Permutation(Rotation):
    """(x · P)_j = x_{order[j]}."""

    order_C: Tensor

    def __init__(self, order_C: Tensor) -> None:
        super().__init__()
        if not torch.equal(order_C.sort().values, torch.arange(len(order_C), device=order_C.device)):
            raise ValueError("a permutation names every channel exactly once")
        self.size = len(order_C)
        self.register_buffer("order_C", order_C)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.order_C)


class Hadamard(Rotation):
    """x · diag(signs) · H / √m in blocks of m channels; m = C when C is an admissible order.

    Fallback, when C is not: the largest admissible divisor of C as block size (block-diagonal Hadamard). Each block is
    applied as H_a ⊗ H_b with a·b = m, which costs a + b multiply-adds per channel instead of m.

    Args:
        signs_C: ±1 per channel (randomised Hadamard), or None for the plain one.
        block_size: m; must divide C and be admissible.
    """

    signs_C: Tensor | None
    left_aa: Tensor
    right_bb: Tensor

    def __init__(self, size: int, signs_C: Tensor | None = None, block_size: int | None = None) -> None:
        super().__init__()
        block_size = block_size or orders.largest_admissible_divisor(size)
        if size % block_size or not orders.is_admissible(block_size):
            usable = [m for m in range(2, size + 1) if size % m == 0 and orders.is_admissible(m)]
            raise ValueError(f"Hadamard blocks of {block_size} do not fit C={size}; usable: {usable}")
        self.size, self.block_size = size, block_size
        a, b = orders.balanced_factors(block_size)
        self.register_buffer("signs_C", None if signs_C is None else signs_C.to(torch.int8))
        # Constants that anyone can build again: not part of what has to be stored.
        self.register_buffer("left_aa", orders.orthonormal(a), persistent=False)
        self.register_buffer("right_bb", orders.orthonormal(b), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.signs_C is not None:
            x = x * self.signs_C.to(x.dtype)
        return _in_blocks(x, self.left_aa, self.right_bb)

    def factors(self) -> tuple[Tensor | None, Tensor, Tensor]:
        return self.signs_C, self.left_aa, self.right_bb


class RegularHadamard(Rotation):
    """x · H / √m in blocks of m channels, H a regular Hadamard matrix: all its rows and columns have the sum √m, so that what is the
    same in all channels stays spread (ConvRot, arXiv:2512.03673). A class of its own, since kernels build Sylvester's and Paley's.

    Raises:
        ValueError: block_size is no power of four, or does not divide the size.
    """

    left_aa: Tensor
    right_bb: Tensor

    def __init__(self, size: int, block_size: int) -> None:
        super().__init__()
        if block_size < 1 or size % block_size or orders.largest_power_of_four(block_size, block_size) != block_size:
            usable = orders.largest_power_of_four(size, size)
            raise ValueError(
                f"regular Hadamard blocks of {block_size} do not fit C={size}; powers of four up to {usable} do"
            )
        self.size, self.block_size = size, block_size
        a = orders.largest_power_of_four(block_size, int(block_size**0.5))
        for name, order in (("left_aa", a), ("right_bb", block_size // a)):
            self.register_buffer(name, orders.regular(order) / order**0.5, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return _in_blocks(x, self.left_aa, self.right_bb)

    def factors(self) -> tuple[None, Tensor, Tensor]:
        return None, self.left_aa, self.right_bb


class KroneckerMap(Rotation):
    """x · (L ⊗ R) of two invertible matrices, which need not be orthogonal (FlatQuant, arXiv:2410.09426); weights take their inverse.

    Kept in float64, so that a weight meets the inverse of what its input meets.

    Raises:
        ValueError: a matrix that is not square, or not invertible.
    """

    left_aa: Tensor
    right_bb: Tensor

    def __init__(self, left_aa: Tensor, right_bb: Tensor) -> None:
        super().__init__()
        for matrix in (left_aa, right_bb):
            if (
                matrix.ndim != 2
                or matrix.shape[0] != matrix.shape[1]
                or not bool(torch.linalg.det(matrix.double()) != 0)
            ):
                raise ValueError(f"a Kronecker map takes square, invertible matrices, got one of {tuple(matrix.shape)}")
        self.size = len(left_aa) * len(right_bb)
        self.register_buffer("left_aa", left_aa)
        self.register_buffer("right_bb", right_bb)

    def forward(self, x: Tensor) -> Tensor:
        return _in_blocks(x, self.left_aa, self.right_bb)

    def factors(self) -> tuple[None, Tensor, Tensor]:
        return None, self.left_aa, self.right_bb

    def of_weight(self, weight_OC: Tensor) -> Tensor:
        return _in_blocks(weight_OC, *(torch.linalg.inv(each.double()).T for each in (self.left_aa, self.right_bb)))


def _in_blocks(x: Tensor, left_aa: Tensor, right_bb: Tensor) -> Tensor:
    """x · (left ⊗ right) in blocks of a · b channels."""
    left, right = left_aa.to(x.dtype), right_bb.to(x.dtype)
    blocks = x.reshape(*x.shape[:-1], -1, len(left), len(right))
    return (left.T @ (blocks @ right)).reshape(x.shape)


class Transform(nn.Module):
    """x' = ((x − shift) / scale) · R₁ · R₂ …, any part may be missing.

    Args:
        shift: table of rows (G, C); subtracted.
        scale_C: > 0; divided by.
        rotations: applied in order.
    """

    def __init__(
        self,
        shift: StepTable | None = None,
        scale_C: Tensor | None = None,
        rotations: tuple[Rotation, ...] = (),
    ) -> None:
        super().__init__()
        if scale_C is not None and not bool((scale_C > 0).all() and scale_C.isfinite().all()):
            raise ValueError("a channel scale must be finite and > 0")
        self.shift = shift
        self.register_buffer("scale_C", scale_C)
        self.rotations = nn.ModuleList(rotations)

    scale_C: Tensor | None

    @property
    def is_identity(self) -> bool:
        return self.shift is None and self.scale_C is None and not self.rotations

    def shift_and_scale_only(self) -> Transform:
        return Transform(self.shift, self.scale_C)

    def rotations_only(self) -> Transform:
        return Transform(rotations=tuple(self.rotations))  # type: ignore[arg-type]

    def forward(self, x: Tensor, step: Tensor | None = None) -> Tensor:
        x = self.moved(x, step)
        for rotation in self.rotations:
            x = rotation(x)
        return x

    def moved(self, x: Tensor, step: Tensor | None = None) -> Tensor:
        """(x − shift) / scale."""
        if self.shift is not None:
            x = x - self.shift.at(step).to(x.dtype)
        if self.scale_C is not None:
            x = x / self.scale_C.to(x.dtype)
        return x

    def of_weight(self, weight_OC: Tensor) -> Tensor:
        """W · diag(scale) · R⁻ᵀ."""
        if self.scale_C is not None:
            weight_OC = weight_OC * self.scale_C.to(weight_OC.dtype)
        for rotation in self.rotations:
            weight_OC = rotation.of_weight(weight_OC)  # type: ignore[operator]
        return weight_OC

    def of_bias(self, bias_O: Tensor | None, weight_OC: Tensor) -> StepTable | None:
        """b + W · shift, one row per group of steps; W is the untransformed weight."""
        constant = None if bias_O is None else StepTable.constant(bias_O)
        if self.shift is None:
            return constant
        moved = self.shift.map(lambda rows_GC: rows_GC.to(weight_OC.dtype) @ weight_OC.T)
        return moved if constant is None else moved.combine(constant, torch.add)


def random_signs(size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8) * 2 - 1
