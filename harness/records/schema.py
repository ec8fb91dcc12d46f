"""What a record's fields are: checked when a record is read, so that whoever reads on meets nothing odd.

A field that is not named here may be anything; one that is named may be missing, unless it is in REQUIRED.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any


@dataclass(frozen=True)
class Each:
    """A mapping of any names, every value of one kind."""

    kind: Any


@dataclass(frozen=True)
class ListOf:
    kind: Any
    length: int | None = None


TEXT, FLAG, NOTHING = (str,), (bool,), type(None)
COUNT, NUMBER, OBJECT = (int,), (int, float), (dict,)
TEXT_OR_NULL, NUMBER_OR_NULL, OBJECT_OR_NULL = (str, NOTHING), (int, float, NOTHING), (dict, NOTHING)

LATENCY = {"median": NUMBER_OR_NULL, "p10": NUMBER_OR_NULL, "p90": NUMBER_OR_NULL}
METRIC = {
    "value": NUMBER_OR_NULL,
    "ci95": (ListOf(NUMBER, 2), NOTHING),
    "n": COUNT,
    "status": TEXT,
    "reason": TEXT_OR_NULL,
    "passport": ({"alarms": Each({"share": NUMBER}), "alarmed": ListOf(TEXT)}, NOTHING),
    "better": ("higher", "lower", "none"),
    "paired": FLAG,
    "unit": TEXT_OR_NULL,
    "noise_floor": NUMBER_OR_NULL,
}
RECORD = {
    "run_id": TEXT,
    "status": ("ok", "failed", "skipped"),
    "method": TEXT,
    "model": TEXT,
    "experiment": TEXT,
    "error": TEXT_OR_NULL,
    "config": {
        "model": ({"name": TEXT, "note": TEXT_OR_NULL}, NOTHING),
        "protocol": ({"n": (int, NOTHING)}, NOTHING),
        "generate": ({"reference_dtype": TEXT_OR_NULL}, NOTHING),
        "metrics": OBJECT_OR_NULL,
        "method": ({"name": TEXT, "form": TEXT_OR_NULL}, NOTHING),
        "seed": (int, str, NOTHING),  # several seeds in one row are text
    },
    "bits": {
        "label": TEXT_OR_NULL,
        "weight_bits_effective": NUMBER_OR_NULL,
        "act_bits_effective": NUMBER_OR_NULL,
        "mac_share_quantized": NUMBER_OR_NULL,
        "float_layers": (ListOf(TEXT), NOTHING),
        "unreached_layers": (ListOf(TEXT), NOTHING),
        "mixed": OBJECT_OR_NULL,
        "weight_bits_quantized_layers": NUMBER_OR_NULL,
        "weight_format": TEXT_OR_NULL,
        "act_format": TEXT_OR_NULL,
    },
    "metrics": Each(METRIC),
    "efficiency": {
        "kind": TEXT_OR_NULL,
        "timed_beside": (int, NOTHING),
        "backend": TEXT_OR_NULL,
        "device": TEXT_OR_NULL,
        "latency_ms": (LATENCY, NOTHING),
        "baseline_latency_ms": (LATENCY, int, float, NOTHING),
        "speedup": NUMBER_OR_NULL,
        "baseline": TEXT_OR_NULL,
        "compiled_baseline": TEXT_OR_NULL,
        "compiled_latency_ms": (LATENCY, NOTHING),
        "compiled_baseline_latency_ms": (LATENCY, NOTHING),
        "compiled_speedup": NUMBER_OR_NULL,
        "compression": NUMBER_OR_NULL,
        "compression_quantized_layers": NUMBER_OR_NULL,
        "model_bytes": NUMBER_OR_NULL,
        "baseline_model_bytes": NUMBER_OR_NULL,
        "peak_memory_bytes": NUMBER_OR_NULL,
    },
    "layers": Each({"sqnr_db": NUMBER_OR_NULL}),
    "timings_s": Each(NUMBER_OR_NULL),
    "cost": {"fit_s": NUMBER_OR_NULL, "peak_memory_bytes": NUMBER_OR_NULL},
    "env": {"packages": OBJECT_OR_NULL, "weights_sha256": TEXT_OR_NULL},
    "made_from": {"recording": TEXT_OR_NULL, "samples": TEXT, "float_samples": TEXT, "noise_samples": ListOf(TEXT)},
    "artifacts": Each(TEXT),
    "files": Each({"bytes": COUNT, "sha256": TEXT}),
    "non_finite": ListOf(TEXT),
}
REQUIRED = ("schema", "run_id", "status", "config", "method", "model", "experiment")
REQUIRED_OF_A_METRIC = ("value", "n", "better", "passport")


def problem(values: dict[str, Any]) -> str | None:
    """What is wrong with a record, in words; None if nothing is."""
    if (found := _odd({**values, "metrics": {}}, RECORD, "")) is not None:
        return found
    if not isinstance(values.get("metrics", {}), dict):
        return f"metrics{_expected(Each(METRIC), values['metrics'])}"
    for name, entry in values.get("metrics", {}).items():
        if (found := problem_of_metric(name, entry)) is not None:
            return found
    for name, path in values.get("artifacts", {}).items():
        if not inside(path):
            return f"artifact {name} is {path!r}, expected a file beside the record"
    return None


def problem_of_field(name: str, value: Any) -> str | None:
    """The same of one field."""
    return _odd(value, RECORD[name], name) if name in RECORD else None


def problem_of_metric(name: str, entry: Any) -> str | None:
    """The same of one metric."""
    found = _odd(entry, METRIC, f"metric {name}")
    return _lacks(name, entry) if found is None else found


def inside(path: str) -> bool:
    """Whether a relative path of a record stays in its folder."""
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts and not set(path) & {"\\", "\0", ":"}


def _lacks(name: str, entry: dict[str, Any]) -> str | None:
    missing = [field for field in REQUIRED_OF_A_METRIC if field not in entry]
    return f"metric {name} is without {', '.join(missing)}" if missing else None


def _odd(value: Any, kind: Any, at: str) -> str | None:
    found = _wrong(value, kind)
    return None if found is None else f"{at}/{found}".strip("/").replace("/ ", " ")


def _wrong(value: Any, kind: Any) -> str | None:
    """None, or "path/below is …, expected …". It is asked of every value of thousands of records: most return at once."""
    if isinstance(kind, tuple):
        if type(value) in kind or (type(value) is str and value in kind):
            return None
        nested = [each for each in kind if not isinstance(each, type | str) and _could_be(value, each)]
        return _wrong(value, nested[0]) if nested else _expected(kind, value)
    if not _could_be(value, kind):
        return _expected(kind, value)
    if isinstance(kind, dict):
        for name, its in kind.items():
            if name in value and (found := _wrong(value[name], its)) is not None:
                return f"{name}/{found}"
        return None
    for name, each in value.items() if isinstance(kind, Each) else enumerate(value):
        if (found := _wrong(each, kind.kind)) is not None:
            return f"{name}/{found}"
    return None


def _could_be(value: Any, kind: Any) -> bool:
    if isinstance(kind, ListOf):
        return type(value) is list and (kind.length is None or len(value) == kind.length)
    return type(value) is dict


def _expected(kind: Any, value: Any) -> str:
    text = repr(value)
    return f" is {text if len(text) <= 60 else text[:60] + '…'}, expected {_words(kind)}"


def _words(kind: Any) -> str:
    if isinstance(kind, dict | Each):
        return "an object"
    if isinstance(kind, ListOf):
        return "a list" if kind.length is None else f"a list of {kind.length}"
    if isinstance(kind, type):
        return {str: "text", bool: "true or false", int: "a whole number", float: "a number", dict: "an object"}.get(
            kind, "null"
        )
    if isinstance(kind, str):
        return repr(kind)
    kinds = [each for each in kind if each is not int or float not in kind]
    return " or ".join(_words(each) for each in kinds)
