"""--strict refuses before anything is computed; without it the run goes on and says what was skipped."""

from __future__ import annotations

import json

import pytest

from ditbench.harness.records.attempts import read_all

LACKING = "metrics.names=[psnr,clip_iqa,torch_fidelity/fid,clipscore_b32]"


@pytest.fixture(autouse=True)
def nothing_is_here(monkeypatch, tmp_path):
    monkeypatch.setenv("DITBENCH_OFFLINE", "1")
    monkeypatch.setenv("DITBENCH_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.setattr("ditbench.eval.clip._weight_file", lambda name: None)


@pytest.mark.parametrize("strict", ["--strict", "strict=true"])
def test_a_strict_run_names_each_metric_with_the_command_and_leaves_nothing(run, tmp_path, strict):
    outcome = run(strict, LACKING)
    assert outcome.code == 2 and not (tmp_path / "runs").exists() and not (tmp_path / "cache").exists()
    first, *lines = outcome.error_lines
    assert first == "ditbench: --strict: tiny-dit: these metrics would be skipped"
    said = dict(line.strip().split(": ", 1) for line in lines)
    assert set(said) == {"clip_iqa", "torch_fidelity/fid", "clipscore_b32"}
    assert "`hf download openai/clip-vit-large-patch14`" in said["clip_iqa"]
    assert "metrics.reference" in said["torch_fidelity/fid"]
    assert "`ditbench data fetch inception-fid`" in said["torch_fidelity/fid"]
    assert "not told by prompts" in said["clipscore_b32"] and "hf download" in said["clipscore_b32"]


def test_without_it_the_run_goes_on_and_records_what_was_skipped(run, tmp_path):
    assert run("metrics.names=[psnr,clip_iqa]").code == 0
    (record,) = read_all(tmp_path)
    assert record.metrics["clip_iqa"]["status"] == "skipped" and record.metrics["psnr"]["status"] == "ok"


def test_a_strict_run_that_lacks_nothing_is_the_same_run(run, finished, tmp_path):
    outcome = run("--strict")
    assert outcome.code == 0 and "already recorded" in outcome.err
    assert json.loads(finished.read_text())["status"] == "ok"


def test_a_strict_plan_refuses_what_a_strict_run_refuses(run, tmp_path):
    refused, ran = run("--strict", "--plan", LACKING), run("--strict", LACKING)
    assert refused.code == 2 and refused.error_lines == ran.error_lines and not (tmp_path / "cache").exists()


def test_a_strict_plan_that_lacks_nothing_is_the_same_plan(run):
    outcome = run("--plan", "--strict")
    assert outcome.code == 0 and outcome.out.startswith("plan of 1 run on ")


def test_strict_must_be_true_or_false(run):
    assert "strict must be true or false, got 'perhaps'" in run("strict=perhaps").err


def test_the_doctor_puts_every_metric_under_ready_or_missing(ditbench, tmp_path):
    from ditbench.eval.base import known_metrics

    said = ditbench("doctor", "--results-dir", str(tmp_path)).out
    section = said.split("\nmetrics\n")[1].split("\nW&B\n")[0]
    ready = "\n".join(line for line in section.splitlines() if line.startswith("  ready"))
    assert "psnr" in ready and "geneval_shapes/{" in ready and "ready    geneval prompts " in ready
    missing = said.partition("\ndevice\n")[0]
    assert " ditbench data fetch inception-fid " in missing and " pip install pyiqa " in missing
    for name in known_metrics():
        assert name.rpartition("/")[2] in section
