"""`ditbench wandb`: what was logged offline is sent, and an experiment's dashboards are made. No server is asked."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from outcomes import FAILED, REFUSED

from ditbench.harness.records.tracking import claim_of

DONE, KILLED, GOES_ON, OF_BEFORE = "0" * 12, "1" * 12, "2" * 12, "3" * 12


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """An experiment with offline folders: one run in two parts, one sent, one that goes on, one of an older ditbench."""
    home = tmp_path / "runs" / "mine"
    for name in (
        f"wandb/offline-run-20261128_100000-{KILLED}",
        f"wandb/offline-run-20261128_110000-{KILLED}",
        f"wandb/offline-run-20261128_120000-{DONE}",
        f"wandb/offline-run-20261128_130000-{GOES_ON}",
        f"{OF_BEFORE}/wandb/offline-run-20251128_090000-{OF_BEFORE}-77-abcd",
        f"wandb/run-20261128_090000-{'4' * 12}",
    ):
        folder = home / name
        folder.mkdir(parents=True)
        (folder / f"run-{folder.name.split('-', 3)[-1]}.wandb").touch()
    (home / f"wandb/offline-run-20261128_120000-{DONE}/run-{DONE}.wandb.synced").touch()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    return tmp_path


def names(paths: Any) -> list[str]:
    return [Path(path).name for path in paths]


@pytest.fixture
def sent(monkeypatch):
    """What `wandb sync` was given; it marks all but those of `sent.refused`, as the real one does."""

    class Sent:
        folders: list[str] = []
        environment: dict[str, str] = {}
        refused: tuple[str, ...] = ()

    def run(command, env, check):
        assert command[1:4] == ["-m", "wandb", "sync"]
        Sent.folders, Sent.environment = command[4:], env
        for folder in map(Path, command[4:]):
            if not folder.name.endswith(Sent.refused or ("nothing",)):
                next(folder.glob("*.wandb")).with_suffix(".wandb.synced").touch()

    monkeypatch.setattr(subprocess, "run", run)
    return Sent


def test_what_was_logged_offline_is_sent_oldest_first_but_of_runs_that_go_on(ditbench, results, sent, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with FileLock(claim_of(results / "runs" / "mine", GOES_ON)):
        outcome = ditbench("wandb", "sync", "mine", "--results-dir", str(results))
    assert outcome.code == 0 and "sent: 3 of 3 folders; 1 of runs that go on are left for later" in outcome.out
    starts = [name.split("-")[2] for name in names(sent.folders)]
    assert starts == ["20251128_090000", "20261128_100000", "20261128_110000"]
    assert "WANDB_MODE" not in sent.environment, "sending is what was asked for"
    again = ditbench("wandb", "sync", "--results-dir", str(results))
    assert names(sent.folders) == [f"offline-run-20261128_130000-{GOES_ON}"] and again.code == 0


def test_what_could_not_be_sent_is_counted(ditbench, results, sent):
    sent.refused = (KILLED,)
    outcome = ditbench("wandb", "sync", "mine", "--results-dir", str(results))
    assert outcome.code == FAILED and "sent: 2 of 4 folders" in outcome.out


def test_nothing_is_sent_in_a_dry_run_or_without_a_key(ditbench, results, sent, monkeypatch):
    outcome = ditbench("wandb", "sync", "--dry-run", "--results-dir", str(results))
    assert outcome.code == 0 and "4 folders to send, 1 sent before" in outcome.out
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(results / "none"))
    outcome = ditbench("wandb", "sync", "--results-dir", str(results))
    assert outcome.code == REFUSED and "wandb login" in outcome.err
    assert sent.folders == []


@pytest.fixture
def specs(ditbench, finished) -> tuple[dict[str, Any], dict[str, Any]]:
    """What W&B would be sent of the view and the report of one finished run's experiment."""
    pytest.importorskip("wandb_workspaces", reason="the extra ditbench[workspaces] is not installed")
    results = finished.parents[3]
    outcome = ditbench("wandb", "workspace", "default", "--out", str(results / "views"), "--results-dir", str(results))
    assert outcome.code == 0, outcome.err
    return tuple(json.loads((results / "views" / f"{name}.json").read_text()) for name in ("workspace", "report"))


def test_the_view_holds_the_experiments_runs_as_method_by_bits_with_every_metric(specs):
    view, _ = specs
    section = view["spec"]["section"]
    (runs,) = section["runSets"]
    assert [(each["key"]["name"], each["value"]) for each in runs["filters"]["filters"]] == [("group", "default")]
    assert [each["name"] for each in runs["grouping"]] == ["method_name.value", "bits_label.value"]
    pinned = runs["runFeed"]["columnPinned"]
    for column in (
        "config:method_name.value",
        "summary:metrics/psnr",
        "summary:efficiency/model_bytes",
        "summary:status",
    ):
        assert column in pinned
    assert (view["displayName"], view["project"]) == ("default", "ditbench")


def test_the_view_has_quality_against_bytes_and_latency_samples_and_layers(specs):
    view, _ = specs
    sections = {each["name"]: each["panels"] for each in view["spec"]["section"]["panelBankConfig"]["sections"]}
    for heading, what in (("bytes", "model_bytes"), ("latency", "latency_ms/median")):
        panel = next(
            each["config"] for each in sections[f"Quality against {heading}"] if each["config"]["chartTitle"] == "psnr"
        )
        assert panel["yAxis"] == "summary:metrics/psnr" and panel["xAxis"] == f"summary:efficiency/{what}"
    media = [key for each in sections["Samples"] for key in each["config"]["mediaKeys"]]
    assert "samples/beside_float" in media
    assert sections["Layers"][0]["config"]["mediaKeys"] == ["layer_errors"]
    assert "layers_by_step" in json.dumps(sections["Layers"][1])
    assert [each["config"]["metrics"] for each in sections["While they run"]][0] == ["live/share"]


def test_the_report_shows_the_same_panels_under_headings(specs):
    view, report = specs
    blocks = report["spec"]["blocks"]
    headings = [each["children"][0]["text"] for each in blocks if each["type"] == "heading"]
    assert headings == [each["name"] for each in view["spec"]["section"]["panelBankConfig"]["sections"]]
    grids = [each["metadata"] for each in blocks if each["type"] == "panel-grid"]
    assert len(grids) == len(headings)
    for grid in grids:
        assert grid["runSets"][0]["filters"]["filters"][0]["value"] == "default"


def test_dashboards_name_what_trackers_are_told(specs, finished):
    """A value that the view names and no run logs would be an empty panel."""
    from ditbench.harness.records import record as records
    from ditbench.harness.records import told

    record = records.read(finished)
    logged = told.final(record)
    assert "not_shown" not in logged
    for name in ("samples/beside_float", "layer_errors", "layers_by_step", "metrics/psnr", "efficiency/model_bytes"):
        assert name in logged
    card = told.card(record, record.run_id, finished.parents[1])
    assert {"method_name", "bits_label"} <= set(card.config)


def test_an_experiment_without_runs_or_the_extra_is_refused(ditbench, results, monkeypatch):
    outcome = ditbench("wandb", "workspace", "mine", "--out", str(results / "views"), "--results-dir", str(results))
    assert outcome.code == REFUSED
    monkeypatch.setattr("ditbench.harness.cli.wandb.find_spec", lambda name: None)
    outcome = ditbench("wandb", "workspace", "mine", "--results-dir", str(results))
    assert outcome.code == REFUSED and "pip install 'ditbench[workspaces]'" in outcome.err
