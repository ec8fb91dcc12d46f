"""What a tracker is told of a run: when it begins, and when it is recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ditbench.harness.common.artifacts import Damaged
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting import registry
from ditbench.harness.fitting.forms import DEFAULT
from ditbench.harness.generation.generate import grid
from ditbench.harness.records import sample_values
from ditbench.harness.records.drawn_samples import samples_at, samples_of, store_of
from ditbench.harness.records.record import Record, artifact
from ditbench.harness.records.trackers.base import Card, Movie, Picture, Table, Value
from ditbench.harness.samples.samples import Samples

MOST_ROWS = 10_000  # of a table; W&B shows no more
BEST_SEEN = 8  # samples that are shown from the first on, and as many of the worst
SIDE = (128, 512)  # pixels: smaller pictures are enlarged by a whole factor, larger ones shrunk
FRAMES = 4  # of a video that are shown side by side
DB = (0.0, 40.0)  # SQNR that the atlas draws as darkest and as lightest
UNREADABLE = (UserError, Damaged, OSError, ValueError, KeyError, BadZipFile)


def card(record: Record, name: str, home: Path) -> Card:
    """Of a run that begins: its record as far as it is known, the name that its folder will have, and the experiment's folder."""
    protocol = record.config.get("protocol") or {}
    about = {"run_id": record.run_id, "attempt": name, "n": protocol.get("n")} | record.env
    columns = {"model_name": record.model, "method_name": record.method, "bits_label": label(record)}
    return Card(
        id=name,
        title=" ".join([record.model, record.method, label(record), *what_differs(record)]),
        group=record.experiment,
        job_type="reference" if record.method == registry.FLOAT else "quantize",
        tags=tuple(dict.fromkeys((record.model, record.method, label(record), f"protocol:{protocol.get('name')}"))),
        config=record.config | columns | {"run": about},
        home=home,
    )


def label(record: Record) -> str:
    """W4A8, also of a run that has not counted its bits."""
    asked = record.config.get("bits")
    asked = asked.get("label") if isinstance(asked, dict) else asked
    return str(record.bits.get("label") or asked or "").upper()


def what_differs(record: Record) -> list[str]:
    """seed 1, form published, strength 0.6: the seed, and what of the method is not as its form has it."""
    told = [f"seed {record.config.get('seed')}"]
    method = record.config.get("method") or {}
    form = method.get("form", DEFAULT) if isinstance(method, dict) else DEFAULT
    told += [f"form {form}"] if form != DEFAULT else []
    try:
        ours = registry.params_of(method)
        usual = registry.params_of(
            {"name": record.method, "form": form, **registry.forms_of(record.method)[form].params}
        )
    except UserError:  # a record of before, or of a plugin that is not here
        return told
    names = [field.name for field in fields(ours) if getattr(ours, field.name) != getattr(usual, field.name)]
    return told + [f"{name} {getattr(ours, name)}" for name in names]


def final(record: Record) -> dict[str, Value]:
    """All that a record has to show. What cannot be read (its samples were deleted) is left out and named in `not_shown`."""
    found: dict[str, Value] = dict(numbers(record))
    parts: dict[str, Callable[[Record], dict[str, Value]]] = {
        "metrics": metrics_table,
        "layers": layers_table,
        "layer_errors": error_atlas,
        "grids": grids,
        "per_sample": samples_tables,
    }
    left_out = []
    for name, part in parts.items():
        try:
            found |= part(record)
        except UNREADABLE as error:
            left_out.append(f"{name}: {error}")
    return found | ({"not_shown": "; ".join(left_out)} if left_out else {})


def numbers(record: Record) -> dict[str, Any]:
    """The record's numbers, flat: metrics/<name>, metrics/<name>/ci95_low, metrics/<name>/n, efficiency/…, bits/…, timings_s/…."""
    flat: dict[str, Any] = {}
    for name, entry in record.metrics.items():
        flat[f"metrics/{name}"] = entry.get("value")
        if entry.get("value") is not None:
            flat[f"metrics/{name}/n"] = entry.get("n")
        if entry.get("ci95"):
            flat[f"metrics/{name}/ci95_low"], flat[f"metrics/{name}/ci95_high"] = entry["ci95"]
    for section in ("efficiency", "bits", "timings_s", "cost"):
        flat |= _flatten(section, getattr(record, section))
    return {name: value for name, value in flat.items() if value is not None}


def metrics_table(record: Record) -> dict[str, Value]:
    columns = ("metric", "value", "ci95_low", "ci95_high", "n", "better", "noise_floor", "status", "reason", "passport")
    rows = []
    for name, entry in record.metrics.items():
        low, high = entry.get("ci95") or (None, None)
        told = [entry.get("n"), entry.get("better"), entry.get("noise_floor"), entry.get("status"), entry.get("reason")]
        passport = json.dumps(entry.get("passport") or {}, sort_keys=True)
        rows.append([name, entry.get("value"), low, high, *(_plain(each) for each in told), passport])
    return {"metrics_table": Table(columns, rows)} if rows else {}


def layers_table(record: Record) -> dict[str, Value]:
    if not record.layers:
        return {}
    columns = ("layer", *next(iter(record.layers.values())))
    rows = [[layer, *(entry.get(name) for name in columns[1:])] for layer, entry in record.layers.items()]
    return {"layers": Table(columns, rows)}


def error_atlas(record: Record) -> dict[str, Value]:
    """SQNR by layer and denoising step, as a table and as a picture."""
    if "layer_errors" not in record.artifacts:
        return {}
    with np.load(artifact(record, "layer_errors"), allow_pickle=False) as saved:
        names, steps = saved["names"].tolist(), saved["steps"].tolist()
        db_LS = saved["sqnr_db"]
    rows = [
        [str(name), int(step), None if np.isnan(value) else float(value)]
        for name, row in zip(names, db_LS, strict=True)
        for step, value in zip(steps, row, strict=True)
    ]
    caption = f"SQNR in dB, {DB[0]:g} (dark) to {DB[1]:g} (light); a row per layer, a column per step"
    return {
        "layers_by_step": Table(("layer", "step", "sqnr_db"), rows[:MOST_ROWS]),
        "layer_errors": Picture(heat_map(names, steps, db_LS), caption),
    }


def grids(record: Record) -> dict[str, Value]:
    shown: dict[str, Value] = {}
    for name in ("grid", "float_grid", "animation", "float_animation"):
        if name in record.artifacts:
            path = artifact(record, name)
            shown[f"samples/{name}"] = Movie(path) if path.suffix == ".gif" else Picture(path)
    return shown


def samples_tables(record: Record) -> dict[str, Value]:
    """Every sample's values; and of the first and the worst samples the pictures, beside the float model's."""
    if sample_values.FILE not in record.artifacts.values():
        return {}
    values = sample_values.load(artifact(record, "per_sample"))
    samples = samples_of(record)
    told = _told_of(samples)
    columns = {name: one.values_N for name, one in values.run.items() if len(one.values_N) == len(told)}
    columns |= {
        f"float/{name}": one.values_N for name, one in values.float_model.items() if len(one.values_N) == len(told)
    }
    rows = [
        [index, told[index], *(_number(column[index]) for column in columns.values())]
        for index in range(min(len(told), MOST_ROWS))
    ]
    float_model = samples_at(store_of(record, record.made_from["float_samples"]), record)
    by, worst = _worst(record, columns)
    chosen = dict.fromkeys(range(min(BEST_SEEN, len(told))), "first") | dict.fromkeys(worst, f"worst {by}")
    beside, pictures = [], []
    for index, why in chosen.items():
        ours, theirs = (shown(each.pixels[[index]][0]) for each in (samples, float_model))
        beside.append([index, why, told[index], Picture(ours), Picture(theirs)])
        pictures.append(Picture(_side_by_side(ours, theirs), f"{told[index]} ({why}; left quantized, right float)"))
    left_out = {"per_sample/rows_left_out": len(told) - len(rows)} if len(told) > len(rows) else {}
    return left_out | {
        "per_sample": Table(("sample", "prompt", *columns), rows),
        "samples/table": Table(("sample", "why", "prompt", "quantized", "float"), beside),
        "samples/beside_float": pictures,
    }


def first_grid(samples: Samples) -> Image.Image:
    """The first samples of a run that goes on."""
    image = grid(samples, columns=4, rows=4)
    image.thumbnail((4 * SIDE[1], 4 * SIDE[1]))
    return image


def shown(pixels: Tensor) -> Image.Image:
    """One sample, uint8 (H, W, 3), or some frames of a video (F, H, W, 3) side by side, in a size to be looked at."""
    height, width = pixels.shape[-3:-1]
    if pixels.ndim == 4:
        frames = torch.linspace(0, len(pixels) - 1, min(FRAMES, len(pixels))).round().long()
        pixels = torch.cat(list(pixels[frames]), dim=1)
    image = Image.fromarray(pixels.numpy())
    least, most = SIDE
    if (factor := -(-least // min(height, width))) > 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    shrunk = min(1.0, most / max(height, width))
    return image.resize((round(image.width * shrunk), round(image.height * shrunk)))


def heat_map(names: Sequence[str], steps: Sequence[int], db_LS: np.ndarray) -> Image.Image:
    """A row per name, a column per step, with their names beside them."""
    row, column, left, top = 14, 22, 8 + 6 * max((len(name) for name in names), default=0), 16
    picture = Image.new("RGB", (left + column * len(steps), top + row * len(names)), "white")
    draw = ImageDraw.Draw(picture)
    low, high = DB
    for s, step in enumerate(steps):
        draw.text((left + column * s + 2, 2), str(step), fill="black")
        for index in range(len(names)):
            value = db_LS[index, s]
            share = 0.5 if np.isnan(value) else float(np.clip((value - low) / (high - low), 0, 1))
            colour = (220, 220, 220) if np.isnan(value) else _colour(share)
            corner = (left + column * s, top + row * index)
            draw.rectangle((*corner, corner[0] + column - 2, corner[1] + row - 2), fill=colour)
    for index, name in enumerate(names):
        draw.text((4, top + row * index), name, fill="black")
    return picture


def _colour(share: float) -> tuple[int, int, int]:
    """From dark blue over green to yellow."""
    stops = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], float)
    place = share * (len(stops) - 1)
    first = min(int(place), len(stops) - 2)
    mixed = stops[first] + (place - first) * (stops[first + 1] - stops[first])
    return int(mixed[0]), int(mixed[1]), int(mixed[2])


def _told_of(samples: Samples) -> list[str]:
    """What each sample was asked to be: its prompt, or its label."""
    if samples.prompts:
        return [prompt.text for prompt in samples.prompts]
    if samples.labels_N is not None:
        return [f"label {label}" for label in samples.labels_N.tolist()]
    return [""] * len(samples)


def _worst(record: Record, columns: Mapping[str, np.ndarray]) -> tuple[str, list[int]]:
    """A metric that compares each sample with the float model's, and the samples where it is worst."""
    for name, column in columns.items():
        entry = record.metrics.get(name) or {}
        if entry.get("paired") and entry.get("better") in ("higher", "lower"):
            ordered = np.argsort(column if entry["better"] == "higher" else -column, kind="stable")
            return name, [int(index) for index in ordered if not np.isnan(column[index])][:BEST_SEEN]
    return "", []


def _side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    both = Image.new("RGB", (left.width + right.width + 4, max(left.height, right.height)), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + 4, 0))
    return both


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (dict, list)) else value


def _flatten(prefix: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {name: leaf for key, inner in value.items() for name, leaf in _flatten(f"{prefix}/{key}", inner).items()}
    return {prefix: len(value) if isinstance(value, list) else value}
