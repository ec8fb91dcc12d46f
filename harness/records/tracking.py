"""Weights & Biases: every run is a W&B run, a sweep is a group, names are those of the record."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any

import numpy as np

from ditbench.harness.common.errors import UserError
from ditbench.harness.records.record import Record

MODES = {name: name for name in ("online", "offline", "disabled", "shared")} | {"run": "online", "dryrun": "offline"}
INIT_S = 20.0  # a server that does not answer within this is given up; W&B's own default is 90
SETTINGS = {
    "silent": True,
    "console": "off",
    "disable_git": True,
    "x_disable_stats": True,
    "init_timeout": INIT_S,
    "finish_timeout": 60.0,
    "x_graphql_retry_max": 3,
    "x_file_stream_retry_max": 3,
    "x_file_transfer_retry_max": 3,
}

_gave_up = False  # of this process: what failed once would cost every run of a sweep the same wait


def log(tracker: dict[str, Any], record: Record) -> None:
    """Log a published record: config, metrics, efficiency, bits, sample grids beside the float model's, layer errors.

    A failed run is a failed W&B run (exit code 1) with its reason in the summary. The W&B files of an offline run lie in
    <folder>/wandb; `wandb sync <folder>/wandb/offline-run-*` uploads them.

    Raises:
        Exception: whatever W&B says, a server that is not reached in INIT_S among it. Nothing is sent any more by this process.
    """
    global _gave_up
    if tracker["kind"] == "none" or _gave_up or (its_mode := mode(tracker["mode"])) == "disabled":
        return
    try:
        _log(tracker, record, its_mode)
    except BaseException:
        _gave_up = True
        raise


def _log(tracker: dict[str, Any], record: Record, its_mode: str) -> None:
    import wandb

    assert record.folder is not None, "it is published"
    known = wandb.Settings.model_fields  # W&B adds some of these over time
    settings = {name: value for name, value in SETTINGS.items() if name in known}
    run = wandb.init(
        project=tracker["project"],
        entity=tracker["entity"],
        group=record.experiment,
        name=f"{record.model} {record.method} {label(record)}",
        id=f"{record.run_id}-{os.getpid()}-{os.urandom(2).hex()}",
        config=record.config,
        mode=its_mode,
        dir=str(record.folder),
        reinit="finish_previous",
        settings=wandb.Settings(**settings),
    )
    try:
        run.log(values(record) | pictures(record, record.folder))
        run.summary.update({"status": record.status} | ({"error": record.error} if record.error else {}))
    finally:
        run.finish(exit_code=0 if record.status == "ok" else 1)
        wandb.teardown()  # finish() returns before W&B's own process has closed the file; this waits for it


def label(record: Record) -> str:
    """W4A8, also of a run that failed before its bits were counted."""
    asked = record.config.get("bits")
    asked = asked.get("label") if isinstance(asked, dict) else asked
    return str(record.bits.get("label") or asked or "").upper()


def mode(wanted: str) -> str:
    """What is said here counts before the environment: only auto asks WANDB_DISABLED and WANDB_MODE, then whether W&B knows a key
    (online) or not (offline).

    Raises:
        UserError: WANDB_MODE is none of W&B's modes.
    """
    if wanted != "auto":
        return wanted
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        return "disabled"
    said = os.environ.get("WANDB_MODE", "").lower()
    if not said:
        return "online" if has_key() else "offline"
    if said not in MODES:
        raise UserError(f"WANDB_MODE is {said!r}, expected one of {', '.join(MODES)}; set it, or tracker.mode=offline")
    return MODES[said]


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
        flat[f"metrics/{name}"] = entry.get("value")
        if entry.get("ci95"):
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
