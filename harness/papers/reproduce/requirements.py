"""What a reproduction needs: hours, memory, disk, weights, prompts, reference images. Loads no weights and runs nothing."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from ditbench.eval.base import known_metrics
from ditbench.eval.needs import lacking
from ditbench.harness.calibration import recording
from ditbench.harness.fitting import registry
from ditbench.harness.fitting.forms import DEFAULT
from ditbench.harness.models import batch_sizes
from ditbench.harness.papers import reported
from ditbench.harness.papers.reproduce.rows import (
    Line,
    absent,
    config_method,
    configurations,
    is_another,
    plan_lines,
    reproducible,
    why,
)
from ditbench.harness.papers.reproduce.sizes import REACHED, Sizes, sizes
from ditbench.harness.papers.schema import Reproduce, Table
from ditbench.harness.sweep.plan import amount, duration, size

WIDTH = 118
NOT_HERE = "not here"


def plan(name: str | None, model: str | None = None, overrides: Sequence[str] = (), file: Path | None = None) -> str:
    """What a reproduction needs; loads no weights of a large model and runs nothing.

    Raises:
        UserError: no such table, or one that cannot be run here.
    """
    table = reported.table(name, file)
    section = reproducible(table)
    lines = plan_lines(table, section, model, overrides)
    configs = configurations(line.job for line in lines)
    models = {config["model"]["name"]: config for config in configs.values()}
    here = list(dict.fromkeys(line.row.name for line in lines if line.job is not None))
    here = [f"{each} ({config_method(lines, configs, each)})" for each in here]
    drawn = _image_sets(configs.values())
    images = sum(n for n, _, _, _ in drawn)
    rows = sum(n * steps * copies for n, steps, copies, _ in drawn)
    calls = sum(math.ceil(n / batch) * steps for n, steps, _, batch in drawn)
    needed = sizes(configs.values())
    first = next(iter(configs.values()))
    described = [
        *(("model", f"{name}; weights: {_weights(config['model'])}{_size_of_weights(needed, name)}") for name, config in models.items()),
        *(("prompts", said) for said in dict.fromkeys(each for config in models.values() for each in _prompts(config))),
        *([("reference images", reference(section, first, is_another(section, model)))] if section.reference else []),
        ("evaluator", _evaluator(section, first, is_another(section, model))),
        ("protocol", _protocol(configs.values())),
        ("methods here", ", ".join(here)),
        *(("method", said) for said in _methods(configs.values())),
        *_not_here(table, section, lines),
        ("runs", f"{len(configs)}, for {sum(line.job is not None for line in lines)} of {len(lines)} rows"),
        ("samples", f"{images:,} in {len(drawn)} sets: one per run, the float model's, its other seeds, calibration"),
        ("transformer", f"{calls:,} calls in batches, {rows:,} rows in all (guidance counts twice), fitting and measuring not counted"),
        *_amounts(needed),
        ("records", f"{first['results_dir']}/runs/{first['name']}"),
    ]  # fmt: skip
    width = max(len(key) for key, _ in described)
    text = [f"plan of {table.name} · {table.paper}; nothing is run or recorded"]
    text += [f"  {key.ljust(width)}  {said}" for key, said in described]
    text += notes(table, section, lines, configs.values())
    return "\n".join(
        part
        for line in text
        for part in (
            wrap(line, WIDTH, subsequent_indent=" " * 4, break_on_hyphens=False, break_long_words=False) or [""]
        )
    )


def reference(section: Reproduce, config: Mapping[str, Any], another: bool = False) -> str:
    assert section.reference is not None
    given = config["metrics"]["reference"]
    if another:
        return f"{given} (the paper's: {section.reference.file})"
    if given and Path(given).exists():
        return f"{given}, here"
    return f"{section.reference.file} from {section.reference.address}, then metrics.reference=FILE"


def absent_prompts(config: Mapping[str, Any]) -> list[str]:
    """Of the sets that a run asks for, what is said of those that are not on this machine."""
    found = [absent(config[section]["prompts"]) for section in ("protocol", "calibration")]
    return [problem for problem in dict.fromkeys(found) if problem]


def notes(table: Table, section: Reproduce, lines: Sequence[Line], configs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Warnings of rows, what the section says, what the methods say of themselves, what rows and columns lack, and the rule."""
    said = [f"warning: {row.title}: {row.warning}" for row in table.rows if row.warning]
    said += [f"note: {note}" for note in section.notes]
    said += [f"differs from the paper: {what}: {how}" for what, how in section.departs.items()]
    forms = {config["method"]["name"]: config["method"]["form"] for config in configs}
    for name, form in forms.items():
        departs = re.search(r"Departs from the paper: (.+?)(?:\n\n|\Z)", registry.method(name).__doc__ or "", re.DOTALL)
        if departs:
            of = "" if form == DEFAULT else f" (said of form=default; here form={form} runs)"
            said.append(f"note: {name} departs from its paper{of}: {' '.join(departs[1].split())}")
    said += [f"not here: {lack}" for lack, _ in _lacks(section, lines)]
    columns = [
        f"{name} ({section.lacks[name]})" if name in section.lacks else name for name in _not_computed(table, section)
    ]
    said += [f"not computed here: {', '.join(columns)} (ditbench paper show {table.name})"] if columns else []
    tolerances = ", ".join(f"{column} {tolerance:g}" for column, tolerance in section.tolerance.items())
    return [
        *said,
        f"within: the paper's value in our 95 % interval, or |Δ| at most {tolerances} (ours, not the paper's)",
    ]


def _methods(configs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Of each method the form that runs, and the values that are not its defaults, whoever set them."""
    found: dict[str, None] = {}
    for config in configs:
        method, usual = config["method"], registry.defaults(config["method"]["name"])
        own = [
            f"{name}={value}" for name, value in method.items() if name != "form" and value != _plain(usual.get(name))
        ]
        found[f"{method['name']}, form={method['form']}: {', '.join(own) or 'its default parameters'}"] = None
    return list(found)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _lacks(section: Reproduce, lines: Sequence[Line]) -> list[tuple[str, int]]:
    """(what is not here and why, how many rows want it)"""
    counted = Counter(lack for line in lines for lack in line.lacks)
    return [(why(section, lack), rows) for lack, rows in counted.items()]


def _not_computed(table: Table, section: Reproduce) -> list[str]:
    return [column for column in table.columns if column not in section.metrics]


def _not_here(table: Table, section: Reproduce, lines: Sequence[Line]) -> list[tuple[str, str]]:
    found = [f"{lack}: {rows} row{'s' * (rows > 1)}" for lack, rows in _lacks(section, lines)]
    return [(NOT_HERE, "; ".join(found) or "nothing: every row can be run")]


def _amounts(needed: Sizes) -> list[tuple[str, str]]:
    said = [("unknown size", f"{name}: {reason}") for name, reason in needed.unplanned.items()]
    if not needed.runs:
        return said
    more = "≥ " if needed.at_least else ""
    rest = f"; {' and '.join(sorted(needed.at_least))} not wholly known" if needed.at_least else ""
    if needed.measured:
        hours = f"{more}{needed.here_s / 3600:,.3g} on {needed.here}, by a probe of it{rest}"
    else:
        hours = (
            f"{more}{needed.gpu_s / 3600:,.3g} at {REACHED:.0%} of an H100's peak in each stage's dtype (arithmetic: nothing was "
            f"measured on one{rest})"
        )
        said.append(("hours here", f"{more}{duration(needed.here_s)} on {needed.here}, by a probe of it"))
    if needed.stand_ins:
        pairs = ", ".join(f"{name} by {other}" for name, other in needed.stand_ins.items())
        said.append(("planned", f"{pairs}: of the same shapes, since its weights are not here"))
    ways = " or ".join(
        f"device {size(device)}, host {size(host)} (memory={way})" for way, (host, device) in needed.device.items()
    )
    found = [("operations", f"{amount(needed.macs)}MAC in {needed.runs} runs"), ("GPU hours", hours), *said]
    found += [("memory", f"at most {ways}"), ("disk", f"{size(needed.disk_bytes)}, and the weights")]
    return found + ([("not counted", "; ".join(needed.unknown))] if needed.unknown else [])


def _size_of_weights(needed: Sizes, name: str) -> str:
    return f"; transformer {size(needed.transformer[name])}" if needed.transformer.get(name) else ""


def _prompts(config: Mapping[str, Any]) -> list[str]:
    found = []
    for section in ("protocol", "calibration"):
        if name := config[section]["prompts"]:
            problem = absent(name)
            found.append(f"{name} ({section}): {'here' if problem is None else problem}")
    return found


def _evaluator(section: Reproduce, config: Mapping[str, Any], another: bool) -> str:
    said = ", ".join(f"{column} = {metric}" for column, metric in section.metrics.items())
    if another:
        return f"{said}; in their place, what {config['model']['name']} has: {', '.join(config['metrics']['names'])}"
    problems = dict.fromkeys(problem for name in section.metrics.values() for problem in lacking(known_metrics()[name]))
    return f"{said}; {'; '.join(problems) if problems else 'all of it is here'}"


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
        of = (config["model"]["name"], *(protocol[key] for key in ("sampler", "steps", "guidance", "n")))
        shared[json.dumps(of)] = [
            *([drawn] * (1 + extra)),
            (calibration["n"], protocol["steps"], copies, _batch(calibration, recording.MOST)),
        ]
    return [*sets, *(each for of_protocol in shared.values() for each in of_protocol)]


def _batch(section: Mapping[str, Any], most: int) -> int:
    """A size that is found may be smaller on a small device."""
    return most if section["batch_size"] == batch_sizes.AUTO else section["batch_size"]


def _protocol(configs: Iterable[Mapping[str, Any]]) -> str:
    protocols = [config["protocol"] for config in configs]
    words = {"sampler": "", "steps": " steps", "guidance": " guidance", "n": " samples per run"}
    if not any(each["prompts"] for each in protocols):
        words["labels"] = " labels"
    said = [f"{' | '.join(dict.fromkeys(str(each[key]) for each in protocols))}{word}" for key, word in words.items()]
    return f"{protocols[0]['name']}: " + ", ".join(said)


def _weights(model: Mapping[str, Any]) -> str:
    source = str(model["source"])
    if model["random"] is not None or source.startswith("zoo:"):
        return "shipped" if model["random"] is None else "random"
    if Path(source).expanduser().is_dir():
        return f"{source}, here"
    return f"https://huggingface.co/{source} (`hf download {source} --local-dir DIR`, then model.source=DIR)"
