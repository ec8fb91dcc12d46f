"""FD∞: the Fréchet distance that infinitely many images of the model would have (eval/frechet.py; Chong & Forsyth 2020, arXiv:1911.07023).

FID of few images is mostly bias: real digits against themselves have 5.1 at n = 64 and 0.27 at n = 1,024 (judge's features, balanced
labels). FD∞ takes that off, so its values of different n, and of balanced and independent labels, are of the same thing. It can come out
below 0, and its interval is wider than FID's. With n not well above the feature width the bias is no straight line in 1 / n, and FD∞
comes out too low; docs/protocols.md has by how much.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np

from ditbench.eval import frechet
from ditbench.eval.base import Evidence, Measurement, metric
from ditbench.eval.distribution import JUDGE_VIEW, View
from ditbench.eval.features import one_thread
from ditbench.eval.inception import TORCH_FIDELITY_VIEW
from ditbench.eval.influence import Spread, spread
from ditbench.eval.passport import need_samples, passport
from ditbench.eval.per_sample import pseudo_values
from ditbench.eval.statistics import INFLUENCE, student

LEAST = 4  # images: halves of fewer have no covariance


@metric("fd_infinity_judge", better="lower", asks=("judge", "reference"))
def fd_infinity_judge(evidence: Evidence) -> Measurement:
    """Fréchet distance to the reference extrapolated to infinitely many images, in the judge's features."""
    return fd_infinity_through(JUDGE_VIEW, evidence)


@metric("fd_infinity", better="lower", asks=("reference",), needs=TORCH_FIDELITY_VIEW.needs)
def fd_infinity(evidence: Evidence) -> Measurement:
    """Fréchet distance to the reference extrapolated to infinitely many images, in Inception's features as torch-fidelity has them."""
    return fd_infinity_through(TORCH_FIDELITY_VIEW, evidence)


def fd_infinity_through(view: View, evidence: Evidence) -> Measurement:
    """Raises MetricSkipped: fewer than LEAST images, no reference."""
    n, design = need_samples(evidence, LEAST), evidence.design
    with one_thread() if view.narrow else nullcontext():
        pair = view.pair(evidence)
        generated_NF, reference_MF = pair.generated_NF.numpy(), pair.reference_MF.numpy()
        width = generated_NF.shape[1]
        splits = frechet.splits_of(width)
        whole = frechet.influence(generated_NF, reference_MF)
        found = frechet.infinity(generated_NF, reference_MF, whole, design.strata_N, evidence.seed, splits)
    of_samples = spread(found.influence, design.strata_N)
    total = Spread(float(np.hypot(of_samples.sd, found.split_sd)), of_samples.freedom)
    settings = {"estimator": f"2 FID(n) − mean FID(n / 2), {splits} splits into halves", "seed": evidence.seed}
    settings |= {"n_dependence": "none where the bias is b / n", "design": design.name, "ci_method": INFLUENCE}
    if n < 4 * width:
        settings["note"] = f"n = {n} is below four times the feature width {width}: extrapolated too low"
    kept = pseudo_values(evidence, found.value, frechet.contributed(found.influence, width, design.strata_N))
    card = passport(
        "ditbench fd_infinity", "ditbench", reference=evidence.reference, **view.origin(evidence), **settings
    )
    return Measurement(found.value, student(found.value, total), n, card, kept)
