"""`tiny-dit`: a class-conditional DiT on handwritten digits, and its judge.

A real diffusers `DiTTransformer2DModel` inside a real `DiTPipeline` without a VAE: it denoises pixels. 16×16 images in
2×2 patches give 64 tokens; 96 channels = 12·2³ exercise a Hadamard order that is not a power of two.
"""

from __future__ import annotations

import csv
import hashlib
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn

from ditbench.harness.models.zoo import digits
from ditbench.harness.models.zoo import judge as judges
from ditbench.harness.zoo.training import Schedule, train

NULL_LABEL = digits.NUM_CLASSES
LABEL_DROP = 0.1
BATCH = 64
TRANSFORMER = {
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 5,
    "sample_size": digits.IMAGE_SIZE,
    "patch_size": 2,
    "num_embeds_ada_norm": digits.NUM_CLASSES,
}
DIFFUSION_SCHEDULE = Schedule(steps=6000, learning_rate=1.5e-3)
JUDGE_SCHEDULE = Schedule(steps=1500, learning_rate=2e-3, ema_decay=0.99, weight_decay=0.05)


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=False,
    )


def new_transformer(seed: int = 0) -> DiTTransformer2DModel:
    """An untrained transformer with DiT's adaLN-Zero initialisation (adaLN and the last projection start at 0)."""
    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(**TRANSFORMER)
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
    nn.init.zeros_(transformer.proj_out_2.weight)
    nn.init.zeros_(transformer.proj_out_2.bias)
    return transformer.eval()  # eval: the per-block label dropout of diffusers would drop labels block by block


def train_judge(checkpoint: Path, schedule: Schedule = JUDGE_SCHEDULE) -> tuple[judges.Judge, list[float]]:
    data = digits.load("train")
    torch.manual_seed(schedule.seed)
    model = judges.Judge(digits.NUM_CLASSES)

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(data), (BATCH,), generator=generator)
        images, labels = data.images_N1HW[index], data.labels_N[index]
        dy, dx = torch.randint(-1, 2, (2,), generator=generator).tolist()
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
        for start in range(0, len(data), BATCH):
            trained(data.images_N1HW[start : start + BATCH])
    return trained.eval(), losses


def train_transformer(checkpoint: Path, schedule: Schedule = DIFFUSION_SCHEDULE):
    data = digits.load("train")
    alphas_cumprod = scheduler().alphas_cumprod

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(data), (BATCH,), generator=generator)
        labels = data.labels_N[index]
        dropped = torch.rand(BATCH, generator=generator) < LABEL_DROP
        timestep = torch.randint(1000, (BATCH,), generator=generator)
        noise = torch.randn(data.images_N1HW[index].shape, generator=generator)
        signal = alphas_cumprod[timestep].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * data.images_N1HW[index] + (1 - signal).sqrt() * noise
        labels = torch.where(dropped, NULL_LABEL, labels)
        return F.mse_loss(model(noisy, timestep=timestep, class_labels=labels).sample.float(), noise)

    return train(new_transformer(schedule.seed), loss_of, schedule, checkpoint, "tiny-dit")


@torch.no_grad()
def judge_accuracy(judge: judges.Judge, images: Tensor, labels: Tensor) -> float:
    return (judge(images).argmax(dim=1) == labels).float().mean().item()


@torch.no_grad()
def sample(transformer, labels: Tensor, steps: int = 20, guidance: float = 1.5, seed: int = 0) -> Tensor:
    """Float samples for the card: (n, 1, 16, 16) in [-1, 1]."""
    ddim = scheduler()
    ddim.set_timesteps(steps)
    x = torch.randn((len(labels), 1, 16, 16), generator=torch.Generator().manual_seed(seed))
    both = torch.cat([labels, torch.full_like(labels, NULL_LABEL)])
    for t in ddim.timesteps:
        noise = transformer(torch.cat([x, x]), timestep=t.expand(len(both)), class_labels=both).sample
        conditional, unconditional = noise.chunk(2)
        x = ddim.step(unconditional + guidance * (conditional - unconditional), t, x).prev_sample
    return x.clamp(-1, 1)


def make(folder: Path, checkpoints: Path) -> dict:
    """Train judge and transformer, write the pipeline folder with loss curves and card → the card's numbers."""
    start = time.monotonic()
    judge, judge_losses = train_judge(checkpoints / "judge.pt")
    transformer, losses = train_transformer(checkpoints / "tiny-dit.pt")

    folder.mkdir(parents=True, exist_ok=True)
    DiTPipeline(transformer.eval(), vae=None, scheduler=scheduler()).save_pretrained(folder)
    judges.save(judge, folder / "judge")
    _write_losses(folder / "loss_curve.csv", {"tiny-dit": losses, "judge": judge_losses})

    held_out = digits.load("held_out")
    labels = torch.arange(1000) % digits.NUM_CLASSES
    numbers = {
        "parameters": sum(p.numel() for p in transformer.parameters()),
        "train_minutes_last_session": round((time.monotonic() - start) / 60, 1),
        "steps": DIFFUSION_SCHEDULE.steps,
        "seed": DIFFUSION_SCHEDULE.seed,
        "final_loss_mean_of_last_500": sum(losses[-500:]) / 500,
        "judge_accuracy_held_out": judge_accuracy(judge, held_out.images_N1HW, held_out.labels_N),
        "judge_held_out_n": len(held_out),
        "sample_accuracy": judge_accuracy(judge, sample(transformer, labels), labels),
        "sample_accuracy_n": len(labels),
        "sha256": hashlib.sha256(
            (folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
        ).hexdigest(),
    }
    (folder / "card.json").write_text(json.dumps(numbers, indent=2) + "\n")
    (folder / "README.md").write_text(_card(numbers))
    return numbers


def _write_losses(path: Path, curves: dict[str, list[float]], every: int = 50) -> None:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["model", "step", f"loss_mean_of_{every}"])
        for name, losses in curves.items():
            for end in range(every, len(losses) + 1, every):
                rows.writerow([name, end, f"{sum(losses[end - every : end]) / every:.5f}"])


def _card(numbers: dict) -> str:
    return f"""# tiny-dit

A class-conditional DiT (`DiTTransformer2DModel`, {numbers["parameters"]:,} parameters, pixel space, no VAE) on
handwritten digits: scikit-learn's 1,797 real 8×8 images enlarged to 16×16, 80 % of them for training.
For testing quantization methods end to end on a CPU. It says nothing about large DiTs by itself.

| | |
|---|---|
| made by | `ditbench zoo train tiny-dit` (seed {numbers["seed"]}, {numbers["steps"]} steps, batch {BATCH}, AdamW, cosine, EMA) |
| loss | `loss_curve.csv`; mean of the last 500 steps {numbers["final_loss_mean_of_last_500"]:.4f} |
| samples recognised as the class asked for | {numbers["sample_accuracy"]:.1%} of {numbers["sample_accuracy_n"]} (20 DDIM steps, cfg 1.5, float32) |
| judge on held-out real digits | {numbers["judge_accuracy_held_out"]:.1%} of {numbers["judge_held_out_n"]} |
| sha256 of the transformer | `{numbers["sha256"]}` |

Data: UCI Optical Recognition of Handwritten Digits (CC BY 4.0), through `sklearn.datasets.load_digits`.
"""
