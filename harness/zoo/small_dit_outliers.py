"""`small-dit-outliers`: `small-dit` with outlier channels that no scale per channel undoes (`harness/zoo/outliers.py`)."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from ditbench.harness.common.errors import UserError
from ditbench.harness.models.families import dit
from ditbench.harness.models.stress import inject_outliers
from ditbench.harness.models.zoo import WEIGHTS
from ditbench.harness.zoo import card
from ditbench.harness.zoo.labelled import save_pipeline
from ditbench.harness.zoo.outliers import Loud, inputs_of, left_of_layers, loudest, loudness, shortfall
from ditbench.harness.zoo.small_dit import N_SCORED, SCORED, noise_loss
from ditbench.harness.zoo.training import Schedule, minutes_of, train

TWIN = "small-dit"
CHANNELS = 6
LOG2_FACTOR = 5
RATIO = 16.0  # how much louder than the others the chosen channels shall be
REWARD = 0.02
SCHEDULE = Schedule(
    steps=400, learning_rate=5e-4, warmup=50, weight_decay=0.1, ema_decay=0.99, seed=1, checkpoint_every=100
)


def loud_channels(transformer: nn.Module) -> list[Loud]:
    """Its loudest channels on one batch of training: behind an injection those that were chosen, elsewhere those that there are."""
    sites = dit.sites(transformer)
    with torch.no_grad(), inputs_of(transformer, sites) as seen:
        noise_loss(transformer, torch.Generator().manual_seed(SCHEDULE.seed))
    return loudest(seen, sites, CHANNELS)


def outlier_loss(model: nn.Module, loud: list[Loud], generator: torch.Generator) -> Tensor:
    """The noise loss of `small-dit`, and what the chosen channels lack in loudness."""
    with inputs_of(model, [one.site for one in loud]) as seen:
        loss = noise_loss(model, generator)
    return loss + REWARD * shortfall(seen, loud, RATIO)


def train_outliers(
    plain: nn.Module, checkpoint: Path, schedule: Schedule = SCHEDULE
) -> tuple[DiTTransformer2DModel, list[float]]:
    """A copy of `plain` with injected outliers, trained on → its EMA, loss per step."""
    model = copy.deepcopy(plain)
    with torch.no_grad():
        inject_outliers(model, dit.sites(model), CHANNELS, LOG2_FACTOR, schedule.seed)
    loud = loud_channels(model)
    return train(model, lambda m, generator: outlier_loss(m, loud, generator), schedule, checkpoint, "outliers")


def make(folder: Path, checkpoints: Path) -> dict[str, Any]:
    """Train `small-dit` on, write the pipeline folder with judge, loss curve and card → the card's numbers."""
    source = WEIGHTS / TWIN
    if not (source / "model_index.json").exists():
        raise UserError(f"{source} is missing, which this model is made of; first `ditbench zoo train {TWIN}`")
    plain = DiTTransformer2DModel.from_pretrained(source, subfolder="transformer", torch_dtype=torch.float32).eval()
    checkpoint = checkpoints / "small-dit-outliers.pt"
    model, losses = train_outliers(plain, checkpoint)
    save_pipeline(model, folder)
    shutil.copytree(source / "judge", folder / "judge", dirs_exist_ok=True)
    model = DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.float32).eval()
    scores = card.scores_of("small-dit-outliers", folder, SCORED, n=N_SCORED)
    table = site_table(plain, model)
    return card.write(folder, CARD.format(table=table), losses, SCHEDULE, minutes_of(checkpoint), scores)


def _mean_loudness(transformer: nn.Module, loud: list[Loud]) -> dict[str, float]:
    """{site: mean loudness of its own loudest channels} on one batch of training."""
    with torch.no_grad(), inputs_of(transformer, [one.site for one in loud]) as seen:
        noise_loss(transformer, torch.Generator().manual_seed(SCHEDULE.seed))
    return {one.site.name: float(loudness(seen[one.site.name], one.channels).mean()) for one in loud}


def site_table(plain: nn.Module, model: nn.Module) -> str:
    """Per kind of input, mean over the blocks: how loud the loudest channels are, and what the best scale leaves of their columns."""
    loud = loud_channels(model)
    before, after = _mean_loudness(plain, loud_channels(plain)), _mean_loudness(model, loud)
    rows: dict[str, list[tuple[float, ...]]] = {}
    left = left_of_layers(plain, model, [one.site for one in loud])
    for one in loud:
        left_C = torch.stack([left[consumer] for consumer in one.site.consumers]).mean(dim=0)
        numbers = (float(left_C[list(one.channels)].mean()), float(left_C.median()))
        rows.setdefault(one.site.name.rsplit(".", 1)[-1], []).append(
            (before[one.site.name], after[one.site.name], *numbers)
        )
    lines = ["| input | loudest channels, small-dit | here | left of their columns | of the median column |"]
    lines.append("|---|---|---|---|---|")
    for kind, found in rows.items():
        twin, here, loudest_columns, usual = (sum(column) / len(found) for column in zip(*found, strict=True))
        lines.append(f"| `{kind}` | {twin:.1f} | {here:.1f} | {loudest_columns:.0%} | {usual:.0%} |")
    return "\n".join(lines)


CARD = """# small-dit-outliers

`small-dit` with outliers that come from training: six channels of every input were scaled up (and the columns that read them down),
then training went on with weight decay and a term that keeps them large, behind GELU too. For testing what methods do about outliers
when no scale per channel is the exact inverse of how they came about, as it is in the models that end in `-stress`.
Its twin without them is `small-dit`; samples of the two are not the same pictures.

Loudness is a channel's root mean square over that of the others, the mean of the six loudest. What is *left* is the
part of the twin's weight column that the best scale of this model's column does not give back, any scale for each layer and channel: 0 % in a model
that scaling per channel undoes.

{table}
"""
