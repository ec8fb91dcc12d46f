"""Weights & Biases: every run is a W&B run, a sweep is a group, names are those of the record."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any

import numpy as np

from ditbench.harness.records.record import Record


def log(tracker: dict[str, Any], record: Record, folder: Path) -> None:
    """Log a finished record: config, metrics, efficiency, bits, sample grids beside the float model's, layer errors.

    The W&B files of an offline run lie in <folder>/wandb; `wandb sync <folder>/wandb/offline-run-*` uploads them.
    """
    if tracker["kind"] == "none" or tracker["mode"] == "disabled":
        return
    import wandb

    run = wandb.init(
        project=tracker["project"],
        entity=tracker["entity"],
        group=record.experiment,
        name=f"{record.model} {record.method} {record.bits['label']}",
        id=f"{record.run_id}-{os.getpid()}-{os.urandom(2).hex()}",
        config=record.config,
        mode=mode(tracker["mode"]),
        dir=str(folder),
        reinit="finish_previous",
        settings=wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True),
    )
    try:
        run.log(values(record) | pictures(record, folder))
    finally:
        run.finish()
        wandb.teardown()  # finish() returns before W&B's own process has closed the file; this waits for it


def mode(wanted: str) -> str:
    """auto → online when W&B knows a key, else offline."""
    return wanted if wanted != "auto" else "online" if has_key() else "offline"


def has_key() -> bool:
    """Whether `wandb login` has been done here, or WANDB_API_KEY is set."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def values(record: Record) -> dict[str, Any]:
    """The record's numbers, flat: metrics/<name>, metrics/<name>/ci95_low, efficiency/…, bits/…, timings_s/…."""
    flat: dict[str, Any] = {}
    for name, entry in record.metrics.items():
        flat[f"metrics/{name}"] = entry["value"]
        if entry["ci95"]:
            flat[f"metrics/{name}/ci95_low"], flat[f"metrics/{name}/ci95_high"] = entry["ci95"]
    for section in ("efficiency", "bits", "timings_s", "cost"):
        flat |= _flatten(section, getattr(record, section))
    return {name: value for name, value in flat.items() if value is not None}


def pictures(record: Record, folder: Path) -> dict[str, Any]:
    import wandb

    found: dict[str, Any] = {}
    for name in ("grid", "float_grid"):
        path = folder / record.artifacts.get(name, "-")
        if path.exists():
            found[f"samples/{name}"] = wandb.Image(str(path))
    for name in ("animation", "float_animation"):
        path = folder / record.artifacts.get(name, "-")
        if path.exists():
            found[f"samples/{name}"] = wandb.Video(str(path), format="gif")
    if record.layers:
        columns = ["layer", *next(iter(record.layers.values()))]
        rows = [[layer, *entry.values()] for layer, entry in record.layers.items()]
        found["layers"] = wandb.Table(columns=columns, data=rows)
    if "layer_errors" in record.artifacts:
        with np.load(folder / record.artifacts["layer_errors"]) as atlas:
            cells = [
                [str(name), int(step), None if np.isnan(value) else float(value)]
                for name, row in zip(atlas["names"], atlas["sqnr_db"], strict=True)
                for step, value in zip(atlas["steps"], row, strict=True)
            ]
        found["layers_by_step"] = wandb.Table(columns=["layer", "step", "sqnr_db"], data=cells)
    return found


def _flatten(prefix: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {name: leaf for key, inner in value.items() for name, leaf in _flatten(f"{prefix}/{key}", inner).items()}
    return {prefix: len(value) if isinstance(value, list) else value}
