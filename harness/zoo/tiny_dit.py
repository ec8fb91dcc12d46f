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
from diffusers import DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn

from ditbench.harness.models.zoo import digits
from ditbench.harness.models.zoo import judge as judges
from ditbench.harness.zoo.labelled import (
    judge_accuracy,
    new_transformer,
    noise_errors,
    sample,
    scheduler,
    train_judge,
)
from ditbench.harness.zoo.training import Schedule, train

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


def train_transformer(
    checkpoint: Path, schedule: Schedule = DIFFUSION_SCHEDULE
) -> tuple[DiTTransformer2DModel, list[float]]:
    data = digits.load("train")

    def loss_of(model: nn.Module, generator: torch.Generator) -> Tensor:
        return noise_errors(model, data, BATCH, generator)[0].mean()

    return train(new_transformer(TRANSFORMER, schedule.seed), loss_of, schedule, checkpoint, "tiny-dit")


def make(folder: Path, checkpoints: Path) -> dict:
    """Train judge and transformer, write the pipeline folder with loss curves and card → the card's numbers."""
    start = time.monotonic()
    torch.manual_seed(JUDGE_SCHEDULE.seed)
    judge, judge_losses = train_judge(
        digits.load("train"), judges.Judge(digits.NUM_CLASSES), JUDGE_SCHEDULE, checkpoints / "judge.pt"
    )
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
