"""`tiny-video`: text to video on the shapes world, eight frames of one moving object.

A real `CogVideoXPipeline` without a VAE: it denoises 24×24 RGB pixels in patches of 8×8 pixels and four frames, text and video
in one sequence, and reads captions as `tiny-t2i` does.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn

from ditbench.harness.models.zoo import shapes
from ditbench.harness.zoo import card
from ditbench.harness.zoo.captioned import (
    TEXT_LENGTH,
    TEXT_WIDTH,
    new_text_encoder,
    tokenizer,
    train_captioned,
    zero,
)
from ditbench.harness.zoo.training import Schedule, minutes_of

FRAMES, SIDE = 8, 24
FRAMES_PER_TOKEN = 4  # as CogVideoX 1.5 has two; with one, frames came out in any order for want of training
BATCH = 32
TEMPORAL_RATIO = 4  # the pipeline's own, without a VAE to ask: 8 latent frames are "29" frames
TRANSFORMER = {
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "in_channels": 3,
    "out_channels": 3,
    "time_embed_dim": 96,
    "text_embed_dim": TEXT_WIDTH,
    "num_layers": 4,
    "sample_width": SIDE,
    "sample_height": SIDE,
    "sample_frames": (FRAMES - 1) * TEMPORAL_RATIO + 1,
    "temporal_compression_ratio": TEMPORAL_RATIO,
    "patch_size": shapes.CELL,
    "max_text_seq_length": TEXT_LENGTH,
    "spatial_interpolation_scale": 1.0,
    "patch_size_t": FRAMES_PER_TOKEN,
    "patch_bias": True,
    "use_rotary_positional_embeddings": True,
}
SCHEDULE = Schedule(steps=14000, learning_rate=1e-3)


def scheduler() -> CogVideoXDDIMScheduler:
    return CogVideoXDDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
        prediction_type="sample", rescale_betas_zero_snr=False, snr_shift_scale=1.0, clip_sample=False,
    )  # fmt: skip


class TextToVideo(nn.Module):
    """Both parts that are trained."""

    def __init__(self, text_encoder: nn.Module, transformer: nn.Module) -> None:
        super().__init__()
        self.text_encoder, self.transformer = text_encoder, transformer
        cells = SIDE // shapes.CELL
        self.rotary = get_3d_rotary_pos_embed(  # as CogVideoXPipeline makes them for CogVideoX 1.5
            TRANSFORMER["attention_head_dim"],
            crops_coords=None,
            grid_size=(cells, cells),
            temporal_size=FRAMES // FRAMES_PER_TOKEN,
            grid_type="slice",
            max_size=(cells, cells),
        )

    def forward(self, noisy: Tensor, timestep: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        text_BTC = self.text_encoder(input_ids=tokens["input_ids"]).last_hidden_state  # as the pipeline: no mask
        return self.transformer(
            noisy, encoder_hidden_states=text_BTC, timestep=timestep, image_rotary_emb=self.rotary
        ).sample


def new_model(seed: int = 0) -> TextToVideo:
    torch.manual_seed(seed)
    transformer = CogVideoXTransformer3DModel(**TRANSFORMER)
    zero(transformer.proj_out, *(norm.linear for b in transformer.transformer_blocks for norm in (b.norm1, b.norm2)))
    return TextToVideo(new_text_encoder(len(tokenizer())), transformer)


def pairs(count: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
    """count fresh videos (count, 8, 3, 24, 24) in [−1, 1], and their captions."""
    random_ = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
    motions = [shapes.random_motion(random_) for _ in range(count)]
    videos = np.stack([shapes.draw_video(motion, random_, FRAMES, SIDE) for motion in motions])
    return torch.from_numpy(videos).permute(0, 1, 4, 2, 3) / 127.5 - 1, [motion.text for motion in motions]


def train_model(checkpoint: Path, schedule: Schedule = SCHEDULE) -> tuple[TextToVideo, list[float]]:
    return train_captioned(
        new_model(schedule.seed), pairs, BATCH, scheduler().alphas_cumprod, schedule, checkpoint, "tiny-video"
    )


def pipeline(model: TextToVideo) -> CogVideoXPipeline:
    return CogVideoXPipeline(
        tokenizer=tokenizer(),
        text_encoder=model.text_encoder.eval(),
        vae=None,
        transformer=model.transformer.eval(),
        scheduler=scheduler(),
    )


def make(folder: Path, checkpoints: Path) -> dict[str, Any]:
    """Train, write the pipeline folder with loss curve and card → the card's numbers."""
    checkpoint = checkpoints / "tiny-video.pt"
    model, losses = train_model(checkpoint)
    pipeline(model).to(torch.bfloat16).save_pretrained(folder)
    scores = card.scores_of("tiny-video", folder, SCORED, n=120)
    return card.write(folder, CARD, losses, SCHEDULE, minutes_of(checkpoint), scores)


SCORED = [f"motion_shapes/{what}" for what in ("object", "direction", "speed", "scene")]
CARD = """# tiny-video

Text to video on the shapes world: a `CogVideoXPipeline` in pixel space (no VAE), whose T5 encoder was trained with it, on eight
24×24 frames of one moving object and their captions, drawn afresh for every step. For testing quantization methods end to end on a
CPU; it says nothing about large models by itself. Scores are by exact reading of float samples (`eval/motion_shapes.py`).
"""
