"""The command that makes a recorded run again: its choices, and every setting that is not what the files of conf/ say."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from functools import cache
from typing import Any

import yaml

from ditbench.harness.common.paths import CONF
from ditbench.harness.fitting import registry
from ditbench.harness.fitting.forms import DEFAULT
from ditbench.harness.quant.spec import MIXED, all_labels, parse_label
from ditbench.harness.records.record import Record

# What no number depends on, and what a choice says already.
_LEFT_OUT = (
    "name",
    "force",
    "strict",
    "debug",
    "cache_dir",
    "results_dir",
    "model.name",
    "model.family",
    "method.name",
    "bits.label",
)
_SECTIONS = ("calibration", "generate", "measure", "protocol")  # of each the file default.yaml
_LOOKED_UP = re.compile(r"\$\{(?:oc\.select:)?model\.usual\.(\w+)(?:,(.*))?\}")
_FORM = re.compile(r"\$\{form:[\w.]+,(.*)\}")
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_UNKNOWN = object()


def command_of(record: Record) -> str:
    """`ditbench run model=… method=… bits=… …` on one line, quoted for a shell.

    Composed here it gives the record's own configuration, as far as the model's file says what it said then; what was set beside
    that is written out. A setting whose default cannot be told without composing is written out as well.
    """
    config = record.config
    model, bits = _section(config, "model"), _section(config, "bits")
    words = [f"model={record.model}", f"method={record.method}", f"bits={_bits_choice(bits)}"]
    if metrics := _metrics_choice(config):
        words.append(f"metrics={metrics}")
    usual = _defaults(config, model, record.method)
    for name, setting in _leaves(config).items():
        if (
            name in _LEFT_OUT
            or name.startswith(("model.usual.", "tracker.", "launcher.", "sweep."))
            or (metrics and name.startswith("metrics."))
        ):
            continue
        if (
            name.startswith("bits.")
            and str(bits.get("label")).lower() != MIXED
            and name.rpartition(".")[2] in ("bits", "number")
        ):
            continue
        if name not in usual or usual[name] is _UNKNOWN or usual[name] != setting:
            words.append(
                f"{'' if name in usual or not name.startswith(('model.', 'method.')) else '++'}{name}={_written(setting)}"
            )
    if _section(config, "tracker").get("kind") == "none":
        words.append("tracker=none")
    if record.experiment != "default":
        words.append(f"name={_written(record.experiment)}")
    return shlex.join(["ditbench", "run", *words])


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A record may come from anywhere."""
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _bits_choice(bits: Mapping[str, Any]) -> str:
    label = str(bits.get("label") or "").lower()
    return label if label in (*all_labels(), MIXED) else "w8a8"


def _metrics_choice(config: Mapping[str, Any]) -> str | None:
    """The set of metrics that is just what the record says."""
    usual = _section(_section(config, "model"), "usual")
    for path in sorted((CONF / "metrics").glob("[!_]*.yaml")):
        said = _leaves({"metrics": _of_file("metrics", path.stem)})
        if {name: _resolved(setting, usual, config) for name, setting in said.items()} == _leaves(
            {"metrics": config.get("metrics")}
        ):
            return path.stem
    return None


def _defaults(config: Mapping[str, Any], model: Mapping[str, Any], method: str) -> dict[str, Any]:
    usual = _section(model, "usual")
    found = _leaves({key: value for key, value in _yaml("config.yaml").items() if key not in ("defaults", "hydra")})
    for section in (*_SECTIONS, "bits"):
        found |= _leaves(
            {section: _of_file(section, "mixed" if _is_mixed(config) and section == "bits" else "default")}
        )
    label = str(_section(config, "bits").get("label")).lower()
    if label in all_labels():  # a format in blocks says more than the file
        found |= _leaves({"bits": parse_label(label).sides()})
    found |= _leaves({"model": _of_file("model", str(model.get("name")))})
    if method in registry.choices():
        found |= _leaves({"method": registry.defaults(method)})
    defaults = {name: _resolved(setting, usual, config) for name, setting in found.items()}
    if _section(config, "method").get("form", DEFAULT) != DEFAULT:  # which says some of it in its own way
        by_form = [name for name, setting in found.items() if name.startswith("method.") or "${form:" in str(setting)]
        defaults |= dict.fromkeys([name for name in by_form if name != "method.form"], _UNKNOWN)
    return defaults


def _is_mixed(config: Mapping[str, Any]) -> bool:
    return str(_section(config, "bits").get("label")).lower() == MIXED


def _of_file(group: str, name: str) -> dict[str, Any]:
    """What a file of a group says, with those of the same group that it starts from."""
    said = _yaml(f"{group}/{name}.yaml")
    found: dict[str, Any] = {}
    for other in said.get("defaults", ()):
        if isinstance(other, str) and other != "_self_":
            found = _merged(found, _of_file(group, other))
    return _merged(found, {key: value for key, value in said.items() if key != "defaults"})


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(one)
    for key, value in other.items():
        both[key] = _merged(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both


@cache
def _yaml(relative: str) -> dict[str, Any]:
    path = CONF / relative
    return yaml.safe_load(path.read_text()) or {} if path.is_file() else {}


def _resolved(setting: Any, usual: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    """What a setting of a file comes to in this run; _UNKNOWN where only composing could tell."""
    if not isinstance(setting, str) or "${" not in setting:
        return setting
    if match := _FORM.fullmatch(setting):
        return _resolved(yaml.safe_load(match[1]), usual, config)
    if match := _LOOKED_UP.fullmatch(setting):
        if match[1] in usual:
            return usual[match[1]]
        return _resolved(yaml.safe_load(match[2]), usual, config) if match[2] else _UNKNOWN
    match = _REFERENCE.fullmatch(setting)
    return _leaves(config).get(match[1], _UNKNOWN) if match else _UNKNOWN


def _leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, Mapping) or (prefix and not config):
        return {prefix: config}
    return {
        name: leaf
        for key, sub in config.items()
        for name, leaf in _leaves(sub, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _written(setting: Any) -> str:
    """In Hydra's grammar."""
    if setting is None or isinstance(setting, bool):
        return {None: "null", True: "true", False: "false"}[setting]
    if isinstance(setting, int | float):
        return repr(setting)
    if isinstance(setting, list | tuple):
        return f"[{','.join(map(_written, setting))}]"
    if isinstance(setting, Mapping):
        return f"{{{','.join(f'{key}: {_written(value)}' for key, value in setting.items())}}}"
    text = str(setting)
    if re.fullmatch(r"[A-Za-z_][\w./:@%+-]*", text) and text.lower() not in ("null", "true", "false", "nan", "inf"):
        return text
    escaped = text.replace("\\", "\\\\").replace("'", "\\'") if "'" in text or text.endswith("\\") else text
    return f"'{escaped}'"
