"""Two runs compared sample by sample: how far apart a metric is, and how often chance alone would set it that far apart.

Runs of one protocol share prompts and noise, so what one sample has against its counterpart is all that differs; the spread
between prompts, which widens each run's own interval, cancels.

    outcomes                 test                                          interval of the difference
    yes/no                   exact sign test of the discordant pairs,      Agresti & Min 2005, "Wald+2"
                             which is McNemar's exact test
    yes/no by category       sign flips of the mean of categories          Agresti & Min's of each category, combined (MOVER)
    numbers                  sign flips of the mean difference             Student's, spread within strata of the design
    pseudo-values of a       Student's                                     the same
    number of the set (FID)

Where labels or prompts are balanced, what one label has against another is no chance: differences are centred within strata, and
their mean put back, before signs are flipped.

Sign flips: under the hypothesis of no difference each pair could as well be swapped. All 2^m swaps of the m pairs that
differ are counted where m ≤ EXACT_UP_TO, else FLIPS random ones. Agresti & Min (Statistics in Medicine 24, 729–740) instead of a
bootstrap, which gives two runs that agree everywhere an interval of width zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, t

from ditbench.eval.base import PerSample
from ditbench.eval.design import with_company
from ditbench.eval.influence import Spread, spread_within
from ditbench.eval.statistics import Interval, student

SIGN_TEST = "exact sign test (McNemar)"
FLIP_TEST = "sign-flip permutation"
T_TEST = "Student's t of each sample's influence"
PAIRED_STUDENT = "Student's t of the pairs, spread within the strata of the design"
AGRESTI_MIN = "Agresti & Min 2005"
AGRESTI_MIN_OF_GROUPS = "Agresti & Min 2005 of each category, combined (MOVER)"

FLIPS = 9999
EXACT_UP_TO = 13  # 2^13 = 8,192 swaps: no more than FLIPS
BLOCK = 500  # rows of random signs held at once
ROUNDING = 1e-12
UNKNOWN = (-np.inf, np.inf)
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Difference:
    """first − second of a metric over the n samples that both have, its 95 % interval, and the two-sided p of its test.

    freedom: of Student's t that made the interval; inf where the normal distribution did.
    """

    value: float
    ci95: Interval
    p: float
    n: int
    test: str
    ci_method: str
    freedom: float = np.inf


def differences(pairs: Sequence[tuple[PerSample, PerSample]], seed: int = 0) -> list[Difference]:
    """first − second for every pair of runs, all of one metric; all pairs see the same swaps.

    Raises:
        ValueError: two runs with different numbers of samples.
    """
    if not pairs:
        return []
    deltas = [_delta(first, second) for first, second in pairs]
    sizes = [int(np.isfinite(delta_N).sum()) for delta_N in deltas]
    one = pairs[0][0]
    if one.yes_no and one.strata_N is None:
        counts = [(int((delta_N > 0).sum()), int((delta_N < 0).sum())) for delta_N in deltas]
        return [
            Difference((more - less) / n, agresti_min(more, less, n), sign_test(more, less), n, SIGN_TEST, AGRESTI_MIN)
            for (more, less), n in zip(counts, sizes, strict=True)
        ]
    if one.yes_no:
        weighted_PN = np.nan_to_num([delta_N * _weights(one, delta_N) for delta_N in deltas])
        intervals = [_of_categories(delta_N, one.strata_N) for delta_N in deltas]
        found = zip(
            weighted_PN.sum(axis=1).tolist(), intervals, sign_flip_p(weighted_PN, seed).tolist(), sizes, strict=True
        )
        return [Difference(*each, FLIP_TEST, AGRESTI_MIN_OF_GROUPS) for each in found]
    spreads = [_spread(delta_N, one.design_N) for delta_N in deltas]
    values = [float(np.nanmean(delta_N)) for delta_N in deltas]
    intervals = [_interval(*each) for each in zip(values, spreads, sizes, strict=True)]
    if one.pseudo:
        p_P, test = [_student_p(*each) for each in zip(values, spreads, sizes, strict=True)], T_TEST
        silent = [_nobody_contributes(*pair) for pair in pairs]
        p_P = [1.0 if each else own for each, own in zip(silent, p_P, strict=True)]
        intervals = [UNKNOWN if each else own for each, own in zip(silent, intervals, strict=True)]
    else:
        swapped_PN = np.stack([_without_strata(delta_N, one.design_N) for delta_N in deltas])
        p_P, test = sign_flip_p(swapped_PN, seed).tolist(), FLIP_TEST
    found = zip(values, intervals, p_P, sizes, spreads, strict=True)
    return [Difference(*each, test, PAIRED_STUDENT, spread.freedom) for *each, spread in found]


def sign_test(more: int, less: int) -> float:
    """Two-sided p of `more` against `less` discordant pairs, if each were as likely; 1 without any."""
    return float(binomtest(more, more + less, 0.5).pvalue) if more + less else 1.0


def sign_flip_p(delta_PN: np.ndarray, seed: int = 0) -> np.ndarray:
    """Two-sided p (P,) of Σ_n delta against the same sum with signs swapped at random; a 0 takes no part."""
    observed_P = np.abs(delta_PN.sum(axis=1)) - 1e-10 * np.abs(delta_PN).sum(axis=1)  # ties despite rounding
    p_P = np.ones(len(delta_PN))
    many = (delta_PN != 0).sum(axis=1) > EXACT_UP_TO
    for place in np.flatnonzero(~many):
        delta_M = delta_PN[place][delta_PN[place] != 0]
        signs_FM = 1.0 - 2.0 * ((np.arange(2 ** len(delta_M))[:, None] >> np.arange(len(delta_M))) & 1)
        p_P[place] = float((np.abs(signs_FM @ delta_M) >= observed_P[place]).mean())
    if many.any():
        random = np.random.default_rng(seed)
        reached_P = np.zeros(int(many.sum()))
        for start in range(0, FLIPS, BLOCK):
            signs_FN = 1.0 - 2.0 * random.integers(0, 2, (min(BLOCK, FLIPS - start), delta_PN.shape[1]))
            reached_P += (np.abs(signs_FN @ delta_PN[many].T) >= observed_P[many]).sum(axis=0)
        p_P[many] = (1 + reached_P) / (1 + FLIPS)
    return p_P


def agresti_min(more: int, less: int, n: int) -> Interval:
    """95 % interval of (more − less) / n, n pairs of yes/no outcomes: Wald's with ½ added to each cell of the 2×2 table."""
    middle = (more - less) / (n + 2)
    half = _Z95 * np.sqrt(more + less + 1 - (more - less) ** 2 / (n + 2)) / (n + 2)
    return max(-1.0, float(middle - half)), min(1.0, float(middle + half))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: the chance of any false alarm among all of them is at most what each says."""
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(np.asarray(p)[order] * np.arange(len(p), 0, -1)).clip(max=1.0)
    back = np.empty(len(p))
    back[order] = adjusted
    return back.tolist()


def _delta(first: PerSample, second: PerSample) -> np.ndarray:
    if len(first.values_N) != len(second.values_N):
        raise ValueError(f"paired: {len(first.values_N)} and {len(second.values_N)} samples do not pair row by row")
    return first.values_N - second.values_N


def _weights(one: PerSample, delta_N: np.ndarray) -> np.ndarray:
    """What each sample counts in the metric: 1 / n, or 1 / (K n_k) in category k of K."""
    strata_N = np.zeros(len(delta_N), int) if one.strata_N is None else one.strata_N
    counted = np.isfinite(delta_N)
    _, category_N, size_K = np.unique(strata_N[counted], return_inverse=True, return_counts=True)
    weight_N = np.zeros(len(delta_N))
    weight_N[counted] = 1.0 / (len(size_K) * size_K[category_N])
    return weight_N


def _strata(delta_N: np.ndarray, design_N: np.ndarray | None) -> np.ndarray:
    """Of the differences that count."""
    counted_N = np.isfinite(delta_N)
    return np.zeros(int(counted_N.sum()), int) if design_N is None else with_company(design_N[counted_N])


def _spread(delta_N: np.ndarray, design_N: np.ndarray | None) -> Spread:
    return spread_within(delta_N[np.isfinite(delta_N)], _strata(delta_N, design_N))


def _interval(value: float, spread: Spread, n: int) -> Interval:
    """Without limits where one pair is all there is."""
    return student(value, spread) if n > 1 else UNKNOWN


def _student_p(value: float, spread: Spread, n: int) -> float:
    """Two-sided; 1 of one pair, and of two runs that are the same."""
    if n < 2 or value == 0:
        return 1.0
    return float(2 * t.sf(abs(value) / spread.sd, spread.freedom)) if spread.sd > 0 else 0.0


def _nobody_contributes(first: PerSample, second: PerSample) -> bool:
    """Numbers of the set that differ though no sample contributes to either (recall, where other balls cover what one leaves): they say
    nothing of how far chance moves them.
    """
    spans = [float(np.nanmax(run.values_N) - np.nanmin(run.values_N)) for run in (first, second)]
    return max(spans) <= ROUNDING < abs(float(np.nanmean(first.values_N - second.values_N)))


def _without_strata(delta_N: np.ndarray, design_N: np.ndarray | None) -> np.ndarray:
    """The differences, 0 where they do not count, less what their stratum has beyond the mean; with their spread within strata."""
    counted_N, shifted_N = np.isfinite(delta_N), np.nan_to_num(delta_N)
    strata_N = _strata(delta_N, design_N)
    if strata_N.any():
        found_N = delta_N[counted_N]
        size_K = np.bincount(strata_N)
        mean_K = np.bincount(strata_N, found_N) / size_K
        widened_K = np.sqrt(size_K / (size_K - 1))
        shifted_N[counted_N] = (found_N - mean_K[strata_N]) * widened_K[strata_N] + found_N.mean()
    return shifted_N


def _of_categories(delta_N: np.ndarray, strata_N: np.ndarray) -> Interval:
    """Of the mean of the categories' differences: θ ∓ √Σ ((θ_k − limit_k) / K)², as in eval.statistics."""
    counted = np.isfinite(delta_N)
    shares, lows, highs = [], [], []
    for category in np.unique(strata_N[counted]):
        inside_N = delta_N[counted & (strata_N == category)]
        more, less = int((inside_N > 0).sum()), int((inside_N < 0).sum())
        low, high = agresti_min(more, less, len(inside_N))
        shares.append((more - less) / len(inside_N))
        lows.append(low)
        highs.append(high)
    share_K = np.array(shares)
    value = float(share_K.mean())
    below, above = (float(np.linalg.norm(share_K - limits)) / len(share_K) for limits in (lows, highs))
    return value - below, value + above
