"""95 % intervals: how far a number could have moved had other samples of the same design been drawn (eval/design.py).

Each is named in the passport (`ci_method`), and none has resamples whose number would have to be chosen:
- a mean over samples: Student's, of the spread within strata; of one sample there is none;
- a share of samples: Wilson's interval, of as many samples as would be worth these if they were independent; the mean of several
  groups' shares: Wilson's of each combined. They keep a width at 0 % and 100 %;
- a number of the whole set (FID, KID, IS, recall): Student's, of the spread of what each sample contributes (eval/influence.py); of
  FID's logarithm, since an FID that came out small has a spread that came out small.

What is covered is the value that this design and this n have in expectation. That FID falls as n grows is not in it.
tests/eval/test_coverage.py and bench/intervals.py hold each of them against real digits.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy.stats import binomtest, norm, t

from ditbench.eval.influence import Spread, spread_within

Interval = tuple[float, float]

STUDENT = "Student's t, spread within the strata of the design"
OF_ONE = "none: one sample says nothing of the spread"
WILSON = "Wilson"
WILSON_BY_DESIGN = "Wilson, of the number of independent samples that would be as good (Kish's design effect)"
WILSON_OF_GROUPS = "Wilson's limits of each category's share, combined (MOVER, Zou & Donner 2008)"
INFLUENCE = "Student's t, spread of each sample's influence within the strata of the design"
INFLUENCE_OF_LOG = "Student's t on the logarithm, spread of each sample's influence within the strata of the design"
INFLUENCE_OF_PAIRS = "Student's t, spread of the influence of pairs (a sample and the float model's of the same noise)"

_Z95 = 1.96


def mean_with_ci(values_N: np.ndarray, strata_N: np.ndarray | None = None) -> tuple[float, Interval | None]:
    """The mean of one value per sample, and Student's interval; one sample says nothing of its spread.

    strata_N: int from 0, each with two samples or more (`design.with_company`); None: independent samples.
    """
    values_N = np.asarray(values_N, dtype=np.float64)
    value = float(values_N.mean())
    if len(values_N) < 2:
        return value, None
    strata_N = np.zeros(len(values_N), int) if strata_N is None else strata_N
    return value, student(value, spread_within(values_N, strata_N))


def share_with_ci(hits: int, n: int) -> tuple[float, Interval]:
    """hits out of n independent samples, and Wilson's interval for that share."""
    return hits / n, _wilson(hits / n, n)


def share_by_design(found_N: np.ndarray, strata_N: np.ndarray) -> tuple[float, Interval]:
    """The share of samples (bool) for which it holds, and Wilson's interval for n / design effect samples.

    Design effect: variance of the share within strata over that of independent samples (Kish 1965), at most 1. Half of its own standard
    error (of normal values) is added, so that a few samples which happen to agree within strata make no narrow interval.
    """
    n, share, strata = len(found_N), float(found_N.mean()), int(strata_N.max()) + 1
    independent = share * (1 - share) / n
    if strata == 1 or independent == 0:
        return share, _wilson(share, n)
    effect = spread_within(found_N.astype(np.float64), strata_N).sd ** 2 / independent
    return share, _wilson(share, n / min(1.0, effect + float(np.sqrt(2 / (n - strata))) / 2))


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


def student(value: float, spread: Spread) -> Interval:
    half = float(t.ppf(0.975, spread.freedom)) * spread.sd
    return value - half, value + half


def student_of_log(value: float, spread: Spread) -> Interval:
    """Of a number that is positive and whose spread grows with it; where it is not above its spread, around the number itself.

    So small is an FID of images that are the reference's own: its logarithm moves by thousands, and e to that is no number.
    """
    if not has_a_logarithm(value, spread):
        return student(value, spread)
    half = float(t.ppf(0.975, spread.freedom)) * spread.sd / value
    return value * float(np.exp(-half)), value * float(np.exp(half))


def has_a_logarithm(value: float, spread: Spread) -> bool:
    """Whether the interval of a positive number can be one of its logarithm."""
    return value > spread.sd


def around(value: float, spread: float) -> Interval:
    """value ± 1.96 · spread, spread being a standard deviation."""
    return value - _Z95 * spread, value + _Z95 * spread


def _wilson(share: float, n: float) -> Interval:
    """scipy's for whole numbers; the same formula for a number of samples that is not whole."""
    if n == round(n):
        interval = binomtest(round(share * n), round(n)).proportion_ci(confidence_level=0.95, method="wilson")
        return float(interval.low), float(interval.high)
    square = float(norm.ppf(0.975)) ** 2
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = float(np.sqrt(square * (share * (1 - share) / n + square / (4 * n**2)))) / (1 + square / n)
    return middle - half, middle + half
