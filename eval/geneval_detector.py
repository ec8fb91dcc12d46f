"""GenEval with a detector, `geneval/…`: objects by Mask2Former, colours by CLIP ViT-L/14, the rules of eval/geneval.py.

As the official evaluation reads a picture (djghosh13/geneval, evaluation/evaluate_images.py): detections above 0.3, in
prompts of counting above 0.9; of each class the 16 most certain, none dropped for overlapping another (its `max_overlap`
is 1). An object's colour is CLIP's choice among ten, by the mean of three templates, for the object cut out along its
mask, laid on #999 and cropped to its box. Detections come out of the network as out of mmdet's `instance_postprocess`:
the 100 most certain pairs of query and class, certainty = class probability · mean mask probability inside the mask.

Departs from it: the detector is Mask2Former's authors' own Swin-S weights in transformers, not those that mmdet trained
(arXiv:2112.01527 for both); the resize to 800 is antialiased, as those weights were trained. Whoever prints these beside published numbers says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ditbench.eval.base import Evidence, Measurement, MetricSkipped, metric
from ditbench.eval.clip import WEIGHT_FILES, Clip, embed_images, embed_texts, load_clip
from ditbench.eval.features import device_of, full_precision
from ditbench.eval.geneval import Found, measured, need_objects
from ditbench.eval.video_judges import CLIP_LARGE, IMAGENET, judge_folder, judge_here, standardised
from ditbench.eval.weights import stored_sha256
from ditbench.harness.common.devices import CPU
from ditbench.harness.common.files import NOT_WHOLE
from ditbench.harness.models.zoo.shapes import KINDS

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
CERTAIN, CERTAIN_TO_COUNT = 0.3, 0.9
MOST_PER_CLASS, MOST_PER_IMAGE = 16, 100
SHORT_SIDE, LONG_SIDE, MULTIPLE = 800, 1333, 32  # of what the detector sees
GREY = 0x99
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {colour} {label}", "a photo of a {colour}-colored {label}", "a photo of a {colour} object")
# COCO's 80 classes in their order, in the words of GenEval's prompts (evaluation/object_names.txt).
_NAMES = """
    person/bicycle/car/motorcycle/airplane/bus/train/truck/boat/traffic light/fire hydrant/stop sign/parking meter/bench/
    bird/cat/dog/horse/sheep/cow/elephant/bear/zebra/giraffe/backpack/umbrella/handbag/tie/suitcase/frisbee/skis/snowboard/
    sports ball/kite/baseball bat/baseball glove/skateboard/surfboard/tennis racket/bottle/wine glass/cup/fork/knife/spoon/
    bowl/banana/apple/sandwich/orange/broccoli/carrot/hot dog/pizza/donut/cake/chair/couch/potted plant/bed/dining table/
    toilet/tv/laptop/computer mouse/tv remote/computer keyboard/cell phone/microwave/oven/toaster/sink/refrigerator/book/
    clock/vase/scissors/teddy bear/hair drier/toothbrush
"""
CLASSES = tuple(name.strip() for name in _NAMES.split("/"))


@dataclass(frozen=True, eq=False)
class Instance:
    """One detection. certainty: 0–1; mask_HW: bool, of the whole picture; box: left, top, right, bottom in pixels."""

    label: str
    certainty: float
    mask_HW: np.ndarray
    box: tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Detector:
    """A reader of pictures. network: transformers' Mask2FormerForUniversalSegmentation with COCO's 80 classes."""

    network: Any
    clip: Clip
    origin: dict[str, Any] = field(default_factory=dict)  # of the passport

    def __call__(self, image_HWC: np.ndarray, about: dict[str, Any]) -> list[Found]:
        least = CERTAIN_TO_COUNT if about["tag"] == "counting" else CERTAIN
        colours_asked = {wanted["class"]: wanted["count"] for wanted in about["include"] if "color" in wanted}
        found, of_class = [], Counter[str]()
        for instance in kept(instances(self.network, image_HWC), least):
            asked = of_class[instance.label] < colours_asked.get(instance.label, 0)
            colour = colour_of(self.clip, image_HWC, instance) if asked else None
            found.append(Found(instance.label, colour, instance.box))
            of_class[instance.label] += 1
        return found


def kept(seen: Iterable[Instance], least: float) -> list[Instance]:
    """Those above `least`, the most certain first, MOST_PER_CLASS of a class."""
    chosen, of_class = [], Counter[str]()
    for instance in sorted(seen, key=lambda each: -each.certainty):
        if instance.certainty > least and of_class[instance.label] < MOST_PER_CLASS:
            chosen.append(instance)
            of_class[instance.label] += 1
    return chosen


@torch.no_grad()
def instances(network: Any, image_HWC: np.ndarray) -> list[Instance]:
    """What the detector sees in a uint8 picture, as far as it could be above CERTAIN."""
    pixels_13HW, (height, width) = prepare(image_HWC, device_of(network))
    with full_precision():
        output = network(pixel_values=pixels_13HW)
    if not bool(output.class_queries_logits.isfinite().all()):
        raise ValueError("NaN or infinity in what the detector makes of a picture")
    scores_QK = output.class_queries_logits[0].float().softmax(-1)[:, :-1]  # the last is "nothing"
    scores_M, pairs_M = scores_QK.flatten().topk(min(MOST_PER_IMAGE, scores_QK.numel()))
    pairs_M = pairs_M[scores_M > CERTAIN]  # a mask can only make it less certain
    if len(pairs_M) == 0:
        return []
    queries_M, labels_M = pairs_M // scores_QK.shape[1], pairs_M % scores_QK.shape[1]
    logits_1Mhw = output.masks_queries_logits[:, queries_M].float()
    padded_1MHW = F.interpolate(logits_1Mhw, pixels_13HW.shape[-2:], mode="bilinear", align_corners=False)
    own_1MHW = padded_1MHW[..., :height, :width]
    logits_MHW = F.interpolate(own_1MHW, image_HWC.shape[:2], mode="bilinear", align_corners=False)[0]
    inside_MHW = logits_MHW > 0
    certain_M = (logits_MHW.sigmoid() * inside_MHW).sum((1, 2)) / (inside_MHW.sum((1, 2)) + 1e-6)
    certain_M = certain_M * scores_QK[queries_M, labels_M]
    rows = zip(labels_M.tolist(), certain_M.tolist(), inside_MHW.cpu().numpy(), strict=True)
    return [Instance(CLASSES[label], certain, mask, box_of(mask)) for label, certain, mask in rows if mask.any()]


def prepare(image_HWC: np.ndarray, device: torch.device = CPU) -> tuple[Tensor, tuple[int, int]]:
    """The picture at the size the detector takes, padded to whole patches, and its height and width without the padding."""
    image_13HW = torch.from_numpy(image_HWC).to(device).permute(2, 0, 1)[None].float()
    height, width = image_HWC.shape[:2]
    scale = min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))
    size = int(height * scale + 0.5), int(width * scale + 0.5)
    resized = F.interpolate(image_13HW, size, mode="bilinear", antialias=True, align_corners=False).round()
    padding = (0, -size[1] % MULTIPLE, 0, -size[0] % MULTIPLE)
    return F.pad(standardised(resized, IMAGENET), padding), size


def box_of(mask_HW: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.where(mask_HW.any(1))[0], np.where(mask_HW.any(0))[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def colour_of(clip: Clip, image_HWC: np.ndarray, instance: Instance) -> str:
    cosine_K = embed_images(clip, cut_out(image_HWC, instance)) @ colour_classifier(clip, instance.label).T
    return COLOURS[int(cosine_K.argmax())]


def cut_out(image_HWC: np.ndarray, instance: Instance) -> Tensor:
    """The object alone on grey, (1, h, w, 3)."""
    left, top, right, bottom = instance.box
    alone_HWC = np.where(instance.mask_HW[..., None], image_HWC, np.uint8(GREY))
    return torch.from_numpy(alone_HWC[None, top:bottom, left:right])


@cache
def colour_classifier(clip: Clip, label: str) -> Tensor:
    """One unit vector per colour: the mean over templates."""
    texts = tuple(template.format(colour=colour, label=label) for colour in COLOURS for template in TEMPLATES)
    return F.normalize(embed_texts(clip, texts).unflatten(0, (len(COLOURS), len(TEMPLATES))).mean(1), dim=-1)


@cache
def load_detector(folder: Path, clip_folder: Path, device: torch.device) -> Detector:
    """From folders as `hf download` leaves them; MetricSkipped where they are not whole."""
    from transformers import Mask2FormerForUniversalSegmentation

    weights = next((folder / file for file in WEIGHT_FILES if (folder / file).is_file()), None)
    again = f"fetch it with: hf download {DETECTOR}"
    if weights is None:
        raise MetricSkipped(f"{folder}: no {' or '.join(WEIGHT_FILES)}; {again}")
    try:
        network = Mask2FormerForUniversalSegmentation.from_pretrained(folder, local_files_only=True)
    except NOT_WHOLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise MetricSkipped(f"{folder}: not a whole {DETECTOR} ({reason}); {again}") from error
    if network.config.num_labels != len(CLASSES):
        raise MetricSkipped(
            f"{folder}: expected COCO's {len(CLASSES)} classes, came {network.config.num_labels}; {again}"
        )
    clip = load_clip(str(clip_folder), device)
    origin = {
        "weights_sha256": stored_sha256(weights),
        "resize": f"bilinear, short side to {SHORT_SIDE}, long side to at most {LONG_SIDE}",
        "antialias": True,
        "dtype": "float32",
        "features": f"{DETECTOR} by transformers; GenEval's is mmdet's mask2former_swin-s",
        "certainty": {"counting": CERTAIN_TO_COUNT, "else": CERTAIN},
        "most_per_class": MOST_PER_CLASS,
        "overlap": "none dropped, as GenEval's max_overlap 1.0",
        "colour": f"CLIP {CLIP_LARGE}, masked crop on #999, {len(COLOURS)} colours, {len(TEMPLATES)} templates",
        "colour_sha256": clip.sha256,
    }
    return Detector(network.float().eval().requires_grad_(False).to(device), clip, origin)


def _measure(evidence: Evidence, categories: tuple[str, ...]) -> Measurement:
    _, abouts = need_objects(evidence)
    if missing := set(categories) - {about["tag"] for about in abouts}:
        raise MetricSkipped(f"no prompt of category {', '.join(sorted(missing))} among those drawn; raise protocol.n")
    if unknown := {wanted["class"] for about in abouts for wanted in about["include"]} - set(CLASSES):
        raise MetricSkipped(f"the detector knows COCO's classes, the prompts ask for {', '.join(sorted(unknown)[:3])}")
    detector = load_detector(judge_folder(DETECTOR), judge_folder(CLIP_LARGE), evidence.device)
    return measured(evidence, detector, categories, "ditbench geneval, Mask2Former", **detector.origin)


ASKS, NEEDS = ("geneval prompts",), (judge_here(DETECTOR), judge_here(CLIP_LARGE))


@metric("geneval/overall", better="higher", asks=ASKS, needs=NEEDS)
def overall(evidence: Evidence) -> Measurement:
    """Share of pictures that show what was asked by Mask2Former and CLIP, mean over GenEval's six categories."""
    return _measure(evidence, KINDS)


def _category(kind: str) -> None:
    def one(evidence: Evidence) -> Measurement:
        return _measure(evidence, (kind,))

    one.__doc__ = f"Share of pictures that show what was asked by Mask2Former and CLIP: {kind}."
    metric(f"geneval/{kind}", better="higher", asks=ASKS, needs=NEEDS)(one)


for _kind in KINDS:
    _category(_kind)
