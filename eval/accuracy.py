"""Does the judge see in each image what was asked for?"""

from __future__ import annotations

from ditbench.eval.base import Evidence, Measurement, MetricSkipped, metric
from ditbench.eval.features import need_judge, outputs
from ditbench.eval.passport import need_samples
from ditbench.eval.per_sample import mean_or_share


@metric("accuracy", better="higher", asks=("judge", "labels"))
def accuracy(evidence: Evidence) -> Measurement:
    """Share of images that the judge recognises as the label asked for."""
    need_samples(evidence, 1)
    judge = need_judge(evidence)
    if evidence.generated.labels_N is None:
        raise MetricSkipped("the generated images carry no labels; this model is not class-conditional")
    logits_NK = outputs(evidence.generated.images_NHWC, judge.module, "logits")
    right_N = logits_NK.argmax(dim=1) == evidence.generated.labels_N.cpu()
    settings = {"weights_sha256": judge.sha256, "dtype": "float32", "judge": judge.name}
    return mean_or_share(evidence, right_N, "ditbench accuracy", "ditbench", **settings)
