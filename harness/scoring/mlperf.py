"""Whether a run was drawn by MLPerf's protocol: its record is held against the preset."""

from __future__ import annotations

from typing import Any

import yaml

from ditbench.eval.mlperf_wan import NAME, entry
from ditbench.harness.common.paths import CONF
from ditbench.harness.records.record import Record

WAN, WAN_MODEL = "mlperf_wan22", "wan2.2-t2v-a14b"
WAN_SIZE = {"height": 720, "width": 1280, "num_frames": 81}
QUANTIZED = ("name", "scope", "skip", "attention", "labels")  # what a protocol says that draws nothing


def scores_of(record: Record) -> dict[str, dict[str, Any]]:
    """MLPerf's score from the record's VBench dimensions, if the run is under its preset."""
    if (record.config.get("protocol") or {}).get("name") != WAN:
        return {}
    return {NAME: entry(record.metrics, departures(record.config))}


def departures(config: dict[str, Any]) -> list[str]:
    """What a run's configuration draws other than the preset, a line each."""
    preset = yaml.safe_load((CONF / "protocol" / f"{WAN}.yaml").read_text(encoding="utf-8"))["protocol"]
    of_run, model = config.get("protocol") or {}, config.get("model") or {}
    found = [
        f"protocol.{name}: {of_run.get(name)!r}, MLPerf {wanted!r}"
        for name, wanted in preset.items()
        if name not in QUANTIZED and of_run.get(name) != wanted
    ]
    if model.get("name") != WAN_MODEL:
        found.append(f"model: {model.get('name')}, MLPerf {WAN_MODEL}")
    if (size := model.get("size")) != WAN_SIZE:
        found.append(f"model.size: {size}, MLPerf {WAN_SIZE}")
    return found
