"""The rows of a paper's table and the runs that they ask for."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ditbench.eval.base import known_metrics, no_metric
from ditbench.harness.common.errors import UserError, unknown_name
from ditbench.harness.fitting import registry
from ditbench.harness.fitting.forms import PUBLISHED
from ditbench.harness.papers.schema import Reproduce, Row, Table
from ditbench.harness.quant.spec import all_labels
from ditbench.harness.stages.config import RunConfig, parse
from ditbench.harness.stages.prompt_sets import load_prompts
from ditbench.harness.sweep.compose import composed

# What papers call a method → what it is called here; a row of another name lacks its method.
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
    "16bit": "fp",
    "SVDQ": "svdquant",
    "Min-Max": "rtn",
    "DVD-Quant": "dvd_quant",
    "SegQuant": "segquant",
    "ConvRot": "convrot",
    "DiRotQ": "dirotq",
    "FlatQuant": "flatquant",
}
BITS = re.compile(r"(?:INT )?(W\d+A\d+|FP8)")
PLAIN = re.compile(r"[\w./:@%+?|-]+")  # what Hydra reads as it stands
OF_THE_PAPERS_MODEL = ("model", "metrics", "protocol.n", "protocol.steps", "protocol.prompts", "calibration.prompts")


@dataclass(frozen=True)
class Line:
    """One row of the paper. job: the overrides of the run that it asks for; None: something is not here, which lacks names."""

    row: Row
    job: tuple[str, ...] | None
    expected: tuple[str, ...] | None  # the same at the paper's model and protocol
    lacks: tuple[str, ...] = ()  # "method TFMQ-DM", "model SDXL", "format NVFP4"


def reproducible(table: Table) -> Reproduce:
    """Raises UserError: it has no section `reproduce`, or one that names no metric of ours."""
    if table.reproduce is None:
        why = table.cannot_run or "nothing says what to run for it (a section `reproduce`, docs/papers.md)"
        raise UserError(f"{table.name}: it cannot be run here: {why}; `ditbench paper list` says which can")
    for column, name in table.reproduce.metrics.items():
        if name not in known_metrics():
            raise UserError(f"{table.name}: reproduce: metrics: {column}: {no_metric(name)}")
    return table.reproduce


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
    another = model if is_another(section, model) else None
    lines = [_line(table, section, row, another, overrides) for row in table.rows]
    for override in overrides:
        if override.startswith("method.") and not any(override in (line.job or ()) for line in lines):
            raise UserError(f"reproduce: {override}: no method of {table.name} that is here has such a setting")
    if not any(line.job for line in lines):
        lacks = sorted({each for line in lines for each in line.lacks})
        raise UserError(
            f"{table.name}: none of its rows can be run here: {'; '.join(why(section, each) for each in lacks)}"
        )
    return lines


def is_another(section: Reproduce, model: str | None) -> bool:
    """Whether the table is tried out on a model that is not the paper's."""
    own = [section.model, *(overrides[0].removeprefix("model=") for overrides in section.models.values())]
    return model is not None and model not in own


def why(section: Reproduce, lack: str) -> str:
    """What a row lacks, and the reason if the table gives one."""
    reason = section.lacks.get(lack.partition(" ")[2])
    return f"{lack} ({reason})" if reason else lack


def _line(table: Table, section: Reproduce, row: Row, another: str | None, overrides: Sequence[str]) -> Line:
    chosen, lacks = _method(section, row)
    bits, no_format = _bits(section, row, chosen)
    model, no_model = _model(section, row)
    lacks += no_format + ([] if another else no_model)
    if lacks:
        return Line(row, None, None, tuple(lacks))
    steps = row.keys.get("steps", section.steps)
    usual = [f"name=reproduce-{table.name}"]
    whole = [
        *model,
        f"metrics.names=[{','.join(dict.fromkeys(section.metrics.values()))}]",
        *(f"{k}={_written(v)}" for k, v in section.overrides.items()),
        *([] if steps is None else [f"protocol.steps={steps}"]),
        *model[1:],  # stronger than what holds for all models
    ]
    expected = _merged(usual, whole, chosen, bits)
    overrides = _of_the_method(chosen[0].removeprefix("method="), overrides)
    if another is None:
        return Line(row, _merged(expected, overrides), None if no_model else expected)
    kept = [each for each in whole if not _of_the_papers_model(each)]
    scaled = [f"model={another}", "protocol.n=${model.usual.n}", "protocol.steps=${model.usual.steps}"]
    return Line(row, _merged(usual, kept, chosen, bits, scaled, overrides), None if no_model else expected)


def _of_the_method(name: str, overrides: Sequence[str]) -> list[str]:
    """A setting of methods is for the rows whose method has it."""
    known = set(registry.defaults(name))

    def has(override: str) -> bool:
        section, _, setting = override.split("=")[0].lstrip("+").partition(".")
        return section != "method" or setting.split(".")[0] in known

    return [override for override in overrides if has(override)]


def _of_the_papers_model(override: str) -> bool:
    name = override.split("=")[0]
    return any(name == each or name.startswith(f"{each}.") for each in OF_THE_PAPERS_MODEL)


def _method(section: Reproduce, row: Row) -> tuple[list[str], list[str]]:
    """Overrides that choose the row's method in its published form, or what is not here."""
    chosen = list(section.rows.get(row.name, [f"method={OURS[row.name]}"] if row.name in OURS else []))
    if not chosen or (name := chosen[0].removeprefix("method=")) not in registry.known_methods():
        return [], [f"method {row.name}"]
    return (
        [chosen[0], f"method.form={PUBLISHED}", *chosen[1:]] if PUBLISHED in registry.forms_of(name) else chosen
    ), []


def _bits(section: Reproduce, row: Row, chosen: list[str]) -> tuple[list[str], list[str]]:
    """Of the row, if its method rounds at all."""
    if "bits" not in row.keys or not chosen or chosen[0] == f"method={registry.FLOAT}":
        return [], []
    printed = str(row.keys["bits"])
    if printed in section.bits and section.bits[printed].lower() not in all_labels():
        raise UserError(f"reproduce: bits: {printed}: {unknown_name('format', section.bits[printed], all_labels())}")
    label = section.bits.get(printed) or (BITS.fullmatch(printed) or ["", ""])[1]
    return ([f"bits={label.lower()}"], []) if label.lower() in all_labels() else ([], [f"format {printed}"])


def _model(section: Reproduce, row: Row) -> tuple[list[str], list[str]]:
    if section.model:
        return [f"model={section.model}"], []
    printed = str(row.keys.get("model"))
    return (list(section.models[printed]), []) if printed in section.models else ([], [f"model {printed}"])


def configurations(jobs: Iterable[tuple[str, ...] | None]) -> dict[tuple[str, ...], dict[str, Any]]:
    distinct = list(dict.fromkeys(job for job in jobs if job is not None))
    return dict(zip(distinct, composed(distinct), strict=True))


def parsed(
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


def settings_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A configuration as its record would have it, although its prompts may not be on this machine; None if it is refused."""
    try:
        raw = parse(copy.deepcopy(dict(config)) | prompts_here(config)).raw
    except UserError:
        return None
    return raw | {section: config[section] for section in ("protocol", "calibration")}


def prompts_here(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sections that name sets of prompts; a set that is not on this machine is replaced by one that always is."""
    return {
        section: config[section] | ({"prompts": instead} if absent(config[section]["prompts"]) else {})
        for section, instead in (("protocol", "shapes"), ("calibration", "shapes-calibration"))
    }


def absent(prompts: str | None) -> str | None:
    """Why a set of prompts, or a file, cannot be had; None if it can."""
    try:
        load_prompts(prompts, 1) if prompts else None
    except UserError as error:
        return str(error)
    return None


def config_method(lines: Sequence[Line], configs: Mapping[tuple[str, ...], Mapping[str, Any]], paper_name: str) -> str:
    return next(configs[line.job]["method"]["name"] for line in lines if line.row.name == paper_name and line.job)


def _written(value: Any) -> str:
    """As Hydra reads it."""
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = str(value)
    if PLAIN.fullmatch(text):
        return text
    before_quotes = re.sub(r"(\\+)(?='|$)", r"\1\1", text)  # elsewhere a backslash is one
    return "'" + before_quotes.replace("'", "\\'") + "'"


def _merged(*parts: Iterable[str]) -> tuple[str, ...]:
    """Overrides by what they set; the last one wins."""
    return tuple({override.split("=")[0].lstrip("+"): override for part in parts for override in part}.values())
