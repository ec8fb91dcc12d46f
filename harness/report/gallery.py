"""Samples for the page: the float model's beside every run's, those first that suffered most.

Pictures come out of the store that the record names, without loss. Where that was deleted, the small overview beside the record stands
in for them. A video is one picture of all its frames, row by row, which the page plays.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ditbench.harness.common.artifacts import Damaged, check_bytes
from ditbench.harness.common.errors import UserError
from ditbench.harness.records.drawn_samples import store_of
from ditbench.harness.records.record import Record
from ditbench.harness.records.sample_values import Values
from ditbench.harness.report import compare
from ditbench.harness.report.compare import FLOAT_METHOD, Group, short_names
from ditbench.harness.report.contests import label_bits
from ditbench.harness.report.page_files import PageFiles
from ditbench.harness.report.whole import values_with
from ditbench.harness.samples.pixels import LOSSLESS_IMAGE
from ditbench.harness.samples.store import SampleStore, found_store

SHOWN, SHOWN_VIDEOS = 16, 6
FIRST = 4  # of these the first ones, whatever became of them
OVERVIEW_MAX_BYTES, OVERVIEW_MAX_SIDE = 1_500_000, 1024
GONE = "the samples are not in the cache any more; the run's own command draws them again"


def gallery(group: Group, files: PageFiles) -> dict[str, Any] | None:
    """What the page shows of a group's samples; None where no quantized run kept any.

    {"by": metric that says who suffered, "of": N, "first": bits shown first, "samples": [{"row", "about", "seed"}], "video": how frames lie or null,
    "runs": {place: {"pictures", "float": [name of a picture or null], "values": {title: [text]}, "sort": {title: [number]}, "fails": [[…]]}
    or {"overview", "float_overview", "why"}}, "better": {title: higher | lower}}
    """
    stores: dict[int, tuple[SampleStore, SampleStore]] = {}
    overviews = {}
    for place, record in enumerate(group.records):
        if record.method == FLOAT_METHOD or record.status != "ok":
            continue
        try:
            stores[place] = (_store(record, "samples"), _store(record, "float_samples"))
        except (LookupError, OSError, UserError, Damaged):
            overviews[place] = _overview(record, place, group, files)
    overviews = {place: found for place, found in overviews.items() if found}
    if not stores and not overviews:
        return None
    labels = [
        compare.bits_label(group.records[p]) for p in [*stores, *overviews] if label_bits(group.records[p]) is not None
    ]
    closeness = _closeness(group, list(stores))
    found: dict[str, Any] = {"by": short_names(group.metrics).get(closeness or ""), "runs": {}, "samples": [], "of": 0}
    found["first"] = labels[-1] if labels else None  # the fewest bits: where most is to be seen
    found["better"] = {title: compare.better(group, name) for name, title in short_names(group.metrics).items()}
    if stores:
        one, of_float = next(iter(stores.values()))
        rows, about = _rows(group, list(stores), closeness, len(one), _is_video(one)), of_float.about()
        found |= {"of": len(one), "video": _frames(one), "samples": [_said(about[row], row) for row in rows]}
        for place, (own, reference) in stores.items():
            if len(own) == len(one):
                found["runs"][place] = _of_run(group, place, rows, own, reference, files)
    found["runs"] |= {place: its for place, its in overviews.items() if place not in found["runs"]}
    return found


def _store(record: Record, name: str) -> SampleStore:
    store = found_store(store_of(record, record.made_from[name]))
    if store.missing():
        raise FileNotFoundError(store.folder)
    return store


def _is_video(store: SampleStore) -> bool:
    return len(store.note(store.pieces[0])["shape"]) == 4


def _frames(store: SampleStore) -> dict[str, Any] | None:
    if not _is_video(store):
        return None
    note = store.note(store.pieces[0])
    count, height, width = note["shape"][:3]
    columns = math.ceil(math.sqrt(count))
    return {"frames": count, "columns": columns, "height": height, "width": width, "fps": note["fps"]}


def _closeness(group: Group, places: Sequence[int]) -> str | None:
    """The first metric of closeness with a value for every sample: who is far from the float model suffered."""
    for metric in compare.headline_first(group):
        if compare.is_closeness(group, metric) and any(_numbers(group.records[p], metric) is not None for p in places):
            return metric
    return None


def _numbers(record: Record, metric: str) -> np.ndarray | None:
    """A number of each sample by itself; what a sample contributes to FID is none."""
    values: Values | None = values_with(record, metric)
    one = None if values is None else values.run.get(metric)
    return None if one is None or one.pseudo else one.values_N


def _rows(group: Group, places: Sequence[int], metric: str | None, n: int, is_video: bool) -> list[int]:
    """The first few, then every run's worst, every run's second worst, …, as many as are shown; in the order of the set."""
    most, chosen = (SHOWN_VIDEOS if is_video else SHOWN), dict.fromkeys(range(min(FIRST, n)))
    worst = []
    for place in places:
        values_N = _numbers(group.records[place], metric) if metric else None
        if values_N is not None and len(values_N) == n:
            sign = 1 if compare.better(group, metric or "") == "higher" else -1
            worst.append([int(row) for row in np.argsort(sign * values_N, kind="stable")[:most]])
    rest = [row for each in zip_longest(*worst) for row in each if row is not None] + list(range(n))
    for row in rest:
        if len(chosen) >= most:
            break
        chosen[row] = None
    return sorted(chosen)


def _said(line: dict[str, Any], row: int) -> dict[str, Any]:
    prompt = line.get("prompt")
    if prompt is not None:
        tag = prompt.get("about", {}).get("tag")
        about = prompt["text"] + (f" [{tag}]" if tag else "")
    else:
        about = f"class {line['label']}" if line.get("label") is not None else ""
    return {"row": row, "about": about, "seed": str(line.get("seed"))}


def _of_run(
    group: Group, place: int, rows: Sequence[int], own: SampleStore, reference: SampleStore, files: PageFiles
) -> dict[str, Any]:
    record, titles = group.records[place], short_names(group.metrics)
    values: dict[str, list[str]] = {}
    order: dict[str, list[float | None]] = {}
    fails: list[list[str]] = [[] for _ in rows]
    for metric in group.metrics:
        numbers_N = _numbers(record, metric)
        if numbers_N is None or len(numbers_N) != len(own):
            continue
        picked = [float(numbers_N[row]) for row in rows]
        found = values_with(record, metric)
        if found is not None and found.run[metric].yes_no:
            bad = {"higher": 0.0, "lower": 1.0}.get(compare.better(group, metric))
            for each, x in zip(fails, picked, strict=True):
                each += [compare.plain(titles[metric])] if x == bad else []
            continue
        unit = record.metrics[metric].get("unit") or ""
        values[titles[metric]] = [f"{x:.4g} {unit}".strip() if math.isfinite(x) else "–" for x in picked]
        order[titles[metric]] = [x if math.isfinite(x) else None for x in picked]
    return {
        "pictures": [_picture(own, row, files) for row in rows],
        "float": [_picture(reference, row, files) for row in rows],
        "values": values,
        "sort": order,
        "fails": fails,
    }


def _picture(store: SampleStore, row: int, files: PageFiles) -> str | None:
    name = f"samples/{store.key[:16]}-{row}.webp"
    if name in files:
        return name
    try:
        if not _is_video(store):
            return files.picture(name, store.content_of(row))
        return files.picture(name, _all_frames(store.samples().pixels[row]))
    except (OSError, Damaged, StopIteration):
        return None


def _all_frames(video_FHWC: Tensor) -> bytes:
    """One picture of uint8 frames, row by row."""
    frames = video_FHWC.numpy()
    count, height, width, channels = frames.shape
    columns = math.ceil(math.sqrt(count))
    sheet = np.zeros((-(-count // columns) * height, columns * width, channels), np.uint8)
    for index, frame in enumerate(frames):
        top, left = index // columns * height, index % columns * width
        sheet[top : top + height, left : left + width] = frame
    return _webp(Image.fromarray(sheet))


def _webp(image: Image.Image, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", **(how or LOSSLESS_IMAGE))
    return buffer.getvalue()


def _overview(record: Record, place: int, group: Group, files: PageFiles) -> dict[str, Any] | None:
    kind = "animation" if record.artifacts.get("animation") else "grid"
    if not record.artifacts.get(kind):
        return None
    found: dict[str, Any] = {"why": GONE if record.made_from.get("samples") else ""}
    for name, artifact in (("overview", kind), ("float_overview", f"float_{kind}")):
        if record.artifacts.get(artifact):
            found[name] = overview(record, artifact, files)
    return found


def overview(record: Record, artifact: str, files: PageFiles) -> dict[str, Any]:
    """{"picture": name, "reduced": whether it was scaled down} of a picture beside the record, or {"problem": why there is none}."""
    assert record.folder is not None, "records of a report are read from disk"
    relative = record.artifacts[artifact]
    path = record.folder / relative
    try:
        content = path.read_bytes()
        if relative in record.files:
            check_bytes(path, record.files[relative])
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            kind, reduced = (image.format or "PNG").lower(), False
            if len(content) > OVERVIEW_MAX_BYTES and not getattr(image, "is_animated", False):
                image.thumbnail((OVERVIEW_MAX_SIDE, OVERVIEW_MAX_SIDE))
                content, kind, reduced = _webp(image.convert("RGB"), quality=88), "webp", True
    except Exception as error:  # Pillow has an exception of its own for many a damage
        return {"problem": f"{path.name} is {'missing' if isinstance(error, FileNotFoundError) else 'unreadable'}"}
    name = f"overviews/{hashlib.sha256(content).hexdigest()[:32]}.{kind}"
    return {"picture": files.picture(name, content), "reduced": reduced}
