"""Standard deviations of set metrics under resampling of the generated images; the reference stays as it is.

One estimate serves every library that computes the metric. Each formula is checked against the libraries' values in
tests/eval/test_resampling.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ditbench.eval.statistics import resampled_rows

WIDE = 512  # from here on one resample of a Fréchet distance takes seconds
FEW_RESAMPLES = 20
HALVES = 50
HALVES_METHOD = "value ± 1.96·sd over random halves of the generated rows (delete-half jackknife)"
KERNEL_ROWS = 2048  # rows of a kernel matrix held at once

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]  # rows (N, F) and (M, F) → (N, M)


def frechet_resamples(width: int, resamples: int) -> int:
    return resamples if width < WIDE else min(resamples, FEW_RESAMPLES)


def frechet(generated_NF: np.ndarray, reference_MF: np.ndarray) -> Callable[[np.ndarray], float]:
    """Rows of the generated set → their Fréchet distance to the reference.

    With cov_ref = A Aᵀ and X the centred rows, tr √(cov_ref cov_gen) = Σ singular values of X A / √(n − 1).
    """
    generated_NF, reference_MF = generated_NF.astype(np.float64), reference_MF.astype(np.float64)
    mean_F, cov_FF = reference_MF.mean(axis=0), np.cov(reference_MF, rowvar=False)
    eigenvalues_F, vectors_FF = np.linalg.eigh(cov_FF)
    projected_NF = generated_NF @ (vectors_FF * np.sqrt(eigenvalues_F.clip(min=0)))
    trace_ref = np.trace(cov_FF)

    def distance(rows: np.ndarray) -> float:
        features, projected = generated_NF[rows], projected_NF[rows]
        projected = projected - projected.mean(axis=0)
        gram = projected.T @ projected if len(rows) > projected.shape[1] else projected @ projected.T
        trace_root = np.sqrt(np.linalg.eigvalsh(gram).clip(min=0) / (len(rows) - 1)).sum()
        gap = features.mean(axis=0) - mean_F
        return float(gap @ gap + features.var(axis=0, ddof=1).sum() + trace_ref - 2 * trace_root)

    return distance


def frechet_of_pairs(generated_NF: np.ndarray, float_NF: np.ndarray) -> Callable[[np.ndarray], float]:
    """Rows of both sets → the Fréchet distance between them: what two rows of a pair share is drawn together."""
    return lambda rows: frechet(generated_NF[rows], float_NF[rows])(np.arange(len(rows)))


def cubic_kernel(x_NF: np.ndarray, y_MF: np.ndarray) -> np.ndarray:
    """KID's: (x·y / width + 1)³."""
    return (x_NF.astype(np.float64) @ y_MF.T.astype(np.float64) / x_NF.shape[1] + 1) ** 3


def kernel_sd(
    generated_NF: np.ndarray, reference_MF: np.ndarray, seed: int, resamples: int, kernel: Kernel = cubic_kernel
) -> float:
    """Bootstrap of the unbiased MMD², all resamples at once."""
    n = len(generated_NF)
    counts_RN = np.stack([np.bincount(rows, minlength=n) for rows in resampled_rows(n, seed, resamples)])
    within_R, across_R = np.zeros(resamples), np.zeros(resamples)
    for start in range(0, n, KERNEL_ROWS):
        block = slice(start, start + KERNEL_ROWS)
        kernel_BN = kernel(generated_NF[block], generated_NF)
        own_B = kernel_BN[np.arange(len(kernel_BN)), np.arange(start, start + len(kernel_BN))]
        counts_RB = counts_RN[:, block]
        within_R += ((counts_RB @ kernel_BN) * counts_RN).sum(axis=1) - counts_RB @ own_B
        across_R += counts_RB @ kernel(generated_NF[block], reference_MF).mean(axis=1)
    return float(np.std(within_R / (n * (n - 1)) - 2 * across_R / n, ddof=1))


def kernel_sd_of_pairs(x_NF: np.ndarray, y_NF: np.ndarray, seed: int, resamples: int, kernel: Kernel) -> float:
    """Bootstrap of the biased MMD² over pairs (x_i, y_i): Σ_ij h_ij / n², h_ij = k(x_i, x_j) + k(y_i, y_j) − 2 k(x_i, y_j)."""
    n = len(x_NF)
    counts_RN = np.stack([np.bincount(rows, minlength=n) for rows in resampled_rows(n, seed, resamples)])
    total_R = np.zeros(resamples)
    for start in range(0, n, KERNEL_ROWS):
        block = slice(start, start + KERNEL_ROWS)
        h_BN = kernel(x_NF[block], x_NF) + kernel(y_NF[block], y_NF) - 2 * kernel(x_NF[block], y_NF)
        total_R += ((counts_RN[:, block] @ h_BN) * counts_RN).sum(axis=1)
    return float(np.std(total_R / n**2, ddof=1))


def inception_score_sd(logits_NK: np.ndarray, splits: int, seed: int, resamples: int) -> float:
    """Bootstrap of the score of each split's size, over √splits: the libraries average that many splits."""
    n = len(logits_NK) // splits
    shifted_NK = logits_NK.astype(np.float64) - logits_NK.max(axis=1, keepdims=True)
    probability_NK = np.exp(shifted_NK) / np.exp(shifted_NK).sum(axis=1, keepdims=True)
    certainty_N = (probability_NK * np.log(probability_NK.clip(min=1e-300))).sum(axis=1)
    rows_RN = np.random.default_rng(seed).integers(0, len(logits_NK), size=(resamples, n))
    marginal_RK = np.stack([probability_NK[rows].mean(axis=0) for rows in rows_RN])
    marginal_term_R = (marginal_RK * np.log(marginal_RK.clip(min=1e-300))).sum(axis=1)
    return float(np.std(np.exp(certainty_N[rows_RN].mean(axis=1) - marginal_term_R), ddof=1) / np.sqrt(splits))


def recall(generated_NF: Tensor, reference_MF: Tensor, neighbours: int) -> Callable[[np.ndarray], float]:
    """Rows of the generated set → share of the reference that lies in a ball around one of them.

    A ball reaches to its centre's neighbour number `neighbours` (Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 1).
    """
    among_NN, to_reference_MN = torch.cdist(generated_NF, generated_NF), torch.cdist(reference_MF, generated_NF)

    def share(rows: np.ndarray) -> float:
        chosen = torch.from_numpy(rows)
        nearest = min(neighbours, len(rows) - 1) + 1  # the first is the point itself
        radius = among_NN[chosen][:, chosen].kthvalue(nearest).values
        return float((to_reference_MN[:, chosen] <= radius).any(dim=1).float().mean())

    return share


def halves_sd(statistic: Callable[[np.ndarray], float], n: int, seed: int, halves: int = HALVES) -> float:
    """Delete-half jackknife: for a statistic that repeated rows would break, such as one of nearest neighbours."""
    rng = np.random.default_rng(seed)
    values = np.array([statistic(rng.choice(n, n // 2, replace=False)) for _ in range(halves)])
    return float(values.std(ddof=1) * np.sqrt(n // 2 / (n - n // 2)))
