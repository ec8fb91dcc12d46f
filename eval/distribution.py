"""FID, KID, IS, precision and recall: how the generated images, as a set, differ from the reference.

Every metric here exists once per library and once per feature space. `<library>/<metric>_judge` looks through the
judge that comes with the model, `<library>/<metric>` (eval/inception.py) through Inception; the two are never mixed.

`…_to_float` takes the float model's images for the reference: how far the quantized model has moved, not how good either
is. Those numbers have names of their own, because papers that print them as "FID" cannot be compared with the others.

Moments of the reference come from the images of the reference batch. ADM's evaluator (guided-diffusion,
evaluations/evaluator.py, read_statistics) takes those the .npz stores (`mu`, `sigma`: the whole training set), so papers that
used it print another FID of the same images, as a rule a lower one (fewer samples bias it upwards: Chong & Forsyth 2020,
arXiv:1911.07023).

An interval says how the number would move with n other images of the same model and design (eval/design.py). That FID falls as n
grows is not in it: compare at equal n, or read `fd_infinity` (eval/fd_infinity.py), which does not depend on n. The passport says
how a number depends on n and design (`n_dependence`, `design`).

KID's libraries take the mean over pairs of generated images as if labels were independent. Where they are balanced that mean is replaced by
the one that is right (eval/kernel_distance.py); the value is the library's in all else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ditbench.eval import frechet, kernel_distance, libraries, set_scores
from ditbench.eval.base import Evidence, Measurement, MetricSkipped, Need, metric
from ditbench.eval.features import Pair, against_float, judge_pair, need_judge, one_thread, outputs
from ditbench.eval.influence import Influence, counted_once, spread, spread_as
from ditbench.eval.passport import need_samples, passport
from ditbench.eval.per_sample import mean_or_share, pseudo_values
from ditbench.eval.statistics import (
    INFLUENCE,
    INFLUENCE_OF_LOG,
    INFLUENCE_OF_PAIRS,
    Interval,
    has_a_logarithm,
    student,
    student_of_log,
)

FALLS_WITH_N = "biased upwards by about b / n, b unknown: compare at equal n and design, or read fd_infinity"
PAIRS_FALL_WITH_N = "biased upwards by about b / n, b unknown: compare at equal n and design"
NO_BIAS = "none in expectation"
GROWS_WITH_N = "biased downwards by about b / n: compare at equal n and design"
MANIFOLD = "balls shrink as n grows: compare at equal n"


@dataclass(frozen=True)
class View:
    """What a feature space hands to a metric: the features, and the passport fields that name where they come from."""

    pair: Callable[[Evidence], Pair]
    logits: Callable[[Evidence], Tensor]
    origin: Callable[[Evidence], dict[str, Any]]
    asks: tuple[str, ...] = ()
    needs: tuple[Need, ...] = ()
    narrow: bool = False  # features so narrow that threads only get in each other's way


def fid(library: str, view: View, evidence: Evidence, pairs: bool = False) -> Measurement:
    """pairs: row i of the reference has the noise of generated row i, so both come and go together."""
    pair = view.pair(evidence)
    (n, width), m = pair.generated_NF.shape, len(pair.reference_MF)
    value, settings = libraries.FID[library](pair.generated_NF, pair.reference_MF, evidence.seed)
    influence = pair.once("fid influence", lambda: _frechet_influence(pair, pairs))
    if n <= width:
        settings["note"] = f"n = {n} is not above the feature width {width}: compare at equal n only"
    elif m <= width:
        settings["note"] = (
            f"the reference's {m} are not above the feature width {width}: compare with this reference only"
        )
    if not pairs:
        settings["reference_moments"] = f"of the reference batch's {m} images"
    settings |= {"estimator": "moments of the samples, covariance over n − 1"}
    settings |= {"n_dependence": PAIRS_FALL_WITH_N if pairs else FALLS_WITH_N}
    found = spread(influence, evidence.design.strata_N)
    own = INFLUENCE_OF_LOG if has_a_logarithm(value, found) else INFLUENCE
    settings |= {"ci_method": INFLUENCE_OF_PAIRS if pairs else own}
    low, high = (student if pairs else student_of_log)(value, found)
    ci95 = max(low, min(value, 0.0)), high
    kept = frechet.contributed(influence, width, evidence.design.strata_N)
    return _measurement(library, "fid", view, evidence, value, ci95, settings, kept)


def kid(library: str, view: View, evidence: Evidence) -> Measurement:
    pair, strata_N = view.pair(evidence), evidence.design.strata_N
    value, settings = libraries.KID[library](pair.generated_NF, pair.reference_MF, evidence.seed)
    generated_NF, reference_MF = pair.generated_NF.numpy(), pair.reference_MF.numpy()
    within = pair.once("kid within", lambda: kernel_distance.within(generated_NF, strata_N))
    influence = pair.once(
        "kid influence",
        lambda: kernel_distance.influence(generated_NF, reference_MF, within, kernel_distance.cubic_kernel),
    )
    settings["estimator"] = "unbiased, independent samples (the library's)"
    if strata_N.any():
        value += within.by_design - within.plain
        settings["estimator"] = "unbiased by design: the library's, pairs of generated images weighted by strata"
    settings |= {"n_dependence": NO_BIAS, "ci_method": INFLUENCE}
    ci95 = student(value, spread(influence, strata_N))
    kept = counted_once(influence, strata_N)
    return _measurement(library, "kid", view, evidence, value, ci95, settings, kept)


def inception_score(library: str, view: View, evidence: Evidence) -> Measurement:
    need_samples(evidence, 2)
    logits_NK = view.logits(evidence)
    value, settings = libraries.IS[library](logits_NK, evidence.seed)
    influence = set_scores.inception_score_influence(logits_NK.numpy(), value)
    settings |= {"estimator": "mean over splits" if settings["splits"] > 1 else "of all samples"}
    settings |= {"n_dependence": GROWS_WITH_N, "ci_method": INFLUENCE}
    ci95 = student(value, spread(influence, evidence.design.strata_N))
    return _measurement(library, "is", view, evidence, value, ci95, settings, influence)


def precision(library: str, view: View, evidence: Evidence) -> Measurement:
    pair = view.pair(evidence)
    value, _, settings = pair.once("prc", lambda: libraries.torch_fidelity_prc(pair.generated_NF, pair.reference_MF))
    near_N = set_scores.near_reference(pair.generated_NF, pair.reference_MF, settings["neighbours"])
    package = libraries.PACKAGES[library]
    origin = {"reference": evidence.reference, "n_dependence": NO_BIAS, **view.origin(evidence), **settings}
    found = mean_or_share(evidence, near_N, f"{package} precision", package, **origin)
    return replace(found, value=value)  # the library's own: distances that tie may round the other way here


def recall(library: str, view: View, evidence: Evidence) -> Measurement:
    pair = view.pair(evidence)
    n = need_samples(evidence, 4)
    _, value, settings = pair.once("prc", lambda: libraries.torch_fidelity_prc(pair.generated_NF, pair.reference_MF))
    settings = settings | {"estimator": "share of the reference", "n_dependence": MANIFOLD}
    if n > libraries.PRC_WHOLE_MATRIX:
        settings |= {"ci_method": f"none: too slow above {libraries.PRC_WHOLE_MATRIX} images"}
        return _measurement(library, "recall", view, evidence, value, None, settings)
    if n < settings["neighbours"] + 2:
        settings |= {"ci_method": f"none: without one of {n} images the others lack a neighbour"}
        return _measurement(library, "recall", view, evidence, value, None, settings)
    given = pair.generated_NF, pair.reference_MF, settings["neighbours"]
    strata_N = evidence.design.strata_N
    found = set_scores.recall_spread(*given, strata_N, evidence.seed)
    low, high = student(value, found)
    # Leaving out one at a time says who contributes, and badly how much: up to 1.7 times too much, and near 1 next to nothing.
    influence = spread_as(set_scores.recall_influence(*given), found.sd, strata_N)
    settings |= {"ci_method": set_scores.DELETE_QUARTER}
    ci95 = max(low, 0.0), min(high, 1.0)
    return _measurement(library, "recall", view, evidence, value, ci95, settings, influence)


def register(views: dict[str, View], suffix: str, seen_by: str) -> None:
    """Every metric of every library that has it, under `<library>/<metric><suffix>`."""
    for kind, compute, better, its_libraries, text in (
        ("fid", fid, "lower", tuple(libraries.FID), "Fréchet distance to the reference"),
        ("kid", kid, "lower", tuple(libraries.KID), "Kernel distance (unbiased MMD²) to the reference"),
        ("is", inception_score, "higher", tuple(libraries.IS), "Inception score"),
        ("precision", precision, "higher", ("torch_fidelity",), "Share of generated images near reference images"),
        ("recall", recall, "higher", ("torch_fidelity",), "Share of reference images near generated images"),
    ):
        for library in its_libraries:
            summary = f"{text}, {seen_by}, by {libraries.PACKAGES[library]}."
            view, reference = views[library], () if kind == "is" else ("reference",)
            register_as = metric(
                f"{library}/{kind}{suffix}", better=better, asks=(*view.asks, *reference), needs=view.needs
            )
            register_as(_bound(compute, library, view, summary))
    for library in libraries.FID:
        summary = f"Fréchet distance to the float model's images, {seen_by}, by {libraries.PACKAGES[library]}."
        view = views[library]
        register_as = metric(
            f"{library}/fid{suffix}_to_float", better="lower", paired=True, asks=view.asks, needs=view.needs
        )
        register_as(_bound(_fid_to_float, library, view, summary))


def _fid_to_float(library: str, view: View, evidence: Evidence) -> Measurement:
    return fid(library, view, against_float(evidence), pairs=True)


def _bound(compute: Callable[..., Measurement], library: str, view: View, summary: str) -> Callable:
    def bound(evidence: Evidence) -> Measurement:
        with one_thread() if view.narrow else nullcontext():
            return compute(library, view, evidence)

    bound.__doc__ = summary
    return bound


def _measurement(
    library: str,
    kind: str,
    view: View,
    evidence: Evidence,
    value: float,
    ci95: Interval | None,
    settings: dict[str, Any],
    influence: Influence | None = None,
) -> Measurement:
    if not math.isfinite(value):
        raise MetricSkipped(f"{library} gave {value} for {kind}: too few or degenerate images")
    package = libraries.PACKAGES[library]
    fields = {"reference": None if kind == "is" else evidence.reference, "design": evidence.design.name}
    fields |= view.origin(evidence) | settings
    card = passport(f"{package} {kind}", package, **fields)
    kept = pseudo_values(evidence, value, influence) if influence is not None else None
    return Measurement(value, ci95, len(evidence.generated), card, kept)


def _frechet_influence(pair: Pair, pairs: bool) -> Influence:
    of = frechet.influence_of_pairs if pairs else frechet.influence
    return of(pair.generated_NF.numpy(), pair.reference_MF.numpy())


def _judge_logits(evidence: Evidence) -> Tensor:
    return outputs(evidence.generated.images_NHWC, need_judge(evidence).module, "logits")


def _judge_origin(evidence: Evidence) -> dict[str, Any]:
    judge = need_judge(evidence)
    return {"weights_sha256": judge.sha256, "dtype": "float32", "features": f"judge {judge.name}"}


JUDGE_VIEW = View(judge_pair, _judge_logits, _judge_origin, asks=("judge",), narrow=True)
register(dict.fromkeys(libraries.PACKAGES, JUDGE_VIEW), "_judge", "in the judge's features")
