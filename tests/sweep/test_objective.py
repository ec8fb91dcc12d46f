"""A sweeper that chooses jobs by what the ones before gave."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ditbench.harness.cli import main
from ditbench.harness.records import sweeps
from ditbench.harness.records.record import Record
from ditbench.harness.sweep import one_job, overrides

SEEKS = (
    "hydra/sweeper=optuna",
    "hydra.sweeper.n_trials=3",
    "hydra.sweeper.n_jobs=1",
    "method=smoothquant",
    "bits=w4a8",
)
needs_optuna = pytest.mark.skipif(not overrides.optuna_is_here(), reason="pip install 'ditbench[optuna]'")


@pytest.fixture
def scored(quick, monkeypatch):
    """Runs whose psnr is best at strength 0.5; the first has none."""
    started = quick()
    usual = one_job.run

    def run(config) -> Record:
        record = usual(config)
        value = None if len(started) == 1 else 40 - abs(config.params.strength - 0.5)
        return replace(record, metrics={"psnr": {"value": value, "status": "ok"}})

    monkeypatch.setattr(one_job, "run", run)
    return started


@needs_optuna
def test_a_sweeper_is_told_the_metric_and_goes_on_after_a_run_without_one(scored, sweep, home, tmp_path, capsys):
    told = ("sweep.objective=psnr", "method.strength=interval(0.2,0.8)", "hydra.sweeper.direction=maximize")
    assert sweep(*SEEKS, *told, f"cache_dir={tmp_path}/cache") == 0
    found = sweeps.newest(home)
    assert len(scored) == 3 and [job.number for job in found.jobs] == [0, 1, 2] and found.sweeper == "OptunaSweeper"
    assert {each.state for each in sweeps.outcomes(found)} == {"done"}
    best = (tmp_path / "cache" / "hydra" / "optimization_results.yaml").read_text()
    strengths = [float(job.overrides[0].removeprefix("method.strength=")) for job in found.jobs[1:]]
    assert f"method.strength: {min(strengths, key=lambda each: abs(each - 0.5))}" in best
    assert main(["status", "swept", "--results-dir", str(tmp_path)]) == 0
    assert "OptunaSweeper chooses them as it goes" in capsys.readouterr().out
    assert main(["retry", "swept", "--results-dir", str(tmp_path)]) == 2
    assert "give its command again" in capsys.readouterr().err


@needs_optuna
def test_what_is_sought_must_be_a_metric_of_the_sweep(sweep, quick, capsys):
    quick()
    assert sweep(*SEEKS, "method.strength=0.4,0.5") == 2
    assert "name a metric, sweep.objective=… (psnr)" in capsys.readouterr().err
    assert sweep(*SEEKS, "method.strength=0.4,0.5", "sweep.objective=fid") == 2
    assert "known: psnr" in capsys.readouterr().err
    assert sweep(*SEEKS, "sweep.objective=psnr", "hydra.sweeper.direction=[minimize,maximize]") == 2
    assert "one objective is sought at a time" in capsys.readouterr().err


@needs_optuna
def test_seeking_the_worst_is_said(scored, sweep, capsys):
    assert sweep(*SEEKS, "method.strength=interval(0.2,0.8)", "sweep.objective=psnr") == 0
    assert "seeks the worst; hydra.sweeper.direction=maximize?" in capsys.readouterr().err


def test_without_optuna_it_is_said_what_to_install(sweep, monkeypatch, capsys):
    monkeypatch.setattr(overrides, "optuna_is_here", lambda: False)
    assert sweep(*SEEKS) == 2
    assert "pip install 'ditbench[optuna]'" in capsys.readouterr().err


def test_an_interval_needs_a_sweeper_that_takes_one(sweep, capsys):
    assert sweep("method=smoothquant", "method.strength=interval(0.2,0.8)") == 2
    assert "an interval has no first value" in capsys.readouterr().err


def test_a_plan_of_what_nobody_knows_ahead_is_refused(capsys):
    assert main(["run", "-m", "--plan", "hydra/sweeper=optuna", "bits=w4a8"]) == 2
    assert "--plan: hydra/sweeper=optuna chooses each run by what the ones before gave" in capsys.readouterr().err
