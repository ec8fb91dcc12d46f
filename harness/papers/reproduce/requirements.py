"""What a reproduction needs: weights, reference batch, images, disk. Composes configurations, loads and runs nothing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ditbench.harness.calibration import recording
from ditbench.harness.fitting import registry
from ditbench.harness.models import batch_sizes
from ditbench.harness.papers.reported import Reproduce, Table, row_title
from ditbench.harness.papers.reproduce.rows import (
    NOT_YET,
    config_method,
    configurations,
    plan_lines,
    reproducible,
)

LATENT_SHARE = 0.25  # float32 latents of an 8×, 4-channel VAE, in bytes per pixel; the image itself has 3
GIB = 2**30


def plan(name: str, model: str | None = None, overrides: Sequence[str] = ()) -> str:
    """What a reproduction needs; composes configurations, loads and runs nothing."""
    table, section = reproducible(name)
    lines = plan_lines(table, section, model, overrides)
    configs = configurations(line.job for line in lines)
    first = next(iter(configs.values()))
    absent = list(dict.fromkeys(line.row.name for line in lines if line.job is None))
    here = list(dict.fromkeys(line.row.name for line in lines if line.job is not None))
    here = [f"{each} ({config_method(lines, configs, each)})" for each in here]
    sets = _image_sets(configs.values())
    images = sum(n for n, _, _, _ in sets)
    rows = sum(n * steps * copies for n, steps, copies, _ in sets)
    calls = sum(math.ceil(n / batch) * steps for n, steps, _, batch in sets)
    described = [
        ("model", f"{first['model']['name']}; weights: {_weights(first['model'])}"),
        ("reference batch", reference(section, first)),
        ("evaluator", ", ".join(f"{column} = {metric}" for column, metric in section.metrics.items()) + "; its weights: see ditbench doctor"),
        ("protocol", _protocol(configs.values())),
        ("methods here", ", ".join(here)),
        (NOT_YET, ", ".join(absent) or "none: every row can be run"),
        ("runs", f"{len(configs)}, for {sum(line.job is not None for line in lines)} of {len(lines)} rows"),
        ("images", f"{images:,} in {len(sets)} sets: one per run, the float model's, its other seeds, calibration"),
        ("transformer", f"{calls:,} calls in batches, {rows:,} rows in all (guidance counts twice), fitting and measuring not counted"),
        ("disk", _disk(first, section, images)),
        ("records", f"{first['results_dir']}/runs/{first['name']}"),
    ]  # fmt: skip
    width = max(len(key) for key, _ in described)
    text = [f"plan of {table.name} · {table.paper}", *(f"  {key.ljust(width)}  {said}" for key, said in described)]
    return "\n".join([*text, *notes(table, section, configs.values())])


def reference(section: Reproduce, config: Mapping[str, Any]) -> str:
    given = config["metrics"]["reference"]
    if config["model"]["name"] != section.model:
        return f"{given} (the paper's: {section.reference.file})"
    if given and Path(given).exists():
        return f"{given}, here"
    return f"{section.reference.file} from {section.reference.address}, then metrics.reference=FILE"


def notes(table: Table, section: Reproduce, configs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Warnings of rows, what the section says, what the methods say of themselves, and columns that nothing computes."""
    notes = [f"warning: {row_title(row)}: {row.warning}" for row in table.rows if row.warning]
    notes += [f"note: {note}" for note in section.notes]
    for name in dict.fromkeys(config["method"]["name"] for config in configs):
        departs = re.search(r"Departs from the paper: (.+?)(?:\n\n|\Z)", registry.method(name).__doc__ or "", re.DOTALL)
        if departs:
            notes.append(f"note: {name} departs from its paper: {' '.join(departs[1].split())}")
    left = [column for column in table.columns if column not in section.metrics]
    notes += [f"not computed here: {', '.join(left)} (ditbench paper show {table.name})"] if left else []
    tolerances = ", ".join(f"{column} {tolerance:g}" for column, tolerance in section.tolerance.items())
    return [
        *notes,
        f"within: the paper's value in our 95 % interval, or |Δ| at most {tolerances} (ours, not the paper's)",
    ]


def _image_sets(configs: Iterable[Mapping[str, Any]]) -> list[tuple[int, int, int, int]]:
    """(n, steps, rows per image, batch size) of every set of samples that has to be drawn."""
    sets, shared = [], {}
    for config in configs:
        protocol, generate, calibration = config["protocol"], config["generate"], config["calibration"]
        copies = 2 if protocol["guidance"] > 1 else 1
        drawn = (protocol["n"], protocol["steps"], copies, _batch(generate, batch_sizes.MOST))
        sets.append(drawn)
        extra = generate["noise_floor_seeds"] + (generate["dtype"] != generate["reference_dtype"]) * (
            generate["noise_floor_seeds"] > 0
        )
        shared[json.dumps([protocol[key] for key in ("sampler", "steps", "guidance", "n")])] = [
            *([drawn] * (1 + extra)),
            (calibration["n"], protocol["steps"], copies, _batch(calibration, recording.MOST)),
        ]
    return [*sets, *(each for of_protocol in shared.values() for each in of_protocol)]


def _batch(section: Mapping[str, Any], most: int) -> int:
    """A size that is found may be smaller on a small device."""
    return most if section["batch_size"] == batch_sizes.AUTO else section["batch_size"]


def _protocol(configs: Iterable[Mapping[str, Any]]) -> str:
    protocols = [config["protocol"] for config in configs]
    words = {"sampler": "", "steps": " steps", "guidance": " guidance", "n": " images per run", "labels": " labels"}
    said = [f"{' | '.join(dict.fromkeys(str(each[key]) for each in protocols))}{word}" for key, word in words.items()]
    return f"{protocols[0]['name']}: " + ", ".join(said)


def _weights(model: Mapping[str, Any]) -> str:
    source = str(model["source"])
    if model["random"] is not None or source.startswith("zoo:"):
        return "shipped" if model["random"] is None else "random"
    if Path(source).expanduser().is_dir():
        return f"{source}, here"
    return f"https://huggingface.co/{source} (`hf download {source} --local-dir DIR`, then model.source=DIR)"


def _disk(config: Mapping[str, Any], section: Reproduce, images: int) -> str:
    if config["model"]["name"] != section.model:
        return "small: another model than the paper's"
    size_bytes = images * section.image_size**2 * (3 + LATENT_SHARE)
    return f"at most {size_bytes / GIB:.1f} GiB of images and latents ({section.image_size} px, before compression), and the weights"
