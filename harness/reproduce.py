"""`ditbench reproduce`: run what a paper's table asks for, and hold the paper's numbers against ours.

A verdict is "within" (the paper's value lies in our 95 % interval, or no further from ours than the table's tolerance),
"outside", or "not comparable" with the reasons. Reasons are found, not written down: the configuration in each record is
compared with the one that the table's section `reproduce` composes to, and each metric's passport with what it asks for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import methods, papers
from harness.config import RunConfig, parse
from harness.errors import UserError
from harness.listing import table as text_table
from harness.papers import EMPTY, Reproduce, Row, Table, row_title
from harness.record import Record
from harness.report.compare import value
from harness.report.frame import SIMULATED, reason
from harness.report.table import interval
from harness.run import cached_model, run
from harness.sweep import composed

# What papers call a method → what it is called here; a name that is not installed is "not in ditbench yet".
OURS = {
    "FP": "fp",
    "RTN": "rtn",
    "SmoothQuant": "smoothquant",
    "QuaRot": "quarot",
    "GPTQ": "gptq",
    "PTQ4DM": "ptq4dm",
    "Q-Diffusion": "q_diffusion",
    "PTQD": "ptqd",
    "RepQ*": "repq",
    "RepQ-ViT": "repq",
    "PTQ4DiT": "ptq4dit",
    "ViDiT-Q": "vidit_q",
    "Q-DiT": "q_dit",
    "HTG": "htg",
    "CLQ": "clq",
    "LRQ-DiT": "lrq_dit",
    "SVDQuant": "svdquant",
    "DuQuant": "duquant",
}
NOT_YET = "not in ditbench yet"
JUDGE = "_judge"  # metrics in the features of a zoo model's judge end so, and stand in for Inception's there
LATENT_SHARE = 0.25  # float32 latents of an 8×, 4-channel VAE, in bytes per pixel; the image itself has 3
GIB = 2**30


@dataclass(frozen=True)
class Line:
    """One row of the paper. job: the overrides of the run that it asks for; None: no such method here."""

    row: Row
    job: tuple[str, ...] | None
    expected: tuple[str, ...] | None  # the same at the paper's model and protocol


@dataclass(frozen=True)
class Outcome:
    text: str
    failed: bool


@dataclass(frozen=True)
class Judged:
    """One cell: ours, its interval, and the verdict with its reasons {what: how it differs}."""

    ours: float | None
    ci95: Sequence[float] | None
    verdict: str
    reasons: Mapping[str, str]


def reproduce(name: str, model: str | None = None, overrides: Sequence[str] = ()) -> Outcome:
    """Run what is missing, print the comparison.

    Raises:
        UserError: no such table, one that cannot be run here, or weights or a reference batch that are not here.
    """
    table, section = _reproducible(name)
    lines = plan_lines(table, section, model, overrides)
    parsed, refused = _parsed(_configurations(line.job for line in lines))
    if model in (None, section.model):
        _check_inputs(name, section, next(iter(parsed.values())))
    wanted, _ = _parsed(_configurations(line.expected for line in lines))
    records = {job: run(config) for job, config in parsed.items()}
    judged = [
        _judged_row(line, section, records.get(line.job), refused.get(line.job), wanted.get(line.expected))
        for line in lines
    ]
    failed = any(record.status == "failed" for record in records.values())
    return Outcome(_printed(table, section, lines, judged, list(records.values())), failed)


def plan(name: str, model: str | None = None, overrides: Sequence[str] = ()) -> str:
    """What a reproduction needs; composes configurations, loads and runs nothing."""
    table, section = _reproducible(name)
    lines = plan_lines(table, section, model, overrides)
    configs = _configurations(line.job for line in lines)
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
        ("reference batch", _reference(section, first)),
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
    return "\n".join([*text, *_notes(table, section, configs.values())])


def plan_lines(table: Table, section: Reproduce, model: str | None, overrides: Sequence[str]) -> list[Line]:
    """Every row with the run it asks for: the paper's settings, then the model's usual n and steps if it is another
    model than the paper's, then the user's overrides."""
    taken = [
        override.split("=")[0]
        for override in overrides
        if override.split("=")[0] in ("model", "method", "bits", "protocol")
    ]
    if taken:
        instead = "--model NAME" if taken[0] == "model" else "the table says it; ditbench run takes any"
        raise UserError(f"reproduce: {taken[0]}= cannot be overridden: {instead}")
    scaled = []
    if model not in (None, section.model):
        scaled = [f"model={model}", "protocol.n=${model.usual.n}", "protocol.steps=${model.usual.steps}"]
    lines = []
    for row in table.rows:
        expected = _expected(table, section, row)
        job = None if expected is None else _merged(expected, scaled, overrides)
        lines.append(Line(row, job, expected))
    if not any(line.job for line in lines):
        raise UserError(
            f"{table.name}: none of its methods is in ditbench yet: {', '.join(sorted({line.row.name for line in lines}))}"
        )
    return lines


def verdict(
    paper: float, ours: float, ci95: Sequence[float] | None, tolerance: float, reasons: Iterable[str] = ()
) -> str:
    """within | outside | not comparable: what differs."""
    if reasons := list(reasons):
        return f"not comparable: {', '.join(reasons)}"
    in_interval = ci95 is not None and ci95[0] <= paper <= ci95[1]
    return "within" if in_interval or abs(ours - paper) <= tolerance else "outside"


def departures(ours: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, str]:
    """{what: "ours, not the paper's"} for every setting that can move the comparison; both are whole configurations."""
    left, right = _settings(ours), _settings(expected)
    differing = [key for key in {**right, **left} if left.get(key) != right.get(key)]
    return {_short(key): f"{left.get(key)}, not {right.get(key)}" for key in differing}


def evaluator_departures(metric: str, wanted: str, passport: Mapping[str, Any], reference: str) -> dict[str, str]:
    """Other features than those asked for, or another set of real images."""
    found = {}
    if metric != wanted:
        found["features"] = f"{metric} (the zoo judge's), not {wanted} (Inception's)"
    if passport.get("reference") not in (None, reference):
        found["reference"] = f"{passport['reference']}, not {reference}"
    return found


def config_method(lines: Sequence[Line], configs: Mapping[tuple[str, ...], Mapping[str, Any]], paper_name: str) -> str:
    return next(configs[line.job]["method"]["name"] for line in lines if line.row.name == paper_name and line.job)


def _reproducible(name: str) -> tuple[Table, Reproduce]:
    table = papers.table(name)
    if table.reproduce is None:
        able = [each.name for each in papers.tables().values() if each.reproduce]
        raise UserError(
            f"{table.name}: its model or metrics are not in ditbench, so it cannot be run; these can: {', '.join(able)}"
        )
    return table, table.reproduce


def _expected(table: Table, section: Reproduce, row: Row) -> tuple[str, ...] | None:
    """The paper's own settings of this row as overrides; None if the method is not here."""
    chosen = section.rows.get(row.name) or ([f"method={OURS[row.name]}"] if row.name in OURS else [])
    if not chosen or chosen[0].split("=")[1] not in methods.known_methods():
        return None
    widths = re.fullmatch(r"W(\d+)A(\d+)", str(row.keys.get("bits")))
    if widths and chosen[0] != f"method={methods.FLOAT}":
        chosen = [*chosen, f"bits={widths[0].lower()}"]
    usual = [
        f"name=reproduce-{table.name}",
        f"model={section.model}",
        *(f"{k}={_written(v)}" for k, v in section.overrides.items()),
    ]
    return _merged([*usual, f"protocol.steps={row.keys.get('steps', section.steps)}", *chosen])


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _merged(*parts: Iterable[str]) -> tuple[str, ...]:
    """Overrides by what they set; the last one wins."""
    return tuple({override.split("=")[0].lstrip("+"): override for part in parts for override in part}.values())


def _configurations(jobs: Iterable[tuple[str, ...] | None]) -> dict[tuple[str, ...], dict[str, Any]]:
    distinct = list(dict.fromkeys(job for job in jobs if job is not None))
    return dict(zip(distinct, composed(distinct), strict=True))


def _parsed(
    configs: Mapping[tuple[str, ...], dict[str, Any]],
) -> tuple[dict[tuple[str, ...], RunConfig], dict[tuple[str, ...], str]]:
    """What can be run, and why the rest cannot: a method need not define every format of a table."""
    parsed: dict[tuple[str, ...], RunConfig] = {}
    refused: dict[tuple[str, ...], UserError] = {}
    for job, config in configs.items():
        try:
            parsed[job] = parse(config)
        except UserError as error:
            refused[job] = error
    if not parsed:
        raise next(iter(refused.values()))
    return parsed, {job: str(error) for job, error in refused.items()}


def _check_inputs(name: str, section: Reproduce, config: RunConfig) -> None:
    """All that is missing in one message, before hours of running."""
    missing = []
    try:
        cached_model(json.dumps(asdict(config.model), sort_keys=True))
    except UserError as error:
        missing.append(str(error))
    if not config.section("metrics")["reference"]:
        missing.append(_reference(section, config.raw))
    if missing:
        more = f"`ditbench reproduce {name} --plan` says what it takes; --model tiny-dit tries it on the shipped model"
        raise UserError("\n".join([*missing, more]))


def _judged_row(
    line: Line, section: Reproduce, record: Record | None, refusal: str | None, expected: RunConfig | None
) -> dict[str, Judged]:
    """{column: judged}; a row that was not run, or not to the end, says so in every column."""
    if record is None or expected is None:
        why = f"refused: {refusal}" if refusal else NOT_YET
    elif record.status != "ok":
        why = f"{record.status}: {reason(record)}"
    else:
        why = None
    if why is not None:
        return {column: Judged(None, None, why, {}) for column in section.metrics}
    settings = departures(record.config, expected.raw)
    return {column: _judged(line.row, column, section, record, settings) for column in section.metrics}


def _judged(row: Row, column: str, section: Reproduce, record: Record, settings: Mapping[str, str]) -> Judged:
    wanted, paper = section.metrics[column], row.values.get(column)
    metric = wanted if value(record, wanted) is not None else wanted + JUDGE
    ours, entry = value(record, metric), record.metrics.get(metric, {})
    if ours is None:
        skipped = record.metrics.get(wanted, entry)
        return Judged(None, None, f"not computed: {skipped.get('reason') or f'{wanted} was not asked for'}", {})
    if paper is None:
        return Judged(ours, entry.get("ci95"), "the paper prints no value", {})
    reasons = dict(settings) | evaluator_departures(metric, wanted, entry.get("passport", {}), section.reference.file)
    if row.confidence == "recall":
        reasons["confidence"] = f"recall ({papers.CONFIDENCES['recall']})"
    return Judged(
        ours, entry.get("ci95"), verdict(paper, ours, entry.get("ci95"), section.tolerance[column], reasons), reasons
    )


def _printed(
    table: Table,
    section: Reproduce,
    lines: Sequence[Line],
    judged: Sequence[Mapping[str, Judged]],
    records: Sequence[Record],
) -> str:
    rows = []
    for line, cells in zip(lines, judged, strict=True):
        for column, cell in cells.items():
            paper = line.row.values.get(column)
            decimals = 4 if section.tolerance[column] < 0.1 else 2
            delta = EMPTY if cell.ours is None or paper is None else f"{cell.ours - paper:+.{decimals}f}"
            ours = EMPTY if cell.ours is None else f"{cell.ours:.{decimals}f}"
            band = EMPTY if cell.ours is None else interval(cell.ours, cell.ci95, decimals) or EMPTY
            named = [str(line.row.keys.get(key, EMPTY)) for key in table.keys]
            rows.append([*named, column, EMPTY if paper is None else str(paper), ours, delta, band, cell.verdict])
    text = [f"{table.name} · {table.paper} · {records[0].model}"]
    text.append(text_table([*table.keys, "metric", "paper", "ours", "Δ", "interval", "verdict"], rows))
    found: dict[str, dict[str, None]] = {}
    for cells in judged:
        for cell in cells.values():
            for what, how in cell.reasons.items():
                found.setdefault(what, {})[how] = None
    notes = [f"{what}: {'; '.join(how)}" for what, how in found.items()]
    simulated = sum(record.efficiency.get("kind") == SIMULATED for record in records)
    if simulated:
        notes.append(
            f"simulated: {simulated} of {len(records)} runs, quantized in floating point; nothing here is a speed"
        )
    return "\n\n".join([*text, "\n".join([*notes, *_notes(table, section, (record.config for record in records))])])


def _notes(table: Table, section: Reproduce, configs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Warnings of rows, what the section says, what the methods say of themselves, and columns that nothing computes."""
    notes = [f"warning: {row_title(row)}: {row.warning}" for row in table.rows if row.warning]
    notes += [f"note: {note}" for note in section.notes]
    for name in dict.fromkeys(config["method"]["name"] for config in configs):
        departs = re.search(r"Departs from the paper: (.+?)(?:\n\n|\Z)", methods.method(name).__doc__ or "", re.DOTALL)
        if departs:
            notes.append(f"note: {name} departs from its paper: {' '.join(departs[1].split())}")
    left = [column for column in table.columns if column not in section.metrics]
    notes += [f"not computed here: {', '.join(left)} (ditbench paper show {table.name})"] if left else []
    tolerances = ", ".join(f"{column} {tolerance:g}" for column, tolerance in section.tolerance.items())
    return [
        *notes,
        f"within: the paper's value in our 95 % interval, or |Δ| at most {tolerances} (ours, not the paper's)",
    ]


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared between two configurations: not where weights lie, nor what only this machine is told."""
    parts = {
        "model": {key: config["model"][key] for key in ("name", "random", "stress")},
        "protocol": {key: setting for key, setting in config["protocol"].items() if key != "name"},
        "method": config["method"],
        "bits": {side: config["bits"][side] for side in ("weight", "act")},
        "calibration": {"n": config["calibration"]["n"]},
        "generate": {"dtype": config["generate"]["dtype"]},
    }
    return dict(_flat(parts))


def _flat(config: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if not isinstance(config, Mapping):
        yield prefix, config
        return
    for key, setting in config.items():
        yield from _flat(setting, f"{prefix}.{key}" if prefix else key)


def _short(key: str) -> str:
    """model.name → model, protocol.n → n; other parts keep their prefix."""
    return "model" if key == "model.name" else key.removeprefix("protocol.")


def _image_sets(configs: Iterable[Mapping[str, Any]]) -> list[tuple[int, int, int, int]]:
    """(n, steps, rows per image, batch size) of every set of samples that has to be drawn."""
    sets, shared = [], {}
    for config in configs:
        protocol, generate, calibration = config["protocol"], config["generate"], config["calibration"]
        copies = 2 if protocol["guidance"] > 1 else 1
        drawn = (protocol["n"], protocol["steps"], copies, generate["batch_size"])
        sets.append(drawn)
        extra = generate["noise_floor_seeds"] + (generate["dtype"] != generate["reference_dtype"]) * (
            generate["noise_floor_seeds"] > 0
        )
        shared[json.dumps([protocol[key] for key in ("sampler", "steps", "guidance", "n")])] = [
            *([drawn] * (1 + extra)),
            (calibration["n"], protocol["steps"], copies, calibration["batch_size"]),
        ]
    return [*sets, *(each for of_protocol in shared.values() for each in of_protocol)]


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


def _reference(section: Reproduce, config: Mapping[str, Any]) -> str:
    given = config["metrics"]["reference"]
    if config["model"]["name"] != section.model:
        return f"{given} (the paper's: {section.reference.file})"
    if given and Path(given).exists():
        return f"{given}, here"
    return f"{section.reference.file} from {section.reference.address}, then metrics.reference=FILE"


def _disk(config: Mapping[str, Any], section: Reproduce, images: int) -> str:
    if config["model"]["name"] != section.model:
        return "small: another model than the paper's"
    size_bytes = images * section.image_size**2 * (3 + LATENT_SHARE)
    return f"at most {size_bytes / GIB:.1f} GiB of images and latents ({section.image_size} px, before compression), and the weights"
