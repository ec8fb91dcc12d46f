"""Metrics that look at samples one by one: the mean of what they find, or the share of samples for which it holds.

And what a metric of the whole set keeps for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ditbench.eval.base import Evidence, Measurement, PerSample
from ditbench.eval.design import with_company
from ditbench.eval.influence import Influence
from ditbench.eval.passport import need_samples, passport
from ditbench.eval.statistics import OF_ONE, STUDENT, WILSON, WILSON_BY_DESIGN, Interval, mean_with_ci, share_by_design


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
    """Numbers → their mean with Student's interval; yes/no outcomes (bool) → their share with Wilson's; both by the samples' design.

    rows: the samples that the values are of, where not all count. settings: the rest of the passport.
    """
    n = need_samples(evidence, 1)
    found = np.asarray(values_N)
    yes_no = found.dtype == bool
    design, counted = evidence.design, slice(None) if rows is None else list(rows)
    strata_N = with_company(design.strata_N[counted])
    ci95: Interval | None
    if yes_no:
        value, ci95 = share_by_design(found, strata_N)
        settings |= {"ci_method": WILSON_BY_DESIGN if strata_N.any() else WILSON}
    else:
        value, ci95 = mean_with_ci(found, strata_N)
        settings |= {"ci_method": STUDENT if ci95 else OF_ONE}
    settings |= {"design": design.name}
    whole_N = np.full(n, np.nan)
    whole_N[counted] = found
    card = passport(implementation, package, reference=reference, **settings)
    return Measurement(value, ci95, len(found), card, PerSample(whole_N, yes_no, design_N=_of_pairs(evidence)))


def pseudo_values(evidence: Evidence, value: float, influence: Influence) -> PerSample:
    """The metric plus what each sample contributes to it."""
    return PerSample(value + influence.first_N, pseudo=True, design_N=_of_pairs(evidence))


def _of_pairs(evidence: Evidence) -> np.ndarray | None:
    strata_N = evidence.design.strata_N
    return strata_N if strata_N.any() else None
