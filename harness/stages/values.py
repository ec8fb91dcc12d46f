"""What a configuration's values may be. Whatever can be refused before anything is loaded is refused here, not hours into a run."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from ditbench.eval.base import known_metrics, no_metric
from ditbench.harness.backends.base import AUTO, known_backends
from ditbench.harness.build.offload import MEMORY
from ditbench.harness.calibration import salient
from ditbench.harness.common.errors import UserError, shortened, unknown_name
from ditbench.harness.common.paths import no_folder
from ditbench.harness.models.base import OUTLIERS
from ditbench.harness.models.known_families import family
from ditbench.harness.quant.sage import FORMS
from ditbench.harness.records.sweeps import STAMP
from ditbench.harness.records.trackers import known_trackers

# Whole numbers and the least that each may be.
COUNTS = {
    "protocol.n": 1,
    "protocol.steps": 1,
    "calibration.n": 0,  # without data: a method sees weights only
    "calibration.keep": 1,
    "generate.noise_floor_seeds": 0,
    "measure.samples": 1,
    "measure.repeats": 1,
    "measure.warmup": 0,
    "metrics.resamples": 2,  # a spread has to come from two at least
}
MOST = 10_000_000  # of anything that is counted: lists are made of them
SEEDS = ("seed", "model.seed")
MOST_SEED = 2**63 - 1  # that generators of torch and NumPy take
BATCHES = ("calibration.batch_size", "generate.batch_size")  # counts, or "auto"
FLAGS = (
    "bits.weight.symmetric",
    "bits.act.symmetric",
    "bits.act.dynamic",
    "measure.layer_errors",
    "measure.compile",
    "generate.keep_latents",
    "force",
    "strict",
    "debug",
)
TEXTS = ("name", "device", "results_dir", "cache_dir", "model.name", "model.family", "method.name", "protocol.name")
TEXTS_OR_NULL = (
    "metrics.reference",
    "protocol.prompts",
    "calibration.prompts",
    "model.source",
    "model.revision",
    "model.variant",
    "model.config",
    "model.transformer",
    "tracker.project",
    "tracker.entity",
)
DTYPES = ("float32", "bfloat16", "float16")
CHOICES = {
    "memory": MEMORY,
    "calibration.select": salient.CHOICES,
    "protocol.scope": ("blocks", "all"),
    "protocol.labels": ("balanced", "random"),
    "generate.dtype": DTYPES,
    "generate.reference_dtype": DTYPES,
    "model.dtype": DTYPES,
    "tracker.kind": known_trackers(),
    "tracker.mode": ("auto", "online", "offline", "disabled"),
}
ATTENTION, GUIDANCE, GUIDANCE_2, METRICS, SKIP, LABEL, BACKEND, SAMPLER = (
    "protocol.attention",
    "protocol.guidance",
    "protocol.guidance_2",
    "metrics.names",
    "protocol.skip",
    "bits.label",
    "backend",
    "protocol.sampler",
)
NEGATIVE_PROMPT, NOISE = "protocol.negative_prompt", "protocol.noise"
# Every setting but those of models, methods and bits, which their dataclasses know.
SETTINGS = (*COUNTS, *SEEDS, *BATCHES, *FLAGS, *TEXTS, *TEXTS_OR_NULL, *CHOICES)
SETTINGS += (ATTENTION, GUIDANCE, GUIDANCE_2, METRICS, SKIP, LABEL, BACKEND, SAMPLER, NEGATIVE_PROMPT, NOISE)
SECTIONS = ("model", "method", "bits", "bits.weight", "bits.act", "protocol", "calibration", "generate")
SECTIONS += ("measure", "metrics", "tracker")
STRESS = {"channels": (1, MOST), "log2_factor": (1, 16), "seed": (0, MOST_SEED)}  # of model.stress, from … to
OUTLIERS_OF = ("kind", "unstressed")  # of model.outliers
SIZES = ("height", "width", "num_frames")  # of model.size
LONGEST = 4096  # characters: of a path, or of anything else that is told
FREE_TEXT = ("model.note",)  # may have several lines
# Parameters that mean the same in every method that has them, and the least that each may be; FLOORS lie above it.
OF_METHODS = {
    "seed": 0,
    "damp": 0,
    "learning_rate": 0,
    "scale_learning_rate": 0,
    "scale_iterations": 0,
    "regulariser": 0,
}
OF_METHODS |= {"max_bytes": 1, "block": 1, "mutations": 0, "crossovers": 0, "floor": 0}
FLOORS = ("floor",)  # what keeps a dead channel from dividing by zero


def check_values(raw: dict[str, Any]) -> None:
    """Raise UserError for the first value of a resolved configuration that no part of ditbench can use."""
    for name in SECTIONS:
        if not isinstance(value_of(raw, name), dict):
            raise UserError(f"{name} must be a section such as {name}.…=…, got {value_of(raw, name)!r}")
    batches = {name: 1 for name in BATCHES if value_of(raw, name) != AUTO}
    for name, least in (COUNTS | batches | dict.fromkeys(SEEDS, 0)).items():
        _check_number(name, value_of(raw, name), least)
    for name in FLAGS:
        if not isinstance(value_of(raw, name), bool):
            raise UserError(f"{name} must be true or false, got {value_of(raw, name)!r}")
    attention = value_of(raw, ATTENTION)
    if not isinstance(attention, bool) and not (isinstance(attention, str) and attention in FORMS):
        raise UserError(f"{ATTENTION} must be true, false or one of {', '.join(FORMS)}, got {attention!r}")
    for name in (*TEXTS, *TEXTS_OR_NULL):
        _check_text(name, value_of(raw, name))
    _check_leaves(raw)
    choices: dict[str, tuple[str, ...]] = CHOICES | {
        BACKEND: (AUTO, *known_backends()),
        SAMPLER: family(raw["model"]["family"]).SAMPLERS,
    }
    for name, known in choices.items():
        if value_of(raw, name) not in known:
            raise UserError(f"{unknown_name(name, str(value_of(raw, name)), known)}{_whose(name, raw)}")
    guidance = value_of(raw, GUIDANCE)
    if not isinstance(guidance, (int, float)) or isinstance(guidance, bool):
        raise UserError(f"{GUIDANCE} must be a number such as 1.5, got {guidance!r}")
    if guidance < 1:
        raise UserError(f"{GUIDANCE} must be at least 1 (1 is no guidance), got {guidance}")
    second = raw["protocol"].get("guidance_2")  # records from before there were experts have none
    if second is not None and (not isinstance(second, int | float) or isinstance(second, bool) or second < 1):
        raise UserError(f"{GUIDANCE_2} must be null or a number of at least 1, got {second!r}")
    _check_noise(raw["protocol"])
    if not isinstance(value_of(raw, LABEL), str):
        raise UserError(f"{LABEL} must be text such as w4a8, got {value_of(raw, LABEL)!r}")
    _check_lists(value_of(raw, METRICS), value_of(raw, SKIP))
    _check_size(raw["model"].get("size"))
    _check_stress(raw["model"].get("stress"))
    _check_outliers(raw["model"].get("outliers"))
    for name in ("results_dir", "cache_dir"):
        if why := no_folder(raw[name]):
            raise UserError(f"{name}={raw[name]}: {why}; set {name}=… to another folder")
    runs = Path(raw["results_dir"]).expanduser().absolute() / "runs"
    if Path(raw["cache_dir"]).expanduser().absolute().is_relative_to(runs):
        raise UserError(f"cache_dir={raw['cache_dir']} lies where runs are recorded ({runs}); set it to another folder")


def _whose(name: str, raw: dict[str, Any]) -> str:
    """Who asks for a sampler, and whose samplers are the known ones."""
    if name != SAMPLER:
        return ""
    return f" (protocol {raw['protocol'].get('name')} asks for it, and model {raw['model']['name']} is of family {raw['model']['family']})"


def check_sweep(section: Any) -> None:
    """Raise UserError for a value of the section `sweep` that cannot be: which sweep a run is a job of, and what that seeks."""
    if not isinstance(section, dict):
        raise UserError(f"sweep must be a section such as sweep.objective=psnr, got {section!r}")
    of, job, objective = (section.get(name) for name in ("of", "job", "objective"))
    if of is not None and not (isinstance(of, str) and STAMP.fullmatch(of)):
        raise UserError(f"sweep.of is set by a sweep itself, got {of!r}; leave it out")
    if job is not None and not (isinstance(job, int) and not isinstance(job, bool) and 0 <= job <= MOST):
        raise UserError(f"sweep.job is set by a sweep itself, got {job!r}; leave it out")
    if objective is not None and not (isinstance(objective, str) and objective in known_metrics()):
        raise UserError(
            f"sweep.objective must be a metric (`ditbench list metrics`) or null, got {shortened(repr(objective), 80)}"
        )


def value_of(raw: dict[str, Any], name: str) -> Any:
    """Of a name with dots. What a model does not say is null: records of before have not all of it."""
    value: Any = raw
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            if name.startswith("model."):
                return None
            raise UserError(f"{name} is missing, as it is in records of before there was such a setting; run it again")
        value = value[key]
    return value


def check_parameters(params: Mapping[str, Any]) -> None:
    """Raise UserError for a method's parameter that is out of what its name means everywhere; types are the dataclass's."""
    for name in OF_METHODS.keys() & params.keys():
        value, least = params[name], OF_METHODS[name]
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        if value < least or (name in FLOORS and value == least):
            wanted = f"above {least}" if name in FLOORS else f"at least {least}"
            raise UserError(f"method.{name} must be {wanted}, got {value}")


def _leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name with dots, value) of all that is neither section nor list."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value, name)
    else:
        yield name, node


def _check_number(name: str, value: Any, least: int) -> None:
    most = MOST_SEED if name in SEEDS else MOST
    auto = " (or auto)" if name in BATCHES else ""
    if name == "model.seed" and not isinstance(value, int):
        return  # of the dataclass
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{name} must be a whole number, at least {least}{auto}; got {value!r}")
    if value > most:
        raise UserError(f"{name} must be at most {most:,}; got {value}")


def _check_text(name: str, value: Any) -> None:
    if value is None and name in TEXTS_OR_NULL:
        return
    or_null = " or null" if name in TEXTS_OR_NULL else ""
    if not isinstance(value, str):
        example = f"; in quotes a number is text: \"{name}='{value}'\"" if isinstance(value, (int, float)) else ""
        raise UserError(f"{name} must be text{or_null}, got {value!r}{example}")
    if not value.strip():
        advice = {"results_dir": "name a folder, such as results_dir=./results"}.get(
            name, f"write {name}=null for none" if or_null else "give it a value"
        )
        raise UserError(f"{name} is empty; {advice}")


def _check_noise(protocol: dict[str, Any]) -> None:
    """Records from before either could be chosen have neither."""
    negative, noise = protocol.get("negative_prompt"), protocol.get("noise", "own")
    if negative is not None and not isinstance(negative, str):
        raise UserError(f"{NEGATIVE_PROMPT} must be text or null, got {negative!r}")
    if not isinstance(noise, str) or not noise.strip():
        raise UserError(f"{NOISE} must be own, shared, or a file of latents, got {noise!r}")


def _check_leaves(raw: dict[str, Any]) -> None:
    """Neither a run's identity nor its record nor the name of a file can hold these."""
    for name, value in _leaves(raw):
        if isinstance(value, float) and not isfinite(value):
            raise UserError(f"{name} must be finite, got {value}")
        if isinstance(value, int) and abs(value) > MOST_SEED:
            raise UserError(
                f"{name} must be at most {MOST_SEED:,} (or as far below 0), got a number of {value.bit_length()} bits"
            )
        if isinstance(value, str) and name not in FREE_TEXT:
            if len(value) > LONGEST:
                raise UserError(f"{name} has {len(value):,} characters; at most {LONGEST:,} are taken")
            if odd := [each for each in value if unicodedata.category(each) in ("Cc", "Cs")]:
                raise UserError(f"{name} holds a character that cannot be written ({odd[0]!r}), in {value!r}")


def _check_lists(metrics: Any, skip: Any) -> None:
    for name, value in ((METRICS, metrics), (SKIP, skip)):
        if not isinstance(value, list):
            example = "" if value is None else value
            raise UserError(f"{name} must be a list, got {value!r}; write {name}=[{example}]")
        twice = [each for number, each in enumerate(value) if each in value[:number]]
        if twice:
            raise UserError(f"{name} names {twice[0]} twice; leave one out")
    for metric in metrics:
        if not isinstance(metric, str) or metric not in known_metrics():
            raise no_metric(str(metric))
    for pattern in skip:
        try:
            re.compile(pattern)
        except (re.error, TypeError, RecursionError, OverflowError) as error:
            raise UserError(f"{SKIP}: {pattern!r} is not a regular expression of layer names ({error})") from error


def _check_size(size: Any) -> None:
    for name, value in (size or {}).items() if isinstance(size, dict) else ():
        if name not in SIZES:
            raise unknown_name("setting of model.size", str(name), SIZES)
        _check_number(f"model.size.{name}", value, 1)


def _check_outliers(outliers: Any) -> None:
    if not isinstance(outliers, dict):
        return  # null, or refused by the dataclass
    _check_names("model.outliers", outliers, OUTLIERS_OF)
    for name, value in outliers.items():
        if not isinstance(value, str):
            raise UserError(f"model.outliers.{name} must be text, got {value!r}")
    if outliers["kind"] not in OUTLIERS:
        raise unknown_name("model.outliers.kind", outliers["kind"], OUTLIERS)


def _check_stress(stress: Any) -> None:
    if not isinstance(stress, dict):
        return  # null, or refused by the dataclass
    _check_names("model.stress", stress, STRESS)
    for name, value in stress.items():
        least, most = STRESS[name]
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise UserError(f"model.stress.{name} must be a whole number from {least} to {most}, got {value!r}")


def _check_names(section: str, given: Mapping[str, Any], wanted: Collection[str]) -> None:
    """Of a section that is given whole or not at all."""
    for name in given:
        if name not in wanted:
            raise unknown_name(f"setting of {section}", str(name), wanted)
    for name in wanted:
        if name not in given:
            raise UserError(f"{section} needs {', '.join(wanted)}; {name} is missing")
