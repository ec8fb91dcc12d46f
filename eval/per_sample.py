"""Metrics that look at samples one by one: the mean of what they find, or the share of samples for which it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ditbench.eval.base import Evidence, Measurement, PerSample
from ditbench.eval.passport import need_samples, passport
from ditbench.eval.statistics import OF_ONE, PERCENTILE_BOOTSTRAP, WILSON, Interval, mean_with_ci, share_with_ci


def mean_or_share(
    evidence: Evidence,
    values_N: Tensor | np.ndarray,
    implementation: str,
    package: str,
    *,
    rows: Sequence[int] | None = None,
    reference: str | None = None,
    **settings: Any,
) -> Measurement:
    """Numbers → their mean with a bootstrap interval; yes/no outcomes (bool) → their share with Wilson's.

    rows: the samples that the values are of, where not all count. settings: the rest of the passport.
    """
    n = need_samples(evidence, 1)
    found = np.asarray(values_N)
    yes_no = found.dtype == bool
    ci95: Interval | None
    if yes_no:
        value, ci95 = share_with_ci(int(found.sum()), len(found))
        settings |= {"ci_method": WILSON}
    else:
        value, ci95 = mean_with_ci(found, evidence.seed, evidence.resamples)
        settings |= {"ci_method": PERCENTILE_BOOTSTRAP if ci95 else OF_ONE, "resamples": evidence.resamples}
    whole_N = np.full(n, np.nan)
    whole_N[slice(None) if rows is None else list(rows)] = found
    card = passport(implementation, package, reference=reference, **settings)
    return Measurement(value, ci95, len(found), card, PerSample(whole_N, yes_no))
