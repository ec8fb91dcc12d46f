"""Two runs compared over several seeds: each seed draws other noise, classes and calibration samples, and gives one paired difference.

From three seeds on, the seeds are the sample: Student's test of the mean of their differences. Its variance is never taken to be less than
what the samples within the seeds say, or three seeds that agree by chance would prove anything. Of two seeds the spread between seeds cannot
be estimated: interval and p are then of the samples of these two, and say nothing of another seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, special, stats

from ditbench.eval.base import PerSample
from ditbench.eval.paired_differences import Difference
from ditbench.eval.statistics import Interval

FEWEST_SEEDS = 3
# With fewer comparisons or more freedom one family of tests in ten has a false alarm, instead of one in fifteen.
COMPARISONS, PRIOR_FREEDOM = 10, 4.0
OVER_SEEDS = "Student's t over the seeds"
MODERATED = "Student's t over the seeds, its variance moderated by all comparisons (Smyth 2004)"
OF_THE_SAMPLES = "normal, of the samples of these seeds only"
OF_LOGARITHMS = ", of logarithms"
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Mean:
    """The mean over seeds, its standard error, and the degrees of freedom of that (inf: of the samples only)."""

    value: float
    error: float
    freedom: float
    moderated: bool = False

    @property
    def ci95(self) -> Interval:
        half = self.error * (_Z95 if np.isinf(self.freedom) else float(stats.t.ppf(0.975, self.freedom)))
        return self.value - half, self.value + half

    @property
    def p(self) -> float:
        """Two-sided, of the mean being 0."""
        if not self.error:
            return float(self.value == 0)
        return 2 * float(stats.t.sf(abs(self.value) / self.error, self.freedom))

    @property
    def method(self) -> str:
        return OF_THE_SAMPLES if np.isinf(self.freedom) else MODERATED if self.moderated else OVER_SEEDS


def mean_over_seeds(
    values_S: Sequence[float], errors_S: Sequence[float], usual: tuple[float, float] = (0.0, 0.0)
) -> Mean:
    """values_S: one number per seed; errors_S: the standard error of each within its seed, 0 where it is not known.

    usual: a variance between seeds that others had, and the degrees of freedom for which it counts.
    """
    values_S, errors_S = np.asarray(values_S, float), np.asarray(errors_S, float)
    seeds = len(values_S)
    within = float(np.square(errors_S).sum()) / seeds**2
    if seeds < FEWEST_SEEDS:
        return Mean(float(values_S.mean()), float(np.sqrt(within)), np.inf)
    variance, freedom = usual
    between = (freedom * variance + (seeds - 1) * float(values_S.var(ddof=1))) / (freedom + seeds - 1)
    return Mean(
        float(values_S.mean()), float(np.sqrt(max(between / seeds, within))), freedom + seeds - 1, bool(freedom)
    )


def logarithms_over_seeds(values_S: Sequence[float], ci95_S: Sequence[Interval]) -> tuple[Mean, Interval]:
    """The mean of the logarithms of positive numbers, whose intervals within their seeds are ci95_S, and its interval carried back.

    It is positive, longer above than below, and covers where the spread of a number grows with it (FID): of three seeds that lie a factor
    of two apart (one standard deviation), Student's of the numbers themselves reaches below zero seven times in ten.
    """
    errors_S = [float(np.log(high / low)) / 2 / _Z95 for low, high in ci95_S]
    mean = mean_over_seeds(np.log(values_S).tolist(), errors_S)
    low, high = np.exp(mean.ci95)
    return mean, (float(low), float(high))


def of_the_ratio(difference: Difference, logs: Difference, first: float, second: float) -> Difference:
    """The difference of two positive numbers with test and interval of the logarithm of their ratio. first, second: the numbers.

    Each end of that interval is carried back with the smaller of the two held, since nearly all of the difference's spread is the larger's:
    it holds 0 just where p ≥ 0.05, with the two the other way round it is the same with its signs turned, and it is never too narrow.
    Where one seed far from the others gives the larger mean to the run that the logarithms tell apart as smaller, the difference keeps its
    own test: a winner by the one is none by the other.
    """
    if difference.value * logs.value < 0 and (logs.ci95[0] > 0 or logs.ci95[1] < 0):
        return difference
    if first >= second:
        low, high = (second * float(np.expm1(end)) for end in logs.ci95)
    else:
        low, high = (-first * float(np.expm1(-end)) for end in logs.ci95)
    told = logs.test + OF_LOGARITHMS
    return replace(difference, ci95=(low, high), p=logs.p, test=told, ci_method=told, freedom=logs.freedom)


def differences_over_seeds(differences_CS: Sequence[Sequence[Difference]]) -> list[Difference]:
    """Of C comparisons with S paired differences each (one per seed) C over all seeds; n: the samples of all seeds.

    Three seeds know the spread of one comparison badly (two degrees of freedom). Where there are at least COMPARISONS of them, each
    borrows from the others: its variance is drawn towards what is usual among them (Smyth 2004, "moderated t", Statistical
    Applications in Genetics and Molecular Biology 3, eqs. of 6.2), by at most PRIOR_FREEDOM degrees of freedom.
    """
    found, usual = [], _spread_among(differences_CS)
    for each in differences_CS:
        errors_S = [(high - low) / 2 / _Z95 for low, high in (one.ci95 for one in each)]
        found.append(mean_over_seeds([one.value for one in each], errors_S, usual))
    return [
        Difference(mean.value, mean.ci95, mean.p, sum(one.n for one in each), mean.method, mean.method, mean.freedom)
        for mean, each in zip(found, differences_CS, strict=True)
    ]


def is_positive(run: PerSample) -> bool:
    return run.pseudo and float(np.nanmean(run.values_N)) > 0


def logarithm(run: PerSample) -> PerSample:
    """Of a number of the whole set that is positive: what each sample contributes to its logarithm (the delta method).

    A number whose spread grows with it (FID) has an equal spread for good and bad runs only there: of runs at 20 and at 1,300 the spread
    between seeds would otherwise be that of the worst, which then no test tells apart from anybody.
    """
    value = float(np.nanmean(run.values_N))
    return replace(run, values_N=np.log(value) + (run.values_N - value) / value)


def usual_variance(variances_C: np.ndarray, freedom: float) -> tuple[float, float]:
    """(s₀², its degrees of freedom d₀) of variances with `freedom` each: s² ~ s₀² F(freedom, d₀), by the moments of log s²."""
    log_C = np.log(variances_C) - special.digamma(freedom / 2) + np.log(freedom / 2)
    scatter = float(log_C.var(ddof=1) - special.polygamma(1, freedom / 2))
    if scatter <= special.polygamma(1, PRIOR_FREEDOM / 2):
        half = PRIOR_FREEDOM / 2
    else:
        half = optimize.brentq(lambda half: float(special.polygamma(1, half)) - scatter, 1e-6, PRIOR_FREEDOM / 2)
    return float(np.exp(log_C.mean() + special.digamma(half) - np.log(half))), 2 * half


def _spread_among(differences_CS: Sequence[Sequence[Difference]]) -> tuple[float, float]:
    """`usual_variance` of comparisons over seeds; (0, 0) where there are too few."""
    value_CS = np.array([[one.value for one in each] for each in differences_CS])
    if value_CS.shape[1] < FEWEST_SEEDS:
        return 0.0, 0.0
    variance_C = value_CS.var(axis=1, ddof=1)
    variance_C = variance_C[variance_C > 0]
    if len(variance_C) < COMPARISONS:
        return 0.0, 0.0
    return usual_variance(variance_C, value_CS.shape[1] - 1)
