"""What the zoo's models that are told a class share: sampler, start values, loss, judge, samples for the card."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn

from ditbench.harness.models.zoo import judge as judges
from ditbench.harness.models.zoo.digits import NUM_CLASSES, Digits
from ditbench.harness.zoo.captioned import zero
from ditbench.harness.zoo.training import Schedule, train

NULL_LABEL = NUM_CLASSES
LABEL_DROP = 0.1
JUDGE_BATCH = 64


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=False,
    )


@cache
def alphas_cumprod() -> Tensor:
    """ᾱ of the thousand steps."""
    return scheduler().alphas_cumprod


def new_transformer(config: dict[str, Any], seed: int = 0) -> DiTTransformer2DModel:
    """An untrained transformer with DiT's adaLN-Zero initialisation (adaLN and the last projection start at 0)."""
    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(**config)
    for block in transformer.transformer_blocks:
        zero(block.norm1.linear)
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
    zero(transformer.proj_out_2)
    return transformer.eval()  # eval: the per-block label dropout of diffusers would drop labels block by block


def noise_errors(model: nn.Module, data: Digits, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Squared errors of the predicted noise on a random batch, (batch, 1, H, W), and its ᾱ, (batch, 1, 1, 1)."""
    index = torch.randint(len(data), (batch,), generator=generator)
    labels = data.labels_N[index]
    dropped = torch.rand(batch, generator=generator) < LABEL_DROP
    timestep = torch.randint(1000, (batch,), generator=generator)
    noise = torch.randn(data.images_N1HW[index].shape, generator=generator)
    signal = alphas_cumprod()[timestep].view(-1, 1, 1, 1)
    noisy = signal.sqrt() * data.images_N1HW[index] + (1 - signal).sqrt() * noise
    labels = torch.where(dropped, NULL_LABEL, labels)
    return (model(noisy, timestep=timestep, class_labels=labels).sample.float() - noise).square(), signal


def train_judge(
    data: Digits, model: judges.Judge, schedule: Schedule, checkpoint: Path, shift: int = 1
) -> tuple[judges.Judge, list[float]]:
    """Train on real digits, moved by up to `shift` pixels and with noise → the judge in eval mode, loss per step."""

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(data), (JUDGE_BATCH,), generator=generator)
        images, labels = data.images_N1HW[index], data.labels_N[index]
        dy, dx = torch.randint(-shift, shift + 1, (2,), generator=generator).tolist()
        images = torch.roll(images, (dy, dx), dims=(2, 3))
        images = images + 0.1 * torch.randn(images.shape, generator=generator)
        return F.cross_entropy(model(images), labels, label_smoothing=0.05)

    trained, losses = train(model.train(), loss_of, schedule, checkpoint, "judge")
    # The EMA keeps the batch norms' statistics of its first copy: measure them again on the real digits.
    trained.train()
    for module in trained.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for start in range(0, len(data), JUDGE_BATCH):
            trained(data.images_N1HW[start : start + JUDGE_BATCH])
    return trained.eval(), losses


@torch.no_grad()
def judge_accuracy(judge: judges.Judge, images: Tensor, labels: Tensor) -> float:
    return (judge(images).argmax(dim=1) == labels).float().mean().item()


@torch.no_grad()
def sample(transformer, labels: Tensor, steps: int = 20, guidance: float = 1.5, seed: int = 0) -> Tensor:
    """Float samples for the card: (n, 1, H, W) in [-1, 1]."""
    ddim = scheduler()
    ddim.set_timesteps(steps)
    side = transformer.config.sample_size
    x = torch.randn((len(labels), 1, side, side), generator=torch.Generator().manual_seed(seed))
    both = torch.cat([labels, torch.full_like(labels, NULL_LABEL)])
    for t in ddim.timesteps:
        noise = transformer(torch.cat([x, x]), timestep=t.expand(len(both)), class_labels=both).sample
        conditional, unconditional = noise.chunk(2)
        x = ddim.step(unconditional + guidance * (conditional - unconditional), t, x).prev_sample
    return x.clamp(-1, 1)


def save_pipeline(transformer: DiTTransformer2DModel, folder: Path) -> None:
    """The `DiTPipeline` that these weights are run in, in bfloat16."""
    stored = copy.deepcopy(transformer).eval().to(torch.bfloat16)
    stored.register_to_config(_name_or_path="")  # where training started is a folder of whoever trained
    DiTPipeline(stored, vae=None, scheduler=scheduler()).save_pretrained(folder)
