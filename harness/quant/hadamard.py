"""Hadamard matrices of order K·2^k, built rather than tabulated.

Sylvester's doubling gives the powers of two; Paley's two constructions over GF(p) and GF(p²) give
K = q + 1 (q ≡ 3 mod 4) and K = 2(q + 1) (q ≡ 1 mod 4), q a prime or the square of one: 12, 20, 28, 36, 52, 60, 108, 140, …
That covers the widths of today's DiTs (96 = 12·2³, 1152 = 36·2⁵, 3072 = 12·2⁸, 4608 = 36·2⁷, 5120 = 20·2⁸, 13824 = 108·2⁷).
Orders that need other constructions (156, 172) count as not admissible here and take the block fallback.

Regular ones, whose rows and columns all sum to √order, are built for powers of four, as Kronecker powers of one of order 4.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

LARGEST_PALEY = 256


@cache
def hadamard(order: int) -> Tensor:
    """H with entries ±1 and H Hᵀ = order · I, float64.

    Raises:
        ValueError: the order is not admissible; see `largest_admissible_divisor`.
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    paley = _paley(order)
    if paley is not None:
        return paley
    if order % 2 == 0 and is_admissible(order // 2):
        half = hadamard(order // 2)
        return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)], 0)
    raise ValueError(f"no Hadamard matrix of order {order} here; {largest_admissible_divisor(order)} divides it")


@cache
def orthonormal(order: int) -> Tensor:
    """H / √order, float64; the same tensor each time, not to be changed. Raises ValueError as `hadamard` does."""
    return hadamard(order) / order**0.5


REGULAR_4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


@cache
def regular(order: int) -> Tensor:
    """H with entries ±1, H Hᵀ = order · I, and √order the sum of every row and column, float64 (ConvRot, arXiv:2512.03673); the same
    tensor each time, not to be changed.

    Raises:
        ValueError: the order is no power of four.
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 4:
        raise ValueError(f"regular Hadamard matrices are built for powers of four here, got {order}")
    return torch.kron(torch.tensor(REGULAR_4, dtype=torch.float64), regular(order // 4))


def largest_power_of_four(width: int, most: int) -> int:
    """The largest power of four that divides the width and is at most `most`."""
    order = 1
    while 4 * order <= most and width % (4 * order) == 0:
        order *= 4
    return order


@cache
def is_admissible(order: int) -> bool:
    if order == 1:
        return True
    return order % 2 == 0 and (_paley_field(order) is not None or is_admissible(order // 2))


@cache
def largest_admissible_divisor(order: int) -> int:
    """The block size of the documented fallback: block-diagonal Hadamard with the largest admissible blocks."""
    return max(size for size in range(1, order + 1) if order % size == 0 and is_admissible(size))


def hadamard_blocks(width: int, wanted: int) -> tuple[int, int]:
    """`width` channels in about `wanted` equal blocks → (number of blocks, order of the Hadamard matrices in them).

    Fewer blocks where width / wanted has no Hadamard matrix; if no number of blocks has one, the blocks stay as they are
    and each is rotated in parts of the largest order that has one (184 = 8·23: 2 blocks of 92, rotated by 4).
    """
    fitting = [blocks for blocks in range(min(wanted, width), 0, -1) if width % blocks == 0]
    for blocks in fitting:
        if is_admissible(width // blocks):
            return blocks, width // blocks
    return fitting[0], largest_admissible_divisor(width // fitting[0])


@cache
def balanced_factors(order: int) -> tuple[int, int]:
    """(a, b) with a·b = order, both admissible, a + b least: H_a ⊗ H_b costs a + b multiply-adds per channel."""
    pairs = [
        (a, order // a)
        for a in range(1, order + 1)
        if order % a == 0 and is_admissible(a) and is_admissible(order // a)
    ]
    return min(pairs, key=lambda pair: (sum(pair), pair))


def _paley_field(order: int) -> tuple[int, int, int] | None:
    """(construction 1 or 2, p, degree) of the field that Paley's construction needs for this order."""
    if order > LARGEST_PALEY:
        return None
    for construction, size in ((1, order - 1), (2, order // 2 - 1)):
        root = round(size**0.5)
        for p, degree in ((size, 1), (root, 2)):
            if p**degree == size and p > 2 and _is_prime(p) and size % 4 == (3 if construction == 1 else 1):
                return construction, p, degree
    return None


def _paley(order: int) -> Tensor | None:
    field = _paley_field(order)
    if field is None:
        return None
    construction, p, degree = field
    jacobsthal = _jacobsthal(p, degree)
    size = len(jacobsthal)
    eye = torch.eye(size + 1, dtype=torch.float64)
    core = torch.zeros(size + 1, size + 1, dtype=torch.float64)
    core[0, 1:], core[1:, 1:] = 1, jacobsthal
    core[1:, 0] = -1 if construction == 1 else 1
    if construction == 1:
        return eye + core
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, plus) + torch.kron(eye, diagonal)


def _jacobsthal(p: int, degree: int) -> Tensor:
    """Q[a, b] = χ(a − b) over GF(p^degree), χ the quadratic character (1 square, −1 not, 0 at zero)."""
    elements: list[tuple[int, ...]]
    squares: set[tuple[int, ...]]
    if degree == 1:
        elements = [(a,) for a in range(p)]
        squares = {(a * a % p,) for a in range(1, p)}
    else:  # GF(p²) = GF(p)[i], i² = the least non-square n
        n = next(n for n in range(2, p) if all(a * a % p != n for a in range(p)))
        pairs = [(a, b) for a in range(p) for b in range(p)]
        elements = list(pairs)
        squares = {((a * a + n * b * b) % p, 2 * a * b % p) for a, b in pairs if (a, b) != (0, 0)}

    def character(x: tuple[int, ...], y: tuple[int, ...]) -> float:
        difference = tuple((a - b) % p for a, b in zip(x, y, strict=True))
        return 0.0 if not any(difference) else 1.0 if difference in squares else -1.0

    return torch.tensor([[character(x, y) for y in elements] for x in elements], dtype=torch.float64)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
