"""GenEval (Ghosh et al. 2023, arXiv:2310.11513): does a picture show what its prompt asks for, object by object?

A prompt says what to include ([{class, count, color, position: [relation, index of the include it is relative to]}]) and to
exclude; a detector says what is there. The rules are those of the official evaluation (djghosh13/geneval): the `count` most
certain objects of a class are judged; relations hold along an axis when what the centres differ by, less 0.1 of both boxes,
is more than half of the offset's length. The total is the mean of the categories' shares.

`geneval_shapes/…` reads pictures of the shapes world exactly (eval/shapes.py); it is no detector's number. `geneval/…`,
with a detector, is in eval/geneval_detector.py; both go by the rules here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ditbench.eval import shapes
from ditbench.eval.base import Evidence, Measurement, MetricSkipped, PerSample, metric
from ditbench.eval.batches import one_by_one, remembered
from ditbench.eval.passport import passport
from ditbench.eval.statistics import WILSON, WILSON_OF_GROUPS, mean_of_shares_with_ci
from ditbench.harness.models.zoo.shapes import KINDS
from ditbench.harness.samples.samples import Rows

POSITION_MARGIN = 0.1
LEAST_SHARE = 0.5  # of the offset's length along the relation's axis
LEAST_OFFSET = 1e-3  # pixels


@dataclass(frozen=True)
class Found:
    """One detected object. box: left, top, right, bottom; the most certain come first in a list of them."""

    label: str
    colour: str | None
    box: tuple[float, float, float, float]


Reader = Callable[[np.ndarray, dict[str, Any]], list[Found]]  # a uint8 picture, what its prompt says → what is seen


def follows(found: Sequence[Found], about: dict[str, Any]) -> bool:
    """Whether the objects are what the prompt's `include` and `exclude` say."""
    groups: list[list[Found]] = []
    for wanted in about["include"]:
        group = [each for each in found if each.label == wanted["class"]][: wanted["count"]]
        if len(group) < wanted["count"]:
            return False
        if "color" in wanted and sum(each.colour == wanted["color"] for each in group) < wanted["count"]:
            return False
        if "position" in wanted:
            relation, other = wanted["position"]
            if not all(relation in relations(each, target) for each in group for target in groups[other]):
                return False
        groups.append(group)
    excluded = about.get("exclude", ())
    return not any(sum(each.label == e["class"] for each in found) >= e["count"] for e in excluded)


def relations(one: Found, other: Found) -> set[str]:
    """Where `one` is, seen from `other`."""
    boxes = np.array([one.box, other.box], dtype=float).reshape(2, 2, 2)
    centres, sizes = boxes.mean(1), boxes[:, 1] - boxes[:, 0]
    offset = centres[0] - centres[1]
    beyond = np.maximum(np.abs(offset) - POSITION_MARGIN * sizes.sum(0), 0) * np.sign(offset)
    if (np.abs(beyond) < LEAST_OFFSET).all():
        return set()
    x, y = beyond / np.linalg.norm(offset)
    checks = {
        "left of": x < -LEAST_SHARE,
        "right of": x > LEAST_SHARE,
        "above": y < -LEAST_SHARE,
        "below": y > LEAST_SHARE,
    }
    return {name for name, holds in checks.items() if holds}


def need_objects(evidence: Evidence) -> tuple[Rows, list[dict[str, Any]]]:
    """The pictures, and what each one's prompt says is to be seen."""
    images_NHWC, prompts = evidence.generated.images_NHWC, evidence.generated.prompts
    if not prompts or not all({"tag", "include"} <= set(prompt.about) for prompt in prompts):
        raise MetricSkipped("needs prompts in GenEval's format, with tag and include; set protocol.prompts")
    return images_NHWC, [prompt.about for prompt in prompts]


def judged(evidence: Evidence, read: Reader) -> dict[str, np.ndarray]:
    """{category: whether each of its pictures follows its prompt}."""
    images_NHWC, abouts = need_objects(evidence)

    def all_pictures() -> list[bool]:
        pictures = zip(one_by_one(images_NHWC), abouts, strict=True)
        return [follows(read(image.numpy(), about), about) for image, about in pictures]

    results = np.array(remembered(images_NHWC, read, "geneval", all_pictures))
    tags = np.array([about["tag"] for about in abouts])
    return {tag: results[tags == tag] for tag in dict.fromkeys(tags.tolist())}


def share(results: dict[str, np.ndarray], evidence: Evidence) -> tuple[float, tuple[float, float], PerSample]:
    """Mean of the categories' shares, its interval from theirs, and the outcome of each picture."""
    value, ci95 = mean_of_shares_with_ci((int(each.sum()), len(each)) for each in results.values())
    tags_N = np.array([prompt.about["tag"] for prompt in evidence.generated.prompts])
    values_N, strata_N = np.full(len(tags_N), np.nan), np.full(len(tags_N), -1)
    for index, (tag, each) in enumerate(results.items()):
        values_N[tags_N == tag], strata_N[tags_N == tag] = each, index
    return value, ci95, PerSample(values_N, yes_no=True, strata_N=strata_N if len(results) > 1 else None)


def read_shapes(image_HWC: np.ndarray, about: dict[str, Any]) -> list[Found]:
    return [Found(seen.shape, seen.colour, seen.box) for seen in shapes.objects(image_HWC)]


def measured(
    evidence: Evidence, read: Reader, categories: Sequence[str] | None, implementation: str, **origin: Any
) -> Measurement:
    """Mean share of the categories (None: of all there are); origin is what the passport says of the reader."""
    results = judged(evidence, read)
    if categories is not None:
        results = {tag: results[tag] for tag in categories if tag in results}
        if not results:
            raise MetricSkipped(f"no prompt of category {', '.join(categories)} among those drawn; raise protocol.n")
    value, ci95, pictures = share(results, evidence)
    settings = {"ci_method": WILSON_OF_GROUPS if len(results) > 1 else WILSON, "categories": sorted(results)}
    card = passport(implementation, "ditbench", reference=None, **origin, **settings)
    return Measurement(value, ci95, sum(map(len, results.values())), card, pictures)


def _measure_shapes(evidence: Evidence, categories: Sequence[str] | None) -> Measurement:
    return measured(evidence, read_shapes, categories, "ditbench geneval, exact reader", dtype="uint8")


@metric("geneval_shapes/overall", better="higher", asks=("geneval prompts",))
def overall(evidence: Evidence) -> Measurement:
    """Share of pictures of the shapes world that show what was asked, mean over GenEval's categories."""
    return _measure_shapes(evidence, None)


def _category(kind: str) -> None:
    def one(evidence: Evidence) -> Measurement:
        return _measure_shapes(evidence, [kind])

    one.__doc__ = f"Share of pictures of the shapes world that show what was asked: {kind}."
    metric(f"geneval_shapes/{kind}", better="higher", asks=("geneval prompts",))(one)  # reads the docstring


for _kind in KINDS:
    _category(_kind)
