"""What is shipped beside a text-told zoo model: its loss curve, its numbers and its card, all computed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from ditbench.harness.common.files import file_sha256
from ditbench.harness.zoo.training import Schedule

EVERY = 50  # steps that one row of the loss curve averages
SEED = 0


def scores_of(name: str, folder: Path, metrics: list[str], n: int) -> dict[str, dict[str, Any]]:
    """Metrics of n float samples of the model in `folder`, under its own configuration."""
    import torch

    from ditbench.eval.base import Evidence, evaluate
    from ditbench.eval.judges import load_judge
    from ditbench.eval.reference import load_reference
    from ditbench.harness.build.build import float_copy
    from ditbench.harness.generation.generate import conditions, generate
    from ditbench.harness.models.loading import load_model
    from ditbench.harness.stages.config import parse
    from ditbench.harness.sweep.compose import composed

    (raw,) = composed([[f"model={name}", f"model.source={folder}", "method=fp"]])
    config = parse(raw)
    model = load_model(config.model)
    transformer = float_copy(model.target(), dtype=torch.float32)
    wanted = conditions(model, n, SEED, prompts=config.protocol.prompts)
    samples = generate(model, transformer, wanted, config.protocol.sampler, batch_size=60)
    judge = model.extras.get("judge")
    evidence = Evidence(
        samples,
        reference=load_reference(config.raw["metrics"]["reference"]),
        judge=judge and load_judge(judge),
        seed=SEED,
    )
    return evaluate(metrics, evidence)


def write(
    folder: Path, text: str, losses: list[float], schedule: Schedule, minutes: float, scores: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """loss_curve.csv, card.json and README.md in the model's folder → the card's numbers."""
    write_losses(folder / "loss_curve.csv", losses)
    weights = sorted(folder.glob("*/*.safetensors"))
    numbers = {
        "parameters": {path.parent.name: parameters(path) for path in weights},
        "train_minutes": round(minutes, 1),
        "steps": schedule.steps,
        "seed": schedule.seed,
        "final_loss_mean_of_last_500": sum(losses[-500:]) / len(losses[-500:]),
        "scores": {name: {key: entry[key] for key in ("value", "ci95", "n")} for name, entry in scores.items()},
        "sha256": {path.parent.name: file_sha256(path) for path in weights},
    }
    (folder / "card.json").write_text(json.dumps(numbers, indent=2) + "\n")
    (folder / "README.md").write_text(_card(text, folder.name, numbers))
    return numbers


def write_losses(path: Path, losses: list[float]) -> None:
    """A row for every EVERY steps, their mean."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", f"loss_mean_of_{EVERY}"])
        rows.writerows(
            [end, f"{sum(losses[end - EVERY : end]) / EVERY:.5f}"] for end in range(EVERY, len(losses) + 1, EVERY)
        )


def parameters(path: Path) -> int:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return sum(file.get_tensor(name).numel() for name in list(file.keys()))


def _scored(metric: str, score: dict[str, Any]) -> str:
    """Shares in percent, distances as they are; without an interval where the metric has none."""
    told = "{:.3g}" if "fid" in metric else "{:.1%}"
    value, low, high = (told.format(number) for number in (score["value"], *(score["ci95"] or (0, 0))))
    return f"{value} of {score['n']}" + (f" (95 % interval {low} to {high})" if score["ci95"] else "")


def _card(text: str, name: str, numbers: dict[str, Any]) -> str:
    rows = [
        (
            "made by",
            f"`ditbench zoo train {name}` (seed {numbers['seed']}, {numbers['steps']} steps, AdamW, cosine, EMA)",
        ),
        ("training", f"{numbers['train_minutes']:.0f} minutes of wall time"),
        ("parameters", ", ".join(f"{part} {count:,}" for part, count in numbers["parameters"].items())),
        (
            "loss",
            f"`loss_curve.csv`; mean of the last {min(500, numbers['steps'])} steps {numbers['final_loss_mean_of_last_500']:.4f}",
        ),
    ]
    rows += [(metric, _scored(metric, score)) for metric, score in numbers["scores"].items()]
    rows += [(f"sha256 of {part}", f"`{digest}`") for part, digest in numbers["sha256"].items()]
    return "\n".join([text, "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]) + "\n"
