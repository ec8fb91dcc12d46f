"""Squared MMD of two sets of features, without bias whatever the design, and what each row contributes.

KID (Bińkowski et al. 2018, arXiv:1801.01401) takes the mean kernel of two different generated samples. If labels are balanced, a sample's
others hold its own label less often than two independent samples would: the mean over i ≠ j is then too small, by −0.78 at n = 64 on
the digits. Two independent samples of a model with balanced labels share the label a with probability π_a², so

    E k(x, x') = Σ_ab π_a π_b E k(x_a, x'_b),  estimated by the means over pairs i ≠ j of the strata a and b, π_a = m_a / n

which for one stratum is the libraries' U-statistic. It is quadratic in the samples, so the first two derivatives are all there is:

    φ_i = 2 (Σ_b π_b mean_{j in b, j ≠ i} k(x_i, x_j) − mean_r k(x_i, y_r)),  g_ij = 2 k(x_i, x_j)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ditbench.eval.influence import Influence, rows_of_pairs

KERNEL_ROWS = 2048  # rows of a kernel matrix held at once

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]  # rows (N, F) and (M, F) → (N, M)


@dataclass(frozen=True)
class Within:
    """Mean kernel of a sample with another one. by_design_N: another of the design's population; plain: another of these."""

    by_design_N: np.ndarray
    plain: float

    @property
    def by_design(self) -> float:
        return float(self.by_design_N.mean())


def cubic_kernel(x_NF: np.ndarray, y_MF: np.ndarray) -> np.ndarray:
    """KID's: (x·y / width + 1)³."""
    return (x_NF.astype(np.float64) @ y_MF.T.astype(np.float64) / x_NF.shape[1] + 1) ** 3


def within(x_NF: np.ndarray, strata_N: np.ndarray, kernel: Kernel = cubic_kernel) -> Within:
    """Of n ≥ 2 samples."""
    n = len(x_NF)
    member_NK = np.eye(strata_N.max() + 1)[strata_N]
    size_K = member_NK.sum(axis=0)
    by_design_N, total = np.empty(n), 0.0
    for start in range(0, n, KERNEL_ROWS):
        block = slice(start, min(start + KERNEL_ROWS, n))
        kernel_BN = kernel(x_NF[block], x_NF)
        own_B = kernel_BN[np.arange(len(kernel_BN)), np.arange(block.start, block.stop)]
        member_BK = member_NK[block]
        sums_BK = kernel_BN @ member_NK - own_B[:, None] * member_BK
        by_design_N[block] = (sums_BK / (size_K - member_BK)) @ (size_K / n)
        total += float(sums_BK.sum())
    return Within(by_design_N, total / (n * (n - 1)))


def across(x_NF: np.ndarray, y_MF: np.ndarray, kernel: Kernel = cubic_kernel) -> np.ndarray:
    """Mean kernel of each row of x with the rows of y, (N,)."""
    starts = range(0, len(x_NF), KERNEL_ROWS)
    return np.concatenate([kernel(x_NF[start : start + KERNEL_ROWS], y_MF).mean(axis=1) for start in starts])


def unbiased(inside: Within, generated_NF: np.ndarray, reference_MF: np.ndarray, kernel: Kernel) -> float:
    """MMD² by the design of the generated rows; the reference's rows are independent. inside: `within` of the generated rows."""
    reference = within(reference_MF, np.zeros(len(reference_MF), int), kernel).plain
    return inside.by_design + reference - 2 * float(across(generated_NF, reference_MF, kernel).mean())


def influence(generated_NF: np.ndarray, reference_MF: np.ndarray, inside: Within, kernel: Kernel) -> Influence:
    """Of the generated rows; the reference stays as it is. inside: `within` of the generated rows."""
    first_N = 2 * (inside.by_design_N - across(generated_NF, reference_MF, kernel))
    rows = rows_of_pairs(len(generated_NF))
    chosen_RF = generated_NF[rows]
    return Influence(first_N - first_N.mean(), 2 * kernel(chosen_RF, chosen_RF), rows)


def influence_of_pairs(x_NF: np.ndarray, y_NF: np.ndarray, kernel: Kernel) -> Influence:
    """Of pairs (x_i, y_i): mean of h_ij = k(x_i, x_j) + k(y_i, y_j) − k(x_i, y_j) − k(y_i, x_j)."""
    rows = rows_of_pairs(len(x_NF))
    first_N = 2 * (
        across(x_NF, x_NF, kernel)
        + across(y_NF, y_NF, kernel)
        - across(x_NF, y_NF, kernel)
        - across(y_NF, x_NF, kernel)
    )
    x_RF, y_RF = x_NF[rows], y_NF[rows]
    mixed_RR = kernel(x_RF, y_RF)
    second_RR = 2 * (kernel(x_RF, x_RF) + kernel(y_RF, y_RF) - mixed_RR - mixed_RR.T)
    return Influence(first_N - first_N.mean(), second_RR, rows)
