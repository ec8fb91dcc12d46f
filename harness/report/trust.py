"""What the numbers of a run rest on: its command, passports, hashes, versions, and what was skipped and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ditbench.harness.records.record import Record
from ditbench.harness.report import compare
from ditbench.harness.report.command import command_of
from ditbench.harness.report.compare import Group, short_names, value
from ditbench.harness.report.frame import reason
from ditbench.harness.report.table import decimals_for, interval, number

_WHEN = ("finished_at", "finished", "started_at", "started", "date", "time")


def provenance(records: Sequence[Record]) -> list[list[str]]:
    """[what, where it comes from] that the records say; a value all share is said once."""
    facts: dict[str, list[str]] = {"experiment": [record.experiment for record in records]}
    for record in records:
        for name, said in _facts(record).items():
            facts.setdefault(name, []).append(said)
    unique = {key: sorted(set(filter(None, found))) for key, found in facts.items()}
    if len(dates := unique["date"]) > 2:
        unique["date"] = [f"{dates[0]} – {dates[-1]}"]
    return [
        [key, "; ".join(found[:6]) + (f"; and {len(found) - 6} more" if len(found) > 6 else "")]
        for key, found in unique.items()
        if found
    ]


def of_run(group: Group, place: int) -> dict[str, Any]:
    """Everything that the page shows of one run when it is asked for: JSON. A metric's passport is a place in `passports`."""
    record, titles, known = group.records[place], short_names(group.metrics), passports(group)
    metrics = [
        {
            "name": name,
            "title": titles[name],
            "text": value_text(group, record, name) if value(record, name) is not None else "–",
            "n": entry.get("n"),
            "status": entry.get("status"),
            "why": entry.get("reason"),
            "passport": known.index(_passport(entry)),
        }
        for name, entry in record.metrics.items()
    ]
    hashes = {name: str(text) for name, text in record.env.items() if name.endswith("sha256") and text}
    parts_of_model = record.env.get("checkpoint_parts")
    hashes |= {
        f"part {name}": str(text)
        for name, text in (parts_of_model if isinstance(parts_of_model, Mapping) else {}).items()
    }
    hashes |= {f"made from {name}": _plain(key) for name, key in record.made_from.items() if key}
    hashes |= {f"file {name}": str(entry.get("sha256")) for name, entry in record.files.items()}
    parts = {"bits": record.bits, "speed and size": record.efficiency, "seconds": record.timings_s, "cost": record.cost}
    parts |= {"configuration": record.config, "environment": record.env}
    return {
        "command": command_of(record),
        "facts": [[name, said] for name, said in _facts(record).items() if said],
        "hashes": hashes,
        "metrics": metrics,
        "error": record.error,
        "non_finite": record.non_finite,
        "folder": str(record.folder or ""),
        "parts": {name: part for name, part in parts.items() if part},
    }


def computed(group: Group) -> list[dict[str, Any]]:
    """A line per metric: what computed it, on how many samples, against what, how its interval is made; and what was not computed."""
    titles, found = short_names(group.metrics), []
    for name in group.metrics:
        entries = [record.metrics[name] for record in group.records if name in record.metrics]
        known = [entry for entry in entries if entry.get("value") is not None]
        passport = (known[0].get("passport") or {}) if known else {}
        why = sorted({f"{e['status']}: {e.get('reason')}" for e in entries if e.get("status") in ("skipped", "failed")})
        found.append(
            {
                "name": name,
                "title": titles[name],
                "better": entries[0]["better"],
                "kind": "closeness to float" if compare.is_closeness(group, name) else "quality",
                "runs": f"{len(known)} of {len(group.records)}",
                "n": "–".join(
                    str(n) for n in sorted({e["n"] for e in known})[:: max(len({e["n"] for e in known}) - 1, 1)]
                ),
                "by": str(passport.get("implementation") or ""),
                "version": str(passport.get("version") or ""),
                "reference": _plain(passport.get("reference") or ""),
                "interval": str(passport.get("ci_method") or ""),
                "why": why,
            }
        )
    return found


def passports(group: Group) -> list[dict[str, str]]:
    """Each that a metric of the group has, once: they are long, and most runs share theirs."""

    def found() -> list[dict[str, str]]:
        distinct: list[dict[str, str]] = []
        for record in group.records:
            for entry in record.metrics.values():
                if (own := _passport(entry)) not in distinct:
                    distinct.append(own)
        return distinct

    return group.once("passports", found)


def _passport(entry: Mapping[str, Any]) -> dict[str, str]:
    return {key: _plain(setting) for key, setting in (entry.get("passport") or {}).items()}


def problems(group: Group) -> list[dict[str, str]]:
    return [
        {
            "run": f"{name} {compare.bits_label(record)}",
            "model": compare.model_label(record),
            "status": record.status,
            "why": reason(record),
            "command": command_of(record),
        }
        for record, name in zip(group.records, group.run_names, strict=True)
        if record.status != "ok"
    ]


def value_text(group: Group, record: Record, metric: str) -> str:
    """24.31 ±0.40 dB n=64 noise floor ±0.12."""
    entry, x = record.metrics[metric], value(record, metric)
    assert x is not None
    decimals = decimals_for(group, metric)
    parts = [number(x, decimals), interval(x, entry.get("ci95"), decimals), entry.get("unit") or "", f"n={entry['n']}"]
    if entry.get("noise_floor") is not None:
        parts.append(f"noise floor ±{number(entry['noise_floor'], decimals)}")
    return " ".join(part for part in parts if part)


def _facts(record: Record) -> dict[str, str]:
    env = record.env
    when = next((env[key] for key in _WHEN if env.get(key)), None)
    packages = env.get("packages")
    versions = {name: env.get(name) for name in ("ditbench", "python")} | dict(
        packages if isinstance(packages, Mapping) else {}
    )
    return {
        "date": str(when)[:19].replace("T", " ") if when else "",
        "git": _git(env.get("git")),
        "device": str(record.efficiency.get("device") or ""),
        "versions": ", ".join(f"{name} {v}" for name, v in versions.items() if v),
    }


def _git(git: Any) -> str:
    """ "<commit>" or "<commit>-dirty", or a mapping of commit and dirty, in words."""
    if isinstance(git, dict):
        git = f"{git.get('commit') or ''}{'-dirty' if git.get('dirty') else ''}"
    commit, dirty, _ = str(git or "").partition("-dirty")
    return f"{commit[:12]} with uncommitted changes" if dirty else commit[:12]


def _plain(setting: Any) -> str:
    return ", ".join(map(str, setting)) if isinstance(setting, list | tuple) else str(setting)
