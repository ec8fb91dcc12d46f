"""The Fréchet distance of two sets of features: its value for some of the rows, what each row contributes, and its limit as n grows.

    FID(P, R) = |μ − μ_R|² + tr Σ + tr Σ_R − 2 tr (Σ_R^½ Σ Σ_R^½)^½

One estimate of the spread serves every library that computes the value. With Σ_R = A Aᵀ, c the centred rows of P and U S Vᵀ = c A / √n,
the last trace is Σ_k s_k, and with u = √n U (n rows of whitened features)

    φ_i  = 2 (μ − μ_R)·c_i + |c_i|² − Σ_k s_k u_ik²                       (less its mean)
    g_ij = 2 Σ_k s_k u_ik u_jk + Σ_kl s_k s_l / (s_k + s_l) u_ik u_il u_jk u_jl      (less what depends on i or j alone)

FD∞ (Chong & Forsyth 2020, arXiv:1911.07023): the distance falls with n as FID_n ≈ FID_∞ + b / n; the line through the distances of the
whole set and of halves of it meets 1 / n = 0 at 2 FID_n − FID_{n/2}. Departs from the paper: there fifteen subsets of growing size and a
regression; here both halves of SPLITS random splits, since the two halves' linear terms cancel, and each stratum of the design is halved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ditbench.eval.influence import Influence, counted_once, rows_of_pairs

SPLITS, FEW_SPLITS = 10, 3
WIDE = 512
RANK = 1e-12  # eigenvalues below this share of the largest are rounding
FINE = 1e-4  # terms of the second derivative below this share of the largest change no digit

Moments = tuple[np.ndarray, np.ndarray, float]  # μ_R (F,), A (F, R) with A Aᵀ = Σ_R, tr Σ_R
Distance = Callable[[np.ndarray], float]  # rows of the generated set → their distance to the reference


def distance(generated_NF: np.ndarray, reference_MF: np.ndarray) -> Distance:
    """Rows of the generated set → their Fréchet distance to the reference; covariances over n − 1."""
    return _distance(generated_NF.astype(np.float64), _moments(reference_MF))


def _distance(generated_NF: np.ndarray, reference: Moments) -> Distance:
    mean_F, root_FR, trace_ref = reference
    projected_NR = generated_NF @ root_FR

    def of_rows(rows: np.ndarray) -> float:
        features, projected = generated_NF[rows], projected_NR[rows]
        projected = projected - projected.mean(axis=0)
        gram = projected.T @ projected if len(rows) > projected.shape[1] else projected @ projected.T
        trace_root = np.sqrt(np.linalg.eigvalsh(gram).clip(min=0) / (len(rows) - 1)).sum()
        gap = features.mean(axis=0) - mean_F
        return float(gap @ gap + features.var(axis=0, ddof=1).sum() + trace_ref - 2 * trace_root)

    return of_rows


def moments_of(mean_F: np.ndarray, cov_FF: np.ndarray) -> Moments:
    """Of a reference whose mean and covariance are known, and no rows."""
    eigenvalues_F, vectors_FF = np.linalg.eigh(cov_FF)
    return mean_F, vectors_FF * np.sqrt(eigenvalues_F.clip(min=0)), float(np.trace(cov_FF))


def distance_to(generated_NF: np.ndarray, reference: Moments) -> float:
    """Of all rows to such a reference."""
    return _distance(generated_NF.astype(np.float64), reference)(np.arange(len(generated_NF)))


def distance_of_moments(mean_F: np.ndarray, cov_FF: np.ndarray, reference_MF: np.ndarray) -> float:
    """Of a distribution whose mean and covariance are known."""
    mean_ref_F, root_FR, trace_ref = _moments(reference_MF)
    gap = mean_F - mean_ref_F
    square_F = np.linalg.eigvalsh(root_FR.T @ cov_FF @ root_FR).clip(min=0)
    return float(gap @ gap + np.trace(cov_FF) + trace_ref - 2 * np.sqrt(square_F).sum())


def influence(generated_NF: np.ndarray, reference_MF: np.ndarray) -> Influence:
    """Of the generated rows; the reference stays as it is."""
    return influence_to(generated_NF, _moments(reference_MF))


def influence_to(generated_NF: np.ndarray, reference: Moments) -> Influence:
    """The same, of a reference by its moments."""
    first_N, whitened_NK, singular_K = _first(generated_NF.astype(np.float64), reference)
    rows = rows_of_pairs(len(generated_NF))
    return Influence(first_N, _second(whitened_NK[rows], singular_K), rows)


def contributed(whole: Influence, width: int, strata_N: np.ndarray) -> Influence:
    """What is kept for each sample, so that two runs can be told apart: pairs counted once where there are more samples than features.

    With fewer, terms of third order are as large as those that would be taken off: equal models would be told apart too often.
    """
    return counted_once(whole, strata_N) if len(strata_N) > width else whole


def influence_of_pairs(generated_NF: np.ndarray, float_NF: np.ndarray) -> Influence:
    """Of pairs (a generated row and the float model's of the same noise), which come and go together."""
    x_NF, y_NF = generated_NF.astype(np.float64), float_NF.astype(np.float64)
    # Both covariances over N, as the weighted set's is: nothing is contributed to a distance of 0.
    return Influence(_first(x_NF, _moments(y_NF, ddof=0))[0] + _first(y_NF, _moments(x_NF, ddof=0))[0])


@dataclass(frozen=True)
class Infinity:
    """FD∞, what each sample contributes to it, and the standard deviation that the choice of halves adds."""

    value: float
    influence: Influence
    split_sd: float


def infinity(
    generated_NF: np.ndarray,
    reference_MF: np.ndarray,
    whole: Influence,
    strata_N: np.ndarray,
    seed: int,
    splits: int = SPLITS,
) -> Infinity:
    """2 · distance of all − mean distance of halves: the line in 1 / n through (1 / n, all) and (2 / n, halves), at 0.

    whole: `influence` of all. Raises ValueError: fewer than four rows.
    """
    n, random = len(strata_N), np.random.default_rng(seed)
    if n < 4:
        raise ValueError(f"FD∞: halves of {n} rows have no covariance; give it 4 or more")
    generated_NF, reference = generated_NF.astype(np.float64), _moments(reference_MF)
    of_rows = _distance(generated_NF, reference)
    means, of_halves_N = [], np.zeros(n)
    for _ in range(splits):
        halves = split(strata_N, random)
        means.append(float(np.mean([of_rows(rows) for rows in halves])))
        for rows in halves:  # a sample makes 2 / n of its half, which makes 1 / 2 of their mean
            of_halves_N[rows] += _first(generated_NF[rows], reference)[0] / splits
    first_N = 2 * whole.first_N - of_halves_N
    of_all = Influence(first_N - first_N.mean(), whole.second_RR, whole.rows_R)
    split_sd = float(np.std(means, ddof=1) / np.sqrt(splits))
    return Infinity(2 * of_rows(np.arange(n)) - float(np.mean(means)), of_all, split_sd)


def influence_of_rows(generated_NF: np.ndarray, reference_MF: np.ndarray) -> np.ndarray:
    """φ alone."""
    return _first(generated_NF.astype(np.float64), _moments(reference_MF))[0]


def splits_of(width: int) -> int:
    """Halves of wide features take seconds each."""
    return SPLITS if width < WIDE else FEW_SPLITS


def split(strata_N: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two random halves of the rows with (as nearly as it goes) half of each stratum."""
    shuffled = random.permutation(len(strata_N))
    by_stratum = shuffled[np.argsort(random.permutation(strata_N.max() + 1)[strata_N[shuffled]], kind="stable")]
    return np.sort(by_stratum[0::2]), np.sort(by_stratum[1::2])


def _moments(reference_MF: np.ndarray, ddof: int = 1) -> Moments:
    """Covariance over M − ddof; of few rows by their singular values, since F × F roots of wide features take seconds."""
    reference_MF = reference_MF.astype(np.float64)
    m, width = reference_MF.shape
    mean_F = reference_MF.mean(axis=0)
    if m <= width:
        _, singular_M, rows_MF = np.linalg.svd(reference_MF - mean_F, full_matrices=False)
        root_FM = rows_MF.T * singular_M / np.sqrt(m - ddof)
        return mean_F, root_FM, float((root_FM**2).sum())
    return moments_of(mean_F, np.cov(reference_MF, rowvar=False, ddof=ddof))


def _first(generated_NF: np.ndarray, reference: Moments) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """φ (N,), u (N, K) and s (K,); K is the rank of the product."""
    n = len(generated_NF)
    mean_F, root_FR, _ = reference
    centred_NF = generated_NF - generated_NF.mean(axis=0)
    projected_NR = centred_NF @ root_FR
    tall = n > projected_NR.shape[1]
    gram = (projected_NR.T @ projected_NR if tall else projected_NR @ projected_NR.T) / n
    square_K, vectors = np.linalg.eigh(gram)
    kept = square_K > RANK * max(square_K[-1], 0.0)
    singular_K, vectors = np.sqrt(square_K[kept]), vectors[:, kept]
    whitened_NK = projected_NR @ vectors / singular_K if tall else vectors * np.sqrt(n)
    gap = generated_NF.mean(axis=0) - mean_F
    first_N = 2 * centred_NF @ gap + (centred_NF**2).sum(axis=1) - whitened_NK**2 @ singular_K
    return first_N - first_N.mean(), whitened_NK, singular_K


def _second(whitened_RK: np.ndarray, singular_K: np.ndarray) -> np.ndarray:
    """g (R, R). The weights of the double sum are a matrix of few large eigenvalues, so it is a sum of few squared products."""
    if not len(singular_K):
        return np.zeros((len(whitened_RK), len(whitened_RK)))
    weights_KK = np.outer(singular_K, singular_K) / np.add.outer(singular_K, singular_K)
    size_E, vectors_KE = np.linalg.eigh(weights_KK)
    g_RR = 2 * (whitened_RK * singular_K) @ whitened_RK.T
    for size, vector_K in zip(size_E, vectors_KE.T, strict=True):
        if abs(size) > FINE * size_E[-1]:
            g_RR += size * ((whitened_RK * vector_K) @ whitened_RK.T) ** 2
    return g_RR
