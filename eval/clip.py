"""CLIP as a judge: images and texts as unit vectors of one space (Radford et al. 2021, arXiv:2103.00020).

Weights and tokenizer come from `$DITBENCH_JUDGES/<owner>/<name>`, from Hugging Face's local cache, or from a folder that
`save_pretrained` wrote; nothing is downloaded here. Images are prepared in torch as CLIP's own preprocessing does it with PIL: bicubic antialiased resize
of the short side, rounded to uint8, centre crop, CLIP's mean and deviation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditbench.eval.base import MetricSkipped, Need
from ditbench.eval.batches import remembered
from ditbench.eval.features import channels_first, device_of, full_precision
from ditbench.eval.video_judges import judge_folder
from ditbench.eval.weights import stored_sha256
from ditbench.harness.common.devices import CPU
from ditbench.harness.common.files import NOT_WHOLE
from ditbench.harness.samples.samples import Rows, Samples

HUB = {
    "b32": "openai/clip-vit-base-patch32",
    "l14": "openai/clip-vit-large-patch14",
    "l14_336": "openai/clip-vit-large-patch14-336",
}  # our name → the hub's, or a folder
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
BATCH = 32


@dataclass(frozen=True, eq=False)
class Clip:
    """name as it was asked for; side: of the square images it takes, in pixels; sha256: of its weight file."""

    name: str
    module: Any  # transformers' CLIPModel
    tokenizer: Any
    side: int
    max_tokens: int
    sha256: str

    @property
    def passport(self) -> dict[str, Any]:
        return {"weights_sha256": self.sha256, "dtype": "float32", "features": f"CLIP {self.name}"}


@cache
def load_clip(name_or_folder: str, device: torch.device) -> Clip:
    """CLIP by its name on the hub, if it is on this machine, or from a folder; MetricSkipped where it is not."""
    weights = _weight_file(name_or_folder)
    if weights is None:
        raise MetricSkipped(_not_here(name_or_folder))
    from transformers import AutoTokenizer, CLIPModel

    try:
        module = CLIPModel.from_pretrained(weights.parent, local_files_only=True).float().eval()
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, local_files_only=True)
    except NOT_WHOLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise MetricSkipped(
            f"CLIP {name_or_folder} is here but cannot be read ({reason}); fetch it again with "
            f"`hf download {name_or_folder} --force-download`"
        ) from error
    config = module.config
    return Clip(
        name_or_folder,
        module.to(device),
        tokenizer,
        config.vision_config.image_size,
        config.text_config.max_position_embeddings,
        stored_sha256(weights),
    )


def embed_images(clip: Clip, images_NHWC: Rows, *, crop_first: bool = False) -> Tensor:
    """Unit vectors (N, width), float32 on the CPU."""

    def embed() -> Tensor:
        rows = []
        with full_precision():
            for batch in channels_first(images_NHWC, BATCH):
                pixels = prepare(batch, clip.side, crop_first=crop_first, device=device_of(clip.module))
                seen = clip.module.vision_model(pixel_values=pixels).pooler_output
                rows.append(F.normalize(clip.module.visual_projection(seen), dim=-1).cpu())
        return torch.cat(rows)

    return remembered(images_NHWC, clip.module, f"clip, crop first {crop_first}", embed)


def embed_texts(clip: Clip, texts: tuple[str, ...]) -> Tensor:
    """Unit vectors (N, width), float32 on the CPU; what is longer than CLIP's context is cut off."""
    rows = []
    with torch.no_grad(), full_precision():
        for start in range(0, len(texts), BATCH):
            tokens = clip.tokenizer(
                list(texts[start : start + BATCH]),
                padding=True,
                truncation=True,
                max_length=clip.max_tokens,
                return_tensors="pt",
            ).to(device_of(clip.module))
            read = clip.module.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            rows.append(F.normalize(clip.module.text_projection(read.pooler_output), dim=-1).cpu())
    return torch.cat(rows)


def prepare(images_BCHW: Tensor, side: int, *, crop_first: bool = False, device: torch.device = CPU) -> Tensor:
    """uint8 (B, 3, H, W) on the CPU → what CLIP takes, float32 (B, 3, side, side), on the device.

    crop_first: the middle square is cut out before it is resized, as CMMD's authors do (google-research, cmmd/io_util.py);
    CLIP itself resizes, then crops. Square images come out the same.
    """
    if crop_first:
        images_BCHW = center_square(images_BCHW, min(images_BCHW.shape[-2:]))
    height, width = images_BCHW.shape[-2:]
    short = min(height, width)
    size = side * height // short, side * width // short
    # In uint8 torch rounds after each of the two passes, as PIL does; it can do so on the CPU only.
    images = F.interpolate(images_BCHW, size, mode="bicubic", antialias=True, align_corners=False)
    images = center_square(images, side).to(device).float()
    mean, deviation = (images.new_tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return (images / 255.0 - mean) / deviation


def center_square(images_BCHW: Tensor, side: int) -> Tensor:
    height, width = images_BCHW.shape[-2:]
    top, left = (height - side) // 2, (width - side) // 2
    return images_BCHW[..., top : top + side, left : left + side]


def clip_here(name: str) -> Need:
    """For `metric(needs=…)`; name: one of HUB."""
    return lambda: None if _weight_file(HUB[name]) else _not_here(HUB[name])


def need_prompts(samples: Samples) -> tuple[str, ...]:
    """The text each sample was made from."""
    if not samples.prompts:
        raise MetricSkipped("the samples carry no prompts; this metric is for text-to-image models")
    if len(samples.prompts) != len(samples):
        raise ValueError(f"clip: {len(samples)} samples but {len(samples.prompts)} prompts; give one per sample")
    return tuple(prompt.text for prompt in samples.prompts)


def _not_here(name_or_folder: str) -> str:
    return f"CLIP {name_or_folder} is not here; fetch it with `hf download {name_or_folder}`"


def _weight_file(name_or_folder: str) -> Path | None:
    try:
        folder = Path(name_or_folder) if Path(name_or_folder).is_dir() else judge_folder(name_or_folder)
    except MetricSkipped:
        return None
    return next((folder / file for file in WEIGHT_FILES if (folder / file).is_file()), None)
