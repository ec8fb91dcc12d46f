"""FID, KID, IS, precision and recall: how the generated images, as a set, differ from the reference.

Every metric here exists once per library and once per feature space. `<library>/<metric>_judge` looks through the
judge that comes with the model, `<library>/<metric>` (eval/inception.py) through Inception; the two are never mixed.

`…_to_float` takes the float model's images for the reference: how far the quantized model has moved, not how good either
is. Those numbers have names of their own, because papers that print them as "FID" cannot be compared with the others.

Moments of the reference come from the images of the reference batch. ADM's evaluator (guided-diffusion,
evaluations/evaluator.py, read_statistics) takes those the .npz stores (`mu`, `sigma`: the whole training set), so papers that
used it print another FID of the same images, as a rule a lower one (fewer samples bias it upwards: Chong & Forsyth 2020,
arXiv:1911.07023).

An interval says how the number would move with n other images of the same model. That FID falls as n grows is not in
it: compare at equal n.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ditbench.eval import libraries, resampling
from ditbench.eval.base import Evidence, Measurement, MetricSkipped, Need, metric
from ditbench.eval.features import Pair, against_float, judge_pair, need_judge, one_thread, outputs
from ditbench.eval.passport import need_samples, passport
from ditbench.eval.statistics import NORMAL_BOOTSTRAP, PAIRED_BOOTSTRAP, WILSON, around, bootstrap_sd, share_with_ci


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
    """pairs: row i of the reference has the noise of generated row i, so both are resampled together."""
    pair = view.pair(evidence)
    (n, width), m = pair.generated_NF.shape, len(pair.reference_MF)
    value, settings = libraries.FID[library](pair.generated_NF, pair.reference_MF, evidence.seed)
    resamples = resampling.frechet_resamples(width, evidence.resamples)
    sd = pair.once("fid sd", lambda: _frechet_sd(pair, evidence.seed, resamples, pairs))
    if n <= width:
        settings["note"] = f"n = {n} is not above the feature width {width}: compare at equal n only"
    elif m <= width:
        settings["note"] = (
            f"the reference's {m} are not above the feature width {width}: compare with this reference only"
        )
    if not pairs:
        settings["reference_moments"] = f"of the reference batch's {m} images"
    settings |= {"ci_method": PAIRED_BOOTSTRAP if pairs else NORMAL_BOOTSTRAP, "resamples": resamples}
    low, high = around(value, sd)
    return _measurement(library, "fid", view, evidence, value, (max(low, min(value, 0.0)), high), settings)


def kid(library: str, view: View, evidence: Evidence) -> Measurement:
    pair = view.pair(evidence)
    value, settings = libraries.KID[library](pair.generated_NF, pair.reference_MF, evidence.seed)
    sd = pair.once(
        "kid sd",
        lambda: resampling.kernel_sd(
            pair.generated_NF.numpy(), pair.reference_MF.numpy(), evidence.seed, evidence.resamples
        ),
    )
    settings |= {"ci_method": NORMAL_BOOTSTRAP, "resamples": evidence.resamples}
    return _measurement(library, "kid", view, evidence, value, around(value, sd), settings)


def inception_score(library: str, view: View, evidence: Evidence) -> Measurement:
    need_samples(evidence, 2)
    logits_NK = view.logits(evidence)
    value, settings = libraries.IS[library](logits_NK, evidence.seed)
    sd = resampling.inception_score_sd(logits_NK.numpy(), settings["splits"], evidence.seed, evidence.resamples)
    settings |= {"ci_method": NORMAL_BOOTSTRAP, "resamples": evidence.resamples}
    return _measurement(library, "is", view, evidence, value, around(value, sd), settings)


def precision(library: str, view: View, evidence: Evidence) -> Measurement:
    pair = view.pair(evidence)
    value, _, settings = pair.once("prc", lambda: libraries.torch_fidelity_prc(pair.generated_NF, pair.reference_MF))
    n = len(pair.generated_NF)
    _, ci95 = share_with_ci(round(value * n), n)
    return _measurement(library, "precision", view, evidence, value, ci95, settings | {"ci_method": WILSON})


def recall(library: str, view: View, evidence: Evidence) -> Measurement:
    pair = view.pair(evidence)
    n = need_samples(evidence, 4)  # half of them must still have a neighbour
    _, value, settings = pair.once("prc", lambda: libraries.torch_fidelity_prc(pair.generated_NF, pair.reference_MF))
    if n > libraries.PRC_WHOLE_MATRIX:
        settings = settings | {"ci_method": f"none: too slow above {libraries.PRC_WHOLE_MATRIX} images"}
        return _measurement(library, "recall", view, evidence, value, None, settings)
    recall_of = resampling.recall(pair.generated_NF, pair.reference_MF, settings["neighbours"])
    low, high = around(value, resampling.halves_sd(recall_of, n, evidence.seed))
    settings = settings | {"ci_method": resampling.HALVES_METHOD, "resamples": resampling.HALVES}
    return _measurement(library, "recall", view, evidence, value, (max(low, 0.0), min(high, 1.0)), settings)


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
    ci95: tuple[float, float] | None,
    settings: dict[str, Any],
) -> Measurement:
    if not math.isfinite(value):
        raise MetricSkipped(f"{library} gave {value} for {kind}: too few or degenerate images")
    package = libraries.PACKAGES[library]
    fields = {"reference": None if kind == "is" else evidence.reference, **view.origin(evidence), **settings}
    return Measurement(value, ci95, len(evidence.generated), passport(f"{package} {kind}", package, **fields))


def _frechet_sd(pair: Pair, seed: int, resamples: int, pairs: bool) -> float:
    statistic = resampling.frechet_of_pairs if pairs else resampling.frechet
    distance = statistic(pair.generated_NF.numpy(), pair.reference_MF.numpy())
    return bootstrap_sd(distance, len(pair.generated_NF), seed, resamples)


def _judge_logits(evidence: Evidence) -> Tensor:
    return outputs(evidence.generated.images_NHWC, need_judge(evidence).module, "logits")


def _judge_origin(evidence: Evidence) -> dict[str, Any]:
    judge = need_judge(evidence)
    return {"weights_sha256": judge.sha256, "dtype": "float32", "features": f"judge {judge.name}"}


_JUDGE = View(judge_pair, _judge_logits, _judge_origin, asks=("judge",), narrow=True)
register(dict.fromkeys(libraries.PACKAGES, _JUDGE), "_judge", "in the judge's features")
