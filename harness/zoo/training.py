"""One resumable training loop for every zoo model: AdamW, cosine schedule, EMA, checkpoints, loss curve."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

LossOf = Callable[[nn.Module, torch.Generator], Tensor]


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then the full rate up to `hold` of the rest, then half a cosine down to 0.

    While the rate is held, no step depends on how many there will be: a training may still be made longer or shorter, and the
    result is that of one which was planned so (warmup-stable-decay: Hu et al. 2024, arXiv:2404.06395).
    """

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 200
    hold: float = 0.0
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    checkpoint_every: int = 250
    seed: int = 0

    def learning_rate_factor(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        progress = max(0.0, progress - self.hold) / (1.0 - self.hold)
        return 0.5 * (1.0 + math.cos(math.pi * progress))


def train(
    model: nn.Module, loss_of: LossOf, schedule: Schedule, checkpoint: Path, title: str
) -> tuple[nn.Module, list[float]]:
    """Train model in place → (its EMA copy, loss per step).

    The random stream of step k depends on (seed, k) alone, so a run resumed from `checkpoint` follows the same
    path as one that was never stopped.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay, betas=(0.9, 0.99)
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.learning_rate_factor)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(schedule.ema_decay))
    losses: list[float] = []
    before_s, start = 0.0, time.monotonic()
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        losses, before_s = saved["losses"], saved["seconds"]

    progress = tqdm(range(len(losses), schedule.steps), initial=len(losses), total=schedule.steps, desc=title)
    for step in progress:
        generator = torch.Generator().manual_seed(schedule.seed * 1_000_003 + step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        ema.update_parameters(model)
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            progress.set_postfix(loss=f"{sum(losses[-50:]) / 50:.4f}")
        if (step + 1) % schedule.checkpoint_every == 0:
            seconds = before_s + time.monotonic() - start
            _save_checkpoint(checkpoint, model, ema, optimizer, scheduler, losses, seconds)
    return ema.module, losses


def minutes_of(checkpoint: Path) -> float:
    """Wall time of the training so far, over all its sessions, up to the last checkpoint."""
    return torch.load(checkpoint, weights_only=True)["seconds"] / 60


def _save_checkpoint(path, model, ema, optimizer, scheduler, losses, seconds) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(
        {
            "model": model.state_dict(),
            "ema": ema.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "losses": losses,
            "seconds": seconds,
        },
        part,
    )
    os.replace(part, path)
