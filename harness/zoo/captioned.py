"""What the zoo's models of the shapes world that read captions share: words, text encoder, loss and training step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from ditbench.harness.models.zoo import shapes
from ditbench.harness.zoo.training import Schedule, train

TEXT_LENGTH = 16  # tokens, the end included
TEXT_WIDTH = 64
CAPTION_DROP = 0.1
LEAST_NOISE = 0.1  # 1 − ᾱ below which the loss gains no more weight
Pairs = Callable[[int, torch.Generator], tuple[Tensor, list[str]]]  # so many images or videos, and their captions


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


def zero(*layers: nn.Linear) -> None:
    """adaLN-Zero: gates and the last projection start at 0, so every block starts as the identity."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def train_captioned(
    model: nn.Module,
    pairs: Pairs,
    batch: int,
    alphas_cumprod: Tensor,
    schedule: Schedule,
    checkpoint: Path,
    title: str,
) -> tuple[Any, list[float]]:
    """`train` on fresh pairs in every step, one caption of ten dropped for guidance."""
    words = tokenizer()

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        clean, captions = pairs(batch, generator)
        dropped = torch.rand(batch, generator=generator) < CAPTION_DROP
        texts = ["" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)]
        tokens = words(texts, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
        return clean_loss(model, clean, tokens, alphas_cumprod, generator)

    return train(model.train(), loss_of, schedule, checkpoint, title)


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
