"""Low-rank branches (SVDQuant, Li et al. 2024, arXiv:2411.05007): W = up · down + residual, the residual for few bits.

    U S Vᵀ = SVD(W) in float64,   up = U_r S_r,   down = V_rᵀ,   both rounded to 16 bits,   residual = W − up · down

The residual is taken from the rounded factors, so that up · down + residual = W whatever their rounding. With exact
factors ‖residual‖² = Σ_{i>r} σ_i² (Eckart–Young). Layers that read the same input may share `down`: their weights are
stacked (M rows in all), and each keeps its own rows of `up`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ditbench.harness.quant.recipe import LowRank, to_device

FACTOR_DTYPE = torch.bfloat16  # what models are built in: the factors lose nothing there


@dataclass(frozen=True)
class Split:
    """W = up_Mr · down_rC + residual_MC; the factors in 16 bits, the residual in float64."""

    down_rC: Tensor
    up_Mr: Tensor
    residual_MC: Tensor

    @property
    def rank(self) -> int:
        return len(self.down_rC)


def capped_rank(weight_MC: Tensor, rank: int) -> int:
    """rank, but at most half of what the weight could have: beyond that the branch outweighs the layer."""
    return min(rank, min(weight_MC.shape) // 2)


def split(
    weight_MC: Tensor, rank: int, *, without_MC: Tensor | None = None, dtype: torch.dtype = FACTOR_DTYPE
) -> Split:
    """The best branch of a rank for weight − without, and what it leaves of the weight.

    without_MC: what the rounded residual represents already (`refine`); nothing by default.
    """
    weight_MC = weight_MC.double()
    wanted_MC = weight_MC if without_MC is None else weight_MC - without_MC.double()
    down_rC, up_Mr = leading_factors(wanted_MC, rank)
    down_rC, up_Mr = down_rC.to(dtype).contiguous(), up_Mr.to(dtype).contiguous()
    return Split(down_rC, up_Mr, residual(weight_MC, LowRank(down_rC, up_Mr)))


def leading_factors(weight_MC: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """V_rᵀ (r, C) and U_r S_r (M, r), float64.

    From the eigenvectors of the smaller Gram matrix, many times faster than the whole SVD. What that loses, relative
    precision of singular values below √eps of the largest, is far below the factors' own 16 bits.
    """
    if rank == 0:
        return weight_MC[:0], weight_MC[:, :0]
    if weight_MC.shape[0] >= weight_MC.shape[1]:
        right_Cr = _leading_eigenvectors(weight_MC.T @ weight_MC, rank)
        return right_Cr.T, weight_MC @ right_Cr
    left_Mr = _leading_eigenvectors(weight_MC @ weight_MC.T, rank)
    scaled_rC = left_Mr.T @ weight_MC
    singular_r1 = scaled_rC.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return scaled_rC / singular_r1, left_Mr * singular_r1.T


def _leading_eigenvectors(gram_CC: Tensor, rank: int) -> Tensor:
    """(C, r), the largest eigenvalue first."""
    return torch.linalg.eigh(gram_CC).eigenvectors[:, -rank:].flip(1)


def residual(weight_OC: Tensor, branch: LowRank | None) -> Tensor:
    """What a branch, as rounded, leaves of the weight; float64, on the weight's device."""
    weight_OC = weight_OC.double()
    if branch is None:
        return weight_OC
    branch = to_device(branch, weight_OC.device)
    return weight_OC - branch.up_Or.double() @ branch.down_rC.double()


def refine(
    weight_MC: Tensor,
    rank: int,
    round_residual: Callable[[Tensor], Tensor],
    error: Callable[[Tensor, Tensor], float],
    *,
    iterations: int,
    dtype: torch.dtype = FACTOR_DTYPE,
) -> tuple[Split, list[float]]:
    """Branch and rounded residual fitted in turn, up to the first increase of the error.

    round_residual(residual_MC) → its values after rounding; error(residual_MC, rounded_MC) → that of the layer's output.
    Returns the best split, and the errors of the iterations that were kept.
    """
    best = split(weight_MC, rank, dtype=dtype)
    rounded_MC = round_residual(best.residual_MC)
    errors = [error(best.residual_MC, rounded_MC)]
    for _ in range(iterations - 1):
        candidate = split(weight_MC, rank, without_MC=rounded_MC, dtype=dtype)
        rounded_MC = round_residual(candidate.residual_MC)
        found = error(candidate.residual_MC, rounded_MC)
        if found > errors[-1]:
            break
        best = candidate
        errors.append(found)
    return best, errors


def output_error(x_TC: Tensor, rounded_x_TC: Tensor, residual_MC: Tensor, rounded_MC: Tensor) -> float:
    """‖X Wᵀ − (X Lᵀ + Q(X) Q(R)ᵀ)‖², where W − L = R."""
    return float((x_TC @ residual_MC.T - rounded_x_TC @ rounded_MC.to(rounded_x_TC.dtype).T).square().sum())


def branches(names: tuple[str, ...], parts: Split, rows: list[int]) -> dict[str, LowRank]:
    """One branch per layer from the split of their stacked weights, on the CPU; `down` is one tensor for all."""
    down_rC, ups = parts.down_rC.cpu(), parts.up_Mr.cpu().split(rows)
    return {name: LowRank(down_rC, up_Or.clone()) for name, up_Or in zip(names, ups, strict=True)}
