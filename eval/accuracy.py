"""Does the judge see in each image what was asked for?"""

from __future__ import annotations

from eval.base import Evidence, Measurement, MetricSkipped, metric
from eval.features import need_judge, outputs
from eval.passport import need_samples, passport
from eval.statistics import WILSON, share_with_ci


@metric("accuracy", better="higher")
def accuracy(evidence: Evidence) -> Measurement:
    """Share of images that the judge recognises as the label asked for."""
    n = need_samples(evidence, 1)
    judge = need_judge(evidence)
    if evidence.generated.labels_N is None:
        raise MetricSkipped("the generated images carry no labels; this model is not class-conditional")
    logits_NK = outputs(evidence.generated.images_NHWC, judge.module, "logits")
    hits = int((logits_NK.argmax(dim=1) == evidence.generated.labels_N.cpu()).sum())
    value, ci95 = share_with_ci(hits, n)
    settings = passport(
        "ditbench accuracy", "ditbench", reference=None, weights_sha256=judge.sha256, dtype="float32", judge=judge.name,
        ci_method=WILSON,
    )  # fmt: skip
    return Measurement(value, ci95, n, settings)
