"""DuQuant's dual rotation (Lin et al. 2024, arXiv:2406.01721): X → X · blockdiag(R₁) · P · blockdiag(R₂), fitted on tokens.

A rotation that is aimed: the g × g matrix whose row 0 is (1, …, 1)/√g spreads a value in channel 0 over its whole block.
With rows and columns 0 and d swapped it does so for channel d. Greedily, the channel that holds the largest |x| is
spread, step after step; then a permutation deals the channels over the blocks, so that all blocks are alike, and a
second greedy run follows. One g × g matrix serves all blocks.

    paper   here             meaning
    2^n     block_size       g: the largest divisor of C that is at most this (128)
    N       steps            256 greedy steps, of which the best prefix is kept
    R̃       base_rotation    a product of g − 1 Givens rotations
    Q       a random orthogonal matrix on channels 1 … g − 1, drawn once per greedy run
    P       snake_order      zigzag permutation

Departs from the released code: the channel of the extreme value is its column (there: its row number modulo g);
P deals over C / g blocks whatever C is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditbench.harness.quant.transforms import Permutation, Rotation


class BlockRotation(Rotation):
    """x · blockdiag(R, …, R), R orthogonal (g, g). Kept in float64, so that it stays orthogonal to 1e-15."""

    matrix_gg: Tensor

    def __init__(self, size: int, matrix_gg: Tensor) -> None:
        super().__init__()
        if size % len(matrix_gg):
            raise ValueError(f"rotation blocks of {len(matrix_gg)} do not fit C={size}")
        self.size = size
        self.register_buffer("matrix_gg", matrix_gg)

    def forward(self, x: Tensor) -> Tensor:
        return (x.unflatten(-1, (-1, len(self.matrix_gg))) @ self.matrix_gg.to(x.dtype)).flatten(-2)

    def factors(self) -> tuple[None, Tensor, Tensor]:
        return None, self.matrix_gg.new_ones(1, 1), self.matrix_gg


@dataclass(frozen=True)
class Dual:
    """first_gg, second_gg: float64 (g, g); order_C: int64, the permutation between them. All on the device of the tokens; in
    a state on the CPU.
    """

    first_gg: Tensor
    order_C: Tensor
    second_gg: Tensor

    def rotations(self) -> tuple[Rotation, ...]:
        size = len(self.order_C)
        return BlockRotation(size, self.first_gg), Permutation(self.order_C), BlockRotation(size, self.second_gg)

    def state(self, name: str) -> dict[str, Tensor]:
        return {f"{name}/dual/{part}": value.cpu() for part, value in vars(self).items()}

    @staticmethod
    def from_state(name: str, state: dict[str, Tensor]) -> Dual:
        return Dual(*(state[f"{name}/dual/{part}"] for part in ("first_gg", "order_C", "second_gg")))


def dual_rotation(x_NC: Tensor, block_size: int, steps: int, generator: torch.Generator) -> Dual:
    """Fit on a sample of tokens."""
    width = x_NC.shape[-1]
    g = block_width(width, block_size)
    first_gg = greedy_rotation(x_NC, g, steps, generator)
    rotated_NC = BlockRotation(width, first_gg)(x_NC)
    order_C = snake_order(rotated_NC.abs().amax(0), g)
    return Dual(first_gg, order_C, greedy_rotation(rotated_NC[:, order_C], g, steps, generator))


def block_width(channels: int, block_size: int) -> int:
    """The largest divisor of the width that is at most block_size."""
    return max(size for size in range(1, min(block_size, channels) + 1) if channels % size == 0)


def greedy_rotation(x_NC: Tensor, g: int, steps: int, generator: torch.Generator) -> Tensor:
    """R (g, g): the prefix of at most `steps` aimed rotations after which max − min over all blocks is least."""
    drawn_gg = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), _random(g - 1, generator))
    aimed_gg = base_rotation(g).to(x_NC.device) @ drawn_gg.to(x_NC.device)
    x_Ng = x_NC.reshape(-1, g).float()  # only chooses; the matrix itself is a product in float64
    product_gg = torch.eye(g, dtype=torch.float64, device=x_NC.device)
    best_gg, best_peak = product_gg, float("inf")
    for remaining in range(steps, -1, -1):
        low_g, high_g = x_Ng.amin(0), x_Ng.amax(0)  # over rows, aminmax takes 20 times as long
        peak = float(high_g.max() - low_g.min())
        if peak < best_peak:
            best_gg, best_peak = product_gg, peak
        if remaining == 0:
            break
        channel = int(torch.maximum(high_g, -low_g).argmax())
        swap = torch.arange(g, device=x_NC.device)
        swap[0], swap[channel] = channel, 0
        step_gg = aimed_gg[swap][:, swap]
        x_Ng, product_gg = x_Ng @ step_gg.float(), product_gg @ step_gg
    return best_gg


def base_rotation(g: int) -> Tensor:
    """R̃, float64: Givens rotations in the planes (0, 1), (1, 2), … with angles that leave 1/√g in every entry of row 0."""
    product_gg = torch.eye(g, dtype=torch.float64)
    for i in range(g - 1):
        cosine = (g - i) ** -0.5
        sine = (1 - cosine**2) ** 0.5
        plane = torch.tensor([[cosine, sine], [-sine, cosine]], dtype=torch.float64)
        product_gg[:, i : i + 2] = product_gg[:, i : i + 2] @ plane
    return product_gg


def snake_order(absmax_C: Tensor, g: int) -> Tensor:
    """Channels by falling absmax, dealt over the C / g blocks forth and back: block 0, 1, …, K−1, K−1, …, 1, 0, 0, …"""
    dealt_gK = absmax_C.argsort(descending=True, stable=True).reshape(g, -1)
    dealt_gK[1::2] = dealt_gK[1::2].flip(1)
    return dealt_gK.T.flatten()


def _random(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, drawn and made orthogonal on the CPU: a factorization's signs are its library's."""
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
