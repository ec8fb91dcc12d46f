"""Networks that look at single frames: DINO and CLIP by transformers, from this machine only.

A judge is a folder as `hf download` leaves it. It is looked for in `$DITBENCH_JUDGES/<owner>/<name>`, then in the local
Hugging Face cache; nothing is downloaded. All classes are transformers' own; the preprocessing is written in torch,
for frames that are in memory already, with the constants of each network's preprocessor_config.json.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from ditbench.eval.base import MetricSkipped, Need
from ditbench.eval.batches import remembered
from ditbench.eval.features import channels_first, device_of, full_precision
from ditbench.eval.weights import stored_sha256
from ditbench.harness.common.files import NOT_WHOLE
from ditbench.harness.samples.samples import Rows

DINO = "facebook/dino-vitb16"
CLIP = "openai/clip-vit-base-patch32"
CLIP_LARGE = "openai/clip-vit-large-patch14"

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, standard deviation
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
BATCH = 64


class DinoJudge(nn.Module):
    """The normalised class token, as DINO's own hub model gives it. The short side is resized, nothing is cropped."""

    def __init__(self, folder: Path) -> None:
        from transformers import ViTModel

        super().__init__()
        self.network = ViTModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
        self.side: Any = self.network.config.image_size
        self.resize = f"bilinear, short side to {self.side}"

    def forward(self, frames_B3HW: Tensor, antialias: bool) -> Tensor:
        resized = resize_short_side(frames_B3HW, self.side, "bilinear", antialias)
        output = self.network(standardised(resized, IMAGENET), interpolate_pos_encoding=True)
        return output.last_hidden_state[:, 0]


class ClipJudge(nn.Module):
    """CLIP's embeddings of frames and of texts, before normalisation."""

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        super().__init__()
        self.network = CLIPModel.from_pretrained(folder, local_files_only=True)
        config: Any = self.network.config
        self.side, self.max_tokens = config.vision_config.image_size, config.text_config.max_position_embeddings
        self.resize = f"bicubic, short side to {self.side}, center crop"
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)

    def forward(self, frames_B3HW: Tensor, antialias: bool) -> Tensor:
        cropped = center_crop(resize_short_side(frames_B3HW, self.side, "bicubic", antialias), self.side)
        pooled = self.network.vision_model(standardised(cropped, OPENAI)).pooler_output
        return self.network.visual_projection(pooled)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """(N, width), of unit length; what is beyond the network's tokens (77) is cut off."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        pooled = self.network.text_model(**tokens.to(device_of(self))).pooler_output
        return normalize(self.network.text_projection(pooled), dim=-1).cpu()


def frame_features(videos_NFHWC: Rows, judge: nn.Module, antialias: bool) -> Tensor:
    """(N, F, width), of unit length, float32 on the CPU."""

    def all_frames() -> Tensor:
        with full_precision():
            batches = [
                normalize(judge(batch.to(device_of(judge)), antialias).float(), dim=-1).cpu()
                for batch in channels_first(videos_NFHWC, BATCH)
            ]
        return torch.cat(batches).unflatten(0, videos_NFHWC.shape[:2])

    return remembered(videos_NFHWC, judge, f"frames, antialias={antialias}", all_frames)


def load_judge(name: str, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """A DinoJudge for DINO, a ClipJudge for CLIP and CLIP_LARGE, and its passport fields.

    MetricSkipped, with the command that fetches it, where it is not on this machine.
    """
    folder = judge_folder(name)
    judge = _load(name, folder, device)
    weights = next(folder / file for file in ("model.safetensors", "pytorch_model.bin") if (folder / file).exists())
    origin = {"features": name, "weights_sha256": stored_sha256(weights), "resize": judge.resize, "dtype": "float32"}
    return judge, origin


def judge_here(name: str) -> Need:
    """For `metric(needs=…)`: whether its folder is on this machine."""

    def missing() -> str | None:
        try:
            judge_folder(name)
        except MetricSkipped as problem:
            return str(problem)
        return None

    return missing


def judge_folder(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if os.environ.get("DITBENCH_JUDGES") and (folder := Path(os.environ["DITBENCH_JUDGES"]) / name).is_dir():
        return folder
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise MetricSkipped(f"{name} is not on this machine; fetch it with: hf download {name}") from error


@cache
def _load(name: str, folder: Path, device: torch.device) -> Any:
    try:
        judge = DinoJudge(folder) if name == DINO else ClipJudge(folder)
    except NOT_WHOLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise MetricSkipped(f"{folder}: not a whole {name} ({reason}); fetch it with: hf download {name}") from error
    return judge.float().eval().requires_grad_(False).to(device)


def resize_short_side(frames_B3HW: Tensor, side: int, mode: str, antialias: bool) -> Tensor:
    """uint8 → float 0–255. Antialiased as PIL does it, to whole levels; else as VBench does it, in float throughout."""
    height, width = frames_B3HW.shape[-2:]
    short = min(height, width)
    size = [side if edge == short else int(side * edge / short) for edge in (height, width)]
    resized = interpolate(frames_B3HW.float(), size=size, mode=mode, antialias=antialias, align_corners=False)
    return resized.round().clamp(0, 255) if antialias else resized


def center_crop(frames_B3HW: Tensor, side: int) -> Tensor:
    height, width = frames_B3HW.shape[-2:]
    top, left = round((height - side) / 2), round((width - side) / 2)
    return frames_B3HW[..., top : top + side, left : left + side]


def standardised(frames_B3HW: Tensor, constants: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    mean, std = (torch.tensor(values, device=frames_B3HW.device).view(3, 1, 1) for values in constants)
    return (frames_B3HW / 255.0 - mean) / std
