"""GenEval (Ghosh et al. 2023, arXiv:2310.11513): does a picture show what its prompt asks for, object by object?

A prompt says what to include ([{class, count, color, position: [relation, index of the include it is relative to]}]) and to
exclude; a detector says what is there. The rules are those of the official evaluation (djghosh13/geneval): the `count` most
certain objects of a class are judged; relations hold along an axis when the centres differ by more than 0.1 of both boxes
and that axis makes up at least half of the offset's length. The total is the mean of the categories' shares.

`geneval_shapes/…` reads pictures of the shapes world exactly (eval/shapes.py); it is no detector's number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval import shapes
from eval.base import Evidence, Measurement, MetricSkipped, PerSample, metric
from eval.features import remembered
from eval.passport import passport
from eval.statistics import WILSON, WILSON_OF_GROUPS, mean_of_shares_with_ci
from harness.models.zoo.shapes import KINDS

POSITION_MARGIN = 0.1
LEAST_SHARE = 0.5  # of the offset's length along the relation's axis


@dataclass(frozen=True)
class Found:
    """One detected object. box: left, top, right, bottom; the most certain come first in a list of them."""

    label: str
    colour: str | None
    box: tuple[float, float, float, float]


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
    offset = np.maximum(np.abs(offset) - POSITION_MARGIN * sizes.sum(0), 0) * np.sign(offset)
    if not offset.any():
        return set()
    x, y = offset / np.linalg.norm(offset)
    checks = {
        "left of": x < -LEAST_SHARE,
        "right of": x > LEAST_SHARE,
        "above": y < -LEAST_SHARE,
        "below": y > LEAST_SHARE,
    }
    return {name for name, holds in checks.items() if holds}


def judged(evidence: Evidence, detect: Callable[[np.ndarray], list[Found]]) -> dict[str, np.ndarray]:
    """{category: whether each of its pictures follows its prompt}."""
    generated = evidence.generated
    if not generated.prompts or not all("include" in prompt.about for prompt in generated.prompts):
        raise MetricSkipped("needs prompts in GenEval's format, with tag and include; set protocol.prompts")

    def all_pictures() -> list[bool]:
        pictures = generated.images_NHWC.numpy()
        return [follows(detect(image), p.about) for image, p in zip(pictures, generated.prompts, strict=True)]

    results = np.array(remembered(generated.images_NHWC, detect, "geneval", all_pictures))
    tags = np.array([prompt.about["tag"] for prompt in generated.prompts])
    return {tag: results[tags == tag] for tag in dict.fromkeys(tags.tolist())}


def share(results: dict[str, np.ndarray], evidence: Evidence) -> tuple[float, tuple[float, float], PerSample]:
    """Mean of the categories' shares, its interval from theirs, and the outcome of each picture."""
    value, ci95 = mean_of_shares_with_ci((int(each.sum()), len(each)) for each in results.values())
    tags_N = np.array([prompt.about["tag"] for prompt in evidence.generated.prompts])
    values_N, strata_N = np.full(len(tags_N), np.nan), np.full(len(tags_N), -1)
    for index, (tag, each) in enumerate(results.items()):
        values_N[tags_N == tag], strata_N[tags_N == tag] = each, index
    return value, ci95, PerSample(values_N, yes_no=True, strata_N=strata_N if len(results) > 1 else None)


def read_shapes(image_HWC: np.ndarray) -> list[Found]:
    return [Found(seen.shape, seen.colour, seen.box) for seen in shapes.objects(image_HWC)]


def _measure(evidence: Evidence, categories: Sequence[str] | None) -> Measurement:
    results = judged(evidence, read_shapes)
    if categories is not None:
        results = {tag: results[tag] for tag in categories if tag in results}
        if not results:
            raise MetricSkipped(f"no prompt of category {', '.join(categories)} among those drawn; raise protocol.n")
    value, ci95, pictures = share(results, evidence)
    settings = {"ci_method": WILSON_OF_GROUPS if len(results) > 1 else WILSON, "categories": sorted(results)}
    card = passport("ditbench geneval, exact reader", "ditbench", reference=None, dtype="uint8", **settings)
    return Measurement(value, ci95, sum(map(len, results.values())), card, pictures)


@metric("geneval_shapes/overall", better="higher", asks=("geneval prompts",))
def overall(evidence: Evidence) -> Measurement:
    """Share of pictures of the shapes world that show what was asked, mean over GenEval's categories."""
    return _measure(evidence, None)


def _category(kind: str) -> None:
    @metric(f"geneval_shapes/{kind}", better="higher", asks=("geneval prompts",))
    def one(evidence: Evidence) -> Measurement:
        return _measure(evidence, [kind])

    one.__doc__ = f"Share of pictures of the shapes world that show what was asked: {kind}."


for _kind in KINDS:
    _category(_kind)
