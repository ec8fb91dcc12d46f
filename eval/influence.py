"""The standard deviation of a number of the whole set (FID, KID, IS, recall), from what each sample contributes to it.

Give sample i the weight (1 + ε_i) / n. Up to third order such a number is

    T(ε) = T + Σ φ_i ε_i / n + Σ_{i<j} g_ij ε_i ε_j / n²

φ (`first_N`) is its influence function at the samples that there are (Hampel 1974), the infinitesimal jackknife's (Jaeckel 1972,
Efron 1982). Its spread within the strata of the design, Σ_a m_a s²_a(φ) / n² with s² over m_a − 1, estimates the variance; no
resamples, no seed. It counts what pairs of samples do together twice (Efron & Stein 1981, Annals of Statistics 9, 586–596):
where the generated set is like the reference, φ is nothing but that, and the interval would be √2 times too wide. g (`second_RR`) is what
pairs do together, so it is taken off once; half of the variance is left at least.

Student's quantile with the degrees of freedom that the scatter of φ² leaves: a few samples in the tails often make half of φ's
variance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

ROWS = 512  # at most so many samples' pairs are looked at: the mean of g² is known well enough by then


@dataclass(frozen=True)
class Influence:
    """first_N: φ, float64 (N,), in the units of the number. second_RR: g among rows_R, its diagonal unused; None: not known, and
    nothing is taken off.
    """

    first_N: np.ndarray
    second_RR: np.ndarray | None = None
    rows_R: np.ndarray | None = None

    def times(self, scale: float) -> Influence:
        """Of the number times scale."""
        second_RR = None if self.second_RR is None else scale * self.second_RR
        return Influence(scale * self.first_N, second_RR, self.rows_R)


@dataclass(frozen=True)
class Spread:
    """A standard deviation, and the degrees of freedom it is known with."""

    sd: float
    freedom: float


def rows_of_pairs(n: int) -> np.ndarray:
    """ROWS of n samples, evenly among them but not in step with labels in turn; always the same."""
    return np.sort(np.random.default_rng(0).permutation(n)[:ROWS])


def spread(influence: Influence, strata_N: np.ndarray) -> Spread:
    """Of the number over other samples of the same design; 0 with one sample."""
    within = spread_within(influence.first_N, strata_N)
    if influence.second_RR is None or influence.rows_R is None:
        return within
    of_pairs = _variance_of_pairs(influence.second_RR, strata_N[influence.rows_R], len(strata_N))
    variance = within.sd**2
    return Spread(float(np.sqrt(variance - min(of_pairs, variance / 2))), within.freedom)


def spread_within(values_N: np.ndarray, strata_N: np.ndarray) -> Spread:
    """Of the mean of values: Σ_a m_a s²_a / n², and its degrees of freedom: n − strata, fewer where a few values make it.

    2 V² / Var(V), Var(V) from the scatter of the squared distances to their stratum's mean (for normal values it is n).
    """
    n = len(values_N)
    strata = int(strata_N.max()) + 1
    if n <= strata:
        return Spread(0.0, 1.0)
    size_K = np.bincount(strata_N, minlength=strata)
    mean_K = np.bincount(strata_N, values_N, strata) / size_K
    square_N = (values_N - mean_K[strata_N]) ** 2 * (size_K / np.maximum(size_K - 1, 1))[strata_N]
    of_square_K = np.bincount(strata_N, square_N, strata) / size_K
    scatter = float(((square_N - of_square_K[strata_N]) ** 2).sum())
    total = float(square_N.sum())
    freedom = min(n - strata, 2 * total**2 / scatter) if scatter > 0 else n - strata
    return Spread(float(np.sqrt(total)) / n, max(float(freedom), 1.0))


def counted_once(influence: Influence, strata_N: np.ndarray) -> Influence:
    """φ drawn together so that it scatters as much as the number does: where it is added up, pairs are counted once.

    Exact for a number that is quadratic in the samples, such as a kernel distance.
    """
    blind = spread_within(influence.first_N, strata_N).sd
    return Influence(influence.first_N * (spread(influence, strata_N).sd / blind if blind > 0 else 1.0))


def spread_as(influence: Influence, sd: float, strata_N: np.ndarray) -> Influence:
    """φ so that its spread is what is known of the number's from elsewhere; what contributes nothing stays so."""
    own = spread_within(influence.first_N, strata_N).sd
    return influence.times(sd / own) if own > 0 else influence


def jackknife(without_one: Callable[[int], float], n: int) -> Influence:
    """Of a number that has no derivative: (n − 1) · (mean − the number without sample i)."""
    values_N = np.array([without_one(index) for index in range(n)])
    return Influence((n - 1) * (values_N.mean() - values_N))


def _variance_of_pairs(second_RR: np.ndarray, strata_R: np.ndarray, n: int) -> float:
    """Σ_{i<j} E g_ij² / n⁴ of all n samples, g centred within strata: what depends on one sample of a pair alone is φ's."""
    rows = len(strata_R)
    if rows < 4:
        return 0.0
    strata_R = np.unique(strata_R, return_inverse=True)[1]
    member_RK = np.eye(strata_R.max() + 1)[strata_R]
    size_K = member_RK.sum(axis=0)
    g_RR = second_RR - np.diag(np.diag(second_RR))
    # A sample makes no pair with itself: in its own stratum of m, sums are over m − 2 and (m − 1) (m − 2), which takes away exactly what
    # is a_i + a_j ("U-centring", Székely & Rizzo 2014, Annals of Statistics 42, 2382–2412).
    mean_RK = g_RR @ member_RK / np.maximum(size_K - 2 * member_RK, 1)
    pairs_KK = np.outer(size_K, size_K)
    np.fill_diagonal(pairs_KK, (size_K - 1) * (size_K - 2))
    mean_KK = member_RK.T @ g_RR @ member_RK / np.maximum(pairs_KK, 1)
    mean_RR = mean_RK[:, strata_R]
    centred_RR = g_RR - mean_RR - mean_RR.T + mean_KK[strata_R][:, strata_R]
    np.fill_diagonal(centred_RR, 0.0)
    # Centring takes a share of the squares away: 1 / m of each side's, 3 / (m − 1) within one stratum.
    m_R = size_K[strata_R]
    kept_R = np.where(m_R > 1, 1 - 1 / m_R, np.inf)
    kept_RR = np.outer(kept_R, kept_R)
    same_RR = strata_R[:, None] == strata_R
    within_R = np.where(m_R > 3, (m_R - 3) / np.maximum(m_R - 1, 1), np.inf)
    kept_RR[same_RR] = np.broadcast_to(within_R[:, None], kept_RR.shape)[same_RR]
    return float((centred_RR**2 / kept_RR).sum()) * (n * (n - 1)) / (rows * (rows - 1)) / (2 * n**4)
