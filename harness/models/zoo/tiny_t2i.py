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
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from harness.models.zoo import card, shapes
from harness.models.zoo.training import Schedule, minutes_of, train

TEXT_LENGTH = 16  # tokens, the end included
TEXT_WIDTH = 64
CAPTION_DROP = 0.1
BATCH = 64
LEAST_NOISE = 0.1  # 1 − ᾱ below which the loss gains no more weight
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


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the shapes world, `</s>` at the end, padded with `<pad>`."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *shapes.words()])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TEXT_LENGTH
    )


def new_text_encoder(vocabulary: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocabulary, d_model=TEXT_WIDTH, d_kv=16, num_heads=4, d_ff=128, num_layers=2, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", relative_attention_num_buckets=16, relative_attention_max_distance=16,
    )  # fmt: skip
    return T5EncoderModel(config)


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


def zero(*layers: nn.Linear) -> None:
    """adaLN-Zero: gates and the last projection start at 0, so every block starts as the identity."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


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
    words, alphas_cumprod = tokenizer(), scheduler().alphas_cumprod

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        images, captions = pairs(BATCH, generator)
        dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROP
        texts = ["" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)]
        tokens = words(texts, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
        return clean_loss(model, images, tokens, alphas_cumprod, generator)

    return train(new_model(schedule.seed).train(), loss_of, schedule, checkpoint, "tiny-t2i")


def clean_loss(model: nn.Module, clean: Tensor, tokens, alphas_cumprod: Tensor, generator: torch.Generator) -> Tensor:
    """Mean of |x̂ − x|² / (1 − ᾱ), the error of the velocity that x̂ implies; where there is hardly any noise, capped.

    The clean image is what is predicted (Li & He 2025, arXiv:2511.13720): a token of 8×8 pixels as wide as the model has
    no room to carry the noise through.
    """
    timestep = torch.randint(len(alphas_cumprod), (len(clean),), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    signal = alphas_cumprod[timestep].view(-1, *[1] * (clean.ndim - 1))
    noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
    wanted = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    error = (model(noisy, timestep, wanted).float() - clean).square()
    return (error / (1 - signal).clamp(min=LEAST_NOISE)).mean()


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
