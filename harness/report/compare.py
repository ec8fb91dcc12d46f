"""Which runs may be compared, in which order, and what they are called: groups of records.

Two runs are comparable when they share the weights, the whole model config, the whole protocol (balanced or random labels with it)
and the seed; rows over seeds share all but the seed. The float row ("fp") is what the others are measured against.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from ditbench.harness.common.errors import unknown_name
from ditbench.harness.common.paths import CONF
from ditbench.harness.quant.spec import label_bits
from ditbench.harness.records.record import PLACES, Record
from ditbench.harness.report.forms import told_by_form

FLOAT_METHOD = "fp"
ARROWS = {"higher": " ↑", "lower": " ↓", "none": ""}
# In this order; of each, the first metric that was computed and is called so.
HEADLINE = ("fid", "psnr", "accuracy", "overall", "direction", "temporal", "ssim", "lpips", "clipscore", "clip")
_TOLD_APART_BY = ("method", "bits", "calibration", "backend")  # parts of a config
_TELLS_NOTHING = ("model.note", "model.usual", "weights")  # of how a group came to be; weights: the last resort
_SHORT_HASH = 8
A_SHORT_LIST = 8  # metrics
PLAIN = {
    "overall": "follows the prompt",
    "direction": "moves as asked",
    "object": "right object",
    "speed": "right speed",
}
PLAIN |= {"accuracy": "right class", "collapse": "collapsed samples"}


@dataclass(frozen=True)
class Group:
    """Comparable runs: fp first, then more bits first, then by method. label: unique within a report. over_seeds: rows are over seeds."""

    label: str
    records: list[Record]
    metrics: list[str]  # every metric any of them has
    run_names: list[str]  # one per record
    over_seeds: bool = False
    shared: dict[Any, Any] = field(default_factory=dict, compare=False)  # what several parts of a report need

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        if key not in self.shared:
            self.shared[key] = compute()
        return self.shared[key]


def groups(records: Iterable[Record], any_seed: bool = False) -> list[Group]:
    """any_seed: runs that differ in their seed share a group (rows over seeds)."""
    by_key: dict[str, list[Record]] = {}
    for record in records:
        shared = _comparable_by(record) | ({"seed": "any"} if any_seed else {})
        by_key.setdefault(json.dumps(shared, sort_keys=True), []).append(record)
    found = sorted(by_key.values(), key=lambda members: _group_order(members[0]))
    labels = _unique_labels(
        [max(members, key=lambda one: (one.method != FLOAT_METHOD, len(seeds(one)))) for members in found]
    )
    return [_group(label, sorted(each, key=_row_order), any_seed) for label, each in zip(labels, found, strict=True)]


def seeds(record: Record) -> list[str]:
    """Of the runs that a row is made of."""
    return [str(run.config.get("seed")) for run in record.members or (record,)]


def _comparable_by(record: Record) -> dict[str, Any]:
    """All that comparable runs share. Where the weights are known by their hash, it does not matter where they lie."""
    config, weights = record.config, weights_hash(record)
    model = config.get("model") or {}
    return {
        "name": record.model,
        "model": {key: setting for key, setting in model.items() if not weights or key not in PLACES},
        "weights": weights,
        "protocol": config.get("protocol"),
        "seed": config.get("seed"),
        "generate": {name: (config.get("generate") or {}).get(name) for name in ("dtype", "reference_dtype")},
        "metrics": {name: (config.get("metrics") or {}).get(name) for name in ("reference", "resamples")},
    }


def weights_hash(record: Record) -> str | None:
    """Of everything that was loaded; None in records of before it was kept."""
    return record.env.get("weights_sha256")


def _unique_labels(records: Sequence[Record]) -> list[str]:
    """One label per group, of one record each; where the usual words are the same, what differs follows them."""
    labels = [group_label(record) for record in records]
    twins: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        twins.setdefault(label, []).append(place)
    for label, places in twins.items():
        if len(places) > 1:
            for place, words in zip(places, _what_differs([records[place] for place in places]), strict=True):
                labels[place] = f"{label} · {words}"
    return labels


def _what_differs(records: Sequence[Record]) -> list[str]:
    """Of each record the settings in which it is not like the others, and its weights where they are not the same."""
    settings = [_flat(_comparable_by(record) | {"model": record.config.get("model")}) for record in records]
    settings = [{key.lstrip("."): setting for key, setting in each.items()} for each in settings]
    differing = [key for key in sorted(_differing(settings)) if not key.startswith(_TELLS_NOTHING)]
    words = [[_setting(key, each.get(key)) for key in differing] for each in settings]
    if len({each["weights"] for each in settings}) > 1:
        for own, each in zip(words, settings, strict=True):
            own.append(f"weights {printable(str(each['weights'] or 'unknown'))[:_SHORT_HASH]}")
    found = [" · ".join(own) for own in words]
    for place, record in enumerate(records):
        if not words[place] or found.count(" · ".join(words[place])) > 1:  # in a note, or in what was cut off
            whole = json.dumps(_comparable_by(record), sort_keys=True)
            found[place] = " · ".join([*words[place], hashlib.sha256(whole.encode()).hexdigest()[:_SHORT_HASH]])
    return found


def alarms(record: Record) -> list[str]:
    """The ways in which more samples collapsed than an alarm allows (eval/collapse.py); of a row over seeds, in any of them.
    Such a run has no rank.
    """
    worst: dict[str, float] = {}
    for run in record.members or (record,):
        passport = run.metrics.get("collapse", {}).get("passport") or {}
        for name in passport.get("alarmed", ()):
            worst[name] = max(worst.get(name, 0.0), passport["alarms"][name]["share"])
    return [f"{name} {share:.0%}" for name, share in worst.items()]


def value(record: Record, metric: str) -> float | None:
    """The metric's value in a run that ended well, or None."""
    return record.metrics.get(metric, {}).get("value") if record.status == "ok" else None


def float_value(records: Iterable[Record], metric: str) -> float | None:
    """The float row's value: what noise floors are around."""
    found = (value(record, metric) for record in records if record.method == FLOAT_METHOD)
    return next((x for x in found if x is not None), None)


def better(group: Group, metric: str) -> str:
    return next(record.metrics[metric]["better"] for record in group.records if metric in record.metrics)


def is_closeness(group: Group, metric: str) -> bool:
    """Whether it says how close a run stays to the float model (PSNR), and not how good its samples are."""
    return any(record.metrics.get(metric, {}).get("paired") for record in group.records)


def quality_first(group: Group, metrics: Sequence[str]) -> list[str]:
    return sorted(metrics, key=lambda metric: is_closeness(group, metric))


def headline(groups: Sequence[Group], chosen: Sequence[str] | None = None) -> list[str]:
    """The metrics of a short table: the chosen ones, or the default ones among those that were computed.

    Raises:
        UserError: a chosen metric is in no record.
    """
    known = list(dict.fromkeys(metric for group in groups for metric in group.metrics))
    if chosen:
        return [_known_metric(name, known) for name in chosen]
    computed = [name for name in known if any(value(run, name) is not None for g in groups for run in g.records)]
    last_part = {name: name.rsplit("/", 1)[-1] for name in computed}
    picked = [
        next((name for name in computed if last_part[name] == kind or last_part[name].startswith(f"{kind}_")), None)
        for kind in HEADLINE
    ]
    return [name for name in picked if name] or computed[:4]


def asked_for(groups: Sequence[Group]) -> list[str] | None:
    """The metrics that the runs' own lists name, where these are short and none of the sets in `conf/metrics`: a user wrote them."""
    lists = [(r.config.get("metrics") or {}).get("names") for group in groups for r in group.records]
    shipped = [yaml.safe_load(path.read_text()).get("names") for path in sorted((CONF / "metrics").glob("*.yaml"))]
    own = dict.fromkeys(
        str(name) for names in lists if isinstance(names, list) and names not in shipped for name in names
    )
    known = {metric for group in groups for metric in group.metrics}
    named = [name for name in own if name in known]
    return named if 0 < len(named) <= A_SHORT_LIST else None


def _known_metric(name: str, known: Sequence[str]) -> str:
    """A recorded metric by its whole name, or by its last part if only one library has it."""
    if name in known:
        return name
    ending = [metric for metric in known if metric.rsplit("/", 1)[-1] == name]
    if len(ending) == 1:
        return ending[0]
    raise unknown_name("recorded metric", name, ending or known)


def short_names(metrics: Sequence[str]) -> dict[str, str]:
    """torchmetrics/fid_judge → fid_judge, unless two metrics would then share a name."""
    last = [name.rsplit("/", 1)[-1] for name in metrics]
    return {name: printable(part if last.count(part) == 1 else name) for name, part in zip(metrics, last, strict=True)}


def plain(name: str) -> str:
    """A short name as a page says it, where it says little by itself; the whole name stands in a tooltip."""
    return PLAIN.get(name, name)


def headline_first(group: Group) -> list[str]:
    """All metrics of a group, the headline ones in front."""
    return list(dict.fromkeys([*headline([group]), *group.metrics]))


def bits_label(record: Record) -> str:
    """W4A8, also for a run that failed before its bits were computed."""
    config = record.config.get("bits")
    if isinstance(config, Mapping):
        config = config.get("label") or config.get("name")
    return printable(record.bits.get("label") or (str(config).upper() if config else "–"), 24)


HOW_OUTLIERS_CAME = {
    "rescaled": "undone by a scale per channel",
    "trained": "outliers from training",
}  # model.outliers.kind


def model_label(record: Record) -> str:
    """The model's name, with "(…)" where it was given outliers: how, whether scaling undoes them, its twin without them."""
    model = record.config.get("model") or {}
    said = [_stress(model.get("stress")), *_outliers(model.get("outliers"))]
    return f"{printable(record.model)} ({'; '.join(filter(None, said))})" if any(said) else printable(record.model)


def _stress(stress: Any) -> str:
    if not stress or stress == "none":
        return ""
    if isinstance(stress, Mapping):
        stress = ", ".join(f"{name} {setting}" for name, setting in stress.items())
    return "stress" if stress is True else f"stress: {printable(str(stress))}"


def _outliers(outliers: Any) -> list[str]:
    if not isinstance(outliers, Mapping):
        return []
    kind = str(outliers.get("kind"))
    return [HOW_OUTLIERS_CAME.get(kind, printable(kind)), f"without: {printable(str(outliers.get('unstressed')))}"]


def protocol(record: Record) -> dict[str, Any]:
    return record.config.get("protocol") or {}


def group_label(record: Record) -> str:
    words = {"labels": "{} labels", "n": "n = {}", "steps": "{} steps", "guidance": "guidance {}", "seed": "seed {}"}
    settings = protocol(record) | {"seed": record.config.get("seed")}
    if settings.get("prompts") is not None:
        settings.pop("labels", None)  # a model that is told by prompts draws none
    if record.members:
        words["seed"] = "seeds {}"
    if isinstance(settings.get("attention"), str):
        words["attention"] = "attention in {}"
    known = {key: printable(str(value), 40) for key, value in settings.items() if value is not None}
    said = [text.format(known[key]) for key, text in words.items() if key in known]
    return " · ".join([model_label(record), f"protocol {known.get('name', '?')}", *said])


def run_names(records: Sequence[Record]) -> list[str]:
    """The method of each run, followed by the settings that tell it from a run with the same method and bits, or by where it lies."""
    settings = [_flat({part: record.config.get(part) for part in _TOLD_APART_BY}) for record in records]
    kinds = [(record.method, bits_label(record)) for record in records]
    for kind in set(kinds):
        places = [place for place, other in enumerate(kinds) if other == kind]
        for place, own in zip(places, told_by_form([settings[place] for place in places]), strict=True):
            settings[place] = own
    twins: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for own, kind in zip(settings, kinds, strict=True):
        twins.setdefault(kind, []).append(own)
    differing = {kind: _differing(its) for kind, its in twins.items()}
    called = [
        " ".join([printable(kind[0]), *(_setting(key, own[key]) for key in own if key in differing[kind])])
        for own, kind in zip(settings, kinds, strict=True)
    ]
    return [f"{name}{where}" for name, where in zip(called, _where_twins_lie(called, records), strict=True)]


def _where_twins_lie(called: Sequence[str], records: Sequence[Record]) -> list[str]:
    """What follows the names of runs that no setting tells apart and whose numbers differ all the same (another version made them)."""
    found = [""] * len(records)
    twins: dict[tuple[str, str], list[int]] = {}
    for place, record in enumerate(records):
        if record.status == "ok":
            twins.setdefault((called[place], bits_label(record)), []).append(place)
    for places in twins.values():
        if numbers_differ([records[place] for place in places]):
            experiments = [records[place].experiment for place in places]
            for place, experiment in zip(places, experiments, strict=True):
                own = experiment if experiments.count(experiment) == 1 else f"{experiment}/{records[place].run_id}"
                found[place] = f" in {printable(own, 40)}"
    return found


def numbers_differ(records: Sequence[Record]) -> bool:
    """Whether any metric has several values among them; what some lack does not count."""
    values: dict[str, set[float]] = {}
    for name, entry in ((name, entry) for record in records for name, entry in record.metrics.items()):
        values.setdefault(name, set()).update({entry["value"]} if entry.get("value") is not None else ())
    return any(len(its) > 1 for its in values.values())


def printable(text: str, limit: int = 60) -> str:
    """A name out of a record as it can be shown: no control characters, and what is cut off is told apart by its hash."""
    shown = text if text.isprintable() else "".join(char if char.isprintable() else "�" for char in text)
    if len(shown) <= limit:
        return shown
    return f"{shown[: limit - 9]}…{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:8]}"


def _differing(settings: Sequence[dict[str, Any]]) -> set[str]:
    """The settings that are not the same in all of them."""
    first = settings[0]
    keys = {key for each in settings for key in each}
    return {key for key in keys if any(each.get(key) != first.get(key) for each in settings)}


def _setting(key: str, value: Any) -> str:
    return printable(f"{key.rsplit('.', 1)[-1]}={value}", 40)


def _group(label: str, records: list[Record], over_seeds: bool) -> Group:
    metrics = list(dict.fromkeys(name for record in records for name in record.metrics))
    return Group(label, records, metrics, run_names(records), over_seeds)


def _group_order(record: Record) -> tuple:
    return (model_label(record), str(protocol(record).get("name")), protocol(record).get("n") or 0, group_label(record))


def _row_order(record: Record) -> tuple:
    weight_bits, act_bits = label_bits(bits_label(record)) or (0, 0)
    settings = json.dumps(record.config.get("method"), sort_keys=True)
    return (
        record.method != FLOAT_METHOD,
        -weight_bits,
        -act_bits,
        bits_label(record),
        record.method,
        settings,
        record.run_id,
    )


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as {"a.b.c": leaf}."""
    if not isinstance(config, Mapping):
        return {prefix: config}
    return {name: leaf for key, sub in config.items() for name, leaf in _flat(sub, f"{prefix}.{key}").items()}
