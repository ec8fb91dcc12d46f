"""`tiny-t2i`: text to image on the shapes world.

A real `PixArtAlphaPipeline` without a VAE: it denoises 32×32 RGB pixels in 8×8 patches (16 tokens), and reads captions
through a small T5 encoder, trained with it, and a real word-level tokenizer.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from torch import Tensor, nn
from transformers import T5EncoderModel

from ditbench.harness.models.zoo import shapes
from ditbench.harness.zoo import card
from ditbench.harness.zoo.captioned import TEXT_WIDTH, new_text_encoder, tokenizer, train_captioned, zero
from ditbench.harness.zoo.training import Schedule, minutes_of

BATCH = 64
TRANSFORMER = {
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 4,
    "cross_attention_dim": 192,
    "sample_size": shapes.SIDE,
    "patch_size": shapes.CELL,
    "caption_channels": TEXT_WIDTH,
    "use_additional_conditions": False,
}
KIND_WEIGHTS = {
    "single_object": 1, "two_object": 2, "counting": 2, "colors": 2, "position": 2, "color_attr": 3,
}  # fmt: skip
SCHEDULE = Schedule(steps=9000, learning_rate=1e-3)


def scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type="sample"
    )


class TextToImage(nn.Module):
    """Both parts that are trained: noisy image, timestep and caption → the clean image."""

    def __init__(self, text_encoder: T5EncoderModel, transformer: nn.Module) -> None:
        super().__init__()
        self.text_encoder, self.transformer = text_encoder, transformer

    def forward(self, noisy: Tensor, timestep: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        text_BTC = self.text_encoder(**tokens).last_hidden_state
        return self.transformer(
            noisy,
            encoder_hidden_states=text_BTC,
            encoder_attention_mask=tokens["attention_mask"],
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample


def new_model(seed: int = 0) -> TextToImage:
    torch.manual_seed(seed)
    transformer = PixArtTransformer2DModel(**TRANSFORMER)
    zero(transformer.proj_out, transformer.adaln_single.linear)
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.scale_shift_table)
    return TextToImage(new_text_encoder(len(tokenizer())), transformer)


def pairs(count: int, generator: torch.Generator) -> tuple[Tensor, list[str]]:
    """count fresh scenes: images (count, 3, 32, 32) in [−1, 1], and their captions."""
    random_ = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
    kinds = random_.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()), k=count)
    captions = [shapes.random_caption(kind, random_) for kind in kinds]
    images = [torch.from_numpy(shapes.render(shapes.draw_scene(caption, random_))) for caption in captions]
    return torch.stack(images).permute(0, 3, 1, 2) / 127.5 - 1, [caption.text for caption in captions]


def train_model(checkpoint: Path, schedule: Schedule = SCHEDULE) -> tuple[TextToImage, list[float]]:
    return train_captioned(
        new_model(schedule.seed), pairs, BATCH, scheduler().alphas_cumprod, schedule, checkpoint, "tiny-t2i"
    )


def pipeline(model: TextToImage) -> PixArtAlphaPipeline:
    return PixArtAlphaPipeline(
        tokenizer=tokenizer(),
        text_encoder=model.text_encoder.eval(),
        vae=None,
        transformer=model.transformer.eval(),
        scheduler=scheduler(),
    )


def make(folder: Path, checkpoints: Path) -> dict[str, Any]:
    """Train, write the pipeline folder with loss curve and card → the card's numbers."""
    checkpoint = checkpoints / "tiny-t2i.pt"
    model, losses = train_model(checkpoint)
    pipeline(model).to(torch.bfloat16).save_pretrained(folder)
    scores = card.scores_of("tiny-t2i", folder, SCORED, n=240)
    return card.write(folder, CARD, losses, SCHEDULE, minutes_of(checkpoint), scores)


SCORED = ["geneval_shapes/overall", *(f"geneval_shapes/{kind}" for kind in shapes.KINDS)]
CARD = """# tiny-t2i

Text to image on the shapes world: a `PixArtAlphaPipeline` in pixel space (no VAE), whose T5 encoder was trained with it, on 32×32
scenes of coloured shapes and their captions, drawn afresh for every step. For testing quantization methods end to end on a CPU;
it says nothing about large models by itself. Scores are by exact reading of float samples (`eval/shapes.py`).
"""
