"""ImageReward: what people would prefer, given the prompt (Xu et al. 2023, arXiv:2304.05977).

The score is the package image-reward's own (ImageReward-v1.0), the mean over the images. The package and its weights
must be here already; nothing is downloaded. The package reads the first 35 tokens of a prompt (about 25 words), without a word about the
rest: the passport counts the prompts that lost some.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ditbench.eval.base import Evidence, Measurement, MetricSkipped, metric
from ditbench.eval.batches import one_by_one
from ditbench.eval.clip import need_prompts
from ditbench.eval.features import full_precision
from ditbench.eval.needs import package
from ditbench.eval.passport import need_samples
from ditbench.eval.per_sample import mean_or_share
from ditbench.eval.prompt_lengths import cut_off
from ditbench.eval.weights import stored_sha256
from ditbench.harness.common.files import NOT_WHOLE
from ditbench.harness.samples.samples import Rows

PACKAGE = "ImageReward"
HUB = "THUDM/ImageReward"
TOKENIZER = "google-bert/bert-base-uncased"
FILES = ("ImageReward.pt", "med_config.json")

MAX_TOKENS = 35  # image-reward 1.5, ImageReward.py, score: truncation=True, max_length=35

Scorer = Callable[[str, Image.Image], float]


_package = package(PACKAGE, "image-reward")


def _weights() -> str | None:
    return None if _local_files() else f"ImageReward's weights are not here; `hf download {HUB} {' '.join(FILES)}`"


def _tokenizer() -> str | None:
    from huggingface_hub import try_to_load_from_cache

    here = isinstance(try_to_load_from_cache(TOKENIZER, "vocab.txt"), str)
    return None if here else f"ImageReward's tokenizer is not here; `hf download {TOKENIZER}`"


@metric("image_reward", better="higher", asks=("prompts",), needs=(_package, _weights, _tokenizer))
def image_reward(evidence: Evidence) -> Measurement:
    """ImageReward-v1.0 of image and prompt, mean over the samples."""
    need_samples(evidence, 1)
    images_NHWC, texts = evidence.generated.images_NHWC, need_prompts(evidence.generated)
    if problem := _package() or _weights():
        raise MetricSkipped(problem)
    weights, config = _local_files()
    model = load_model(weights, config, evidence.device)
    values_N = rewards(model.score, images_NHWC, texts)
    return mean_or_share(
        evidence, values_N, "image-reward ImageReward-v1.0", "image-reward", weights_sha256=stored_sha256(weights),
        dtype="float32", resize="the package's own: bicubic, short side to 224, centre crop", antialias=True,
        **cut_off(model.blip.tokenizer, MAX_TOKENS, texts),
    )  # fmt: skip


def rewards(scorer: Scorer, images_NHWC: Rows, texts: tuple[str, ...]) -> Tensor:
    """One score per image and its prompt, float64."""
    images = (Image.fromarray(image.cpu().numpy()) for image in one_by_one(images_NHWC))
    with torch.no_grad(), full_precision():
        scores = [float(scorer(text, image)) for text, image in zip(texts, images, strict=True)]
    return torch.tensor(scores, dtype=torch.float64)


@cache
def load_model(weights: Path, config: Path, device: torch.device) -> Any:
    """The package's model: `score` is its Scorer, `blip.tokenizer` BERT's tokenizer."""
    import ImageReward

    try:
        return ImageReward.load(str(weights), device=str(device), med_config=str(config))
    except NOT_WHOLE as error:  # its tokenizer is BERT's, from the hub
        raise MetricSkipped(
            f"ImageReward could not be loaded ({(str(error) or type(error).__name__).splitlines()[0][:200]}); "
            f"`hf download {TOKENIZER}` fetches its tokenizer"
        ) from error


def _local_files() -> list[Path]:
    """Both FILES, or nothing."""
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(HUB, file) for file in FILES]
    return [Path(str(path)) for path in found] if all(isinstance(path, str) for path in found) else []
