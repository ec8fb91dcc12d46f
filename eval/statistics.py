"""95 % intervals: how far a number could have moved had other samples been drawn.

Three kinds, each named in the passport (`ci_method`):
- a mean over samples: percentile bootstrap, with the percentiles of Hesterberg 2015; of one sample there is none;
- a share of samples: Wilson's interval; the mean of several groups' shares: theirs combined. No bootstrap, which draws an
  interval of width zero around 0 % and 100 %;
- a number of the whole set (FID, KID, IS): value ± 1.96 · standard deviation over bootstrap resamples. Percentiles
  would be wrong there: a resample repeats rows, so its FID and KID lie above those of the set it was drawn from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from scipy.stats import binomtest, norm, t

Interval = tuple[float, float]

PERCENTILE_BOOTSTRAP = "percentile bootstrap of the mean, widened for small n (Hesterberg 2015)"
OF_ONE = "none: one sample says nothing of the spread"
WILSON = "Wilson"
WILSON_OF_GROUPS = "Wilson's limits of each category's share, combined (MOVER, Zou & Donner 2008)"
NORMAL_BOOTSTRAP = "value ± 1.96·sd over bootstrap resamples of the generated rows (percentiles would be biased)"
PAIRED_BOOTSTRAP = (
    "value ± 1.96·sd over bootstrap resamples of the pairs (an image and the float model's of the same noise)"
)

_Z95 = 1.96


def resampled_rows(n: int, seed: int, resamples: int) -> np.ndarray:
    """Row indices drawn with replacement, (resamples, n) int64; the global random state is left alone."""
    return np.random.default_rng(seed).integers(0, n, size=(resamples, n))


def percentiles95(n: int) -> tuple[float, float]:
    """Which percentiles of the bootstrapped means of n ≥ 2 samples bound a 95 % interval: 2.5 and 97.5 as n grows.

    Those of few samples lie too close together (a resample's variance is that of the population times (n − 1) / n, and
    the normal's tails are not Student's), so the share beyond each is Φ(−√(n / (n − 1)) · t_{n−1, 97.5 %}): "expanded
    percentile interval", Hesterberg 2015 (arXiv:1411.5279). Of 5 normal samples 2.5 and 97.5 cover the mean 83 times in 100.
    """
    beyond = 100.0 * float(norm.cdf(-np.sqrt(n / (n - 1)) * t.ppf(0.975, n - 1)))
    return beyond, 100.0 - beyond


def mean_with_ci(values_N: np.ndarray, seed: int, resamples: int) -> tuple[float, Interval | None]:
    """The mean of one value per sample, and its percentile bootstrap interval; one sample says nothing of its spread."""
    values_N = np.asarray(values_N, dtype=np.float64)
    n = len(values_N)
    if n < 2:
        return float(values_N.mean()), None
    means = values_N[resampled_rows(n, seed, resamples)].mean(axis=1)
    low, high = np.percentile(means, percentiles95(n))
    return float(values_N.mean()), (float(low), float(high))


def share_with_ci(hits: int, n: int) -> tuple[float, Interval]:
    """hits out of n, and Wilson's interval for that share."""
    interval = binomtest(hits, n).proportion_ci(confidence_level=0.95, method="wilson")
    return hits / n, (float(interval.low), float(interval.high))


def mean_of_shares_with_ci(counts: Iterable[tuple[int, int]]) -> tuple[float, Interval]:
    """The mean of independent shares, given (hits, n) of each, and an interval made of Wilson's of each.

    θ ∓ √Σ (c_i (θ_i − limit_i))², c_i = 1 / K: "method of variance estimates recovery" (Zou & Donner 2008, Statistics in
    Medicine 27, 1693–1702). Of one share it is Wilson's interval.
    """
    shares = [share_with_ci(hits, n) for hits, n in counts]
    value = float(np.mean([share for share, _ in shares]))
    below, above = (
        float(np.sqrt(sum((share - limits[end]) ** 2 for share, limits in shares))) / len(shares) for end in (0, 1)
    )
    return value, (value - below, value + above)


def bootstrap_ci(statistic: Callable[[np.ndarray], float], n: int, seed: int, resamples: int) -> tuple[float, Interval]:
    """statistic(row indices) of the whole set, ± 1.96 · its standard deviation over resamples of the n rows."""
    value = float(statistic(np.arange(n)))
    return value, around(value, bootstrap_sd(statistic, n, seed, resamples))


def bootstrap_sd(statistic: Callable[[np.ndarray], float], n: int, seed: int, resamples: int) -> float:
    return float(np.std([statistic(rows) for rows in resampled_rows(n, seed, resamples)], ddof=1))


def around(value: float, spread: float) -> Interval:
    """value ± 1.96 · spread, spread being a standard deviation."""
    return value - _Z95 * spread, value + _Z95 * spread
