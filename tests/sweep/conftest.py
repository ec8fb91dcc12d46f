"""Sweeps whose runs take no time: what a run would compute is left out, what it records is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ditbench.harness.cli import main
from ditbench.harness.common import watch
from ditbench.harness.records import attempts
from ditbench.harness.records.record import Record
from ditbench.harness.stages.config import RunConfig
from ditbench.harness.stages.identity import run_id, title
from ditbench.harness.stages.loaded import model_of

SHORT = ("model=tiny-dit", "protocol.n=4", "metrics.names=[psnr]", "tracker=none", "name=swept")


@pytest.fixture
def quick(monkeypatch) -> Callable[[Callable[[RunConfig], str]], list[str]]:
    """quick(what_happens) → the titles of the runs that were started, as they start. what_happens: the run's configuration → its
    status; it may raise.
    """

    def install(happens: Callable[[RunConfig], str] = lambda config: "ok") -> list[str]:
        started: list[str] = []

        def run(config: RunConfig) -> Record:
            its_id = run_id(config, model_of(config.model))
            started.append(title(config))
            with attempts.attempt(config.results_dir, config.name, its_id) as attempt:
                watch.begins(its_id, title(config), attempt.folder)
                status = happens(config)
                error = None if status == "ok" else "it was to fail"
                record = Record(its_id, status, config.raw, config.method, config.model.name, config.name, error=error)
                return attempt.publish(record, config.force)

        for module in ("launch", "one_job"):
            monkeypatch.setattr(f"ditbench.harness.sweep.{module}.run", run)
        return started

    return install


@pytest.fixture
def sweep(tmp_path) -> Callable[..., int]:
    """sweep("method=rtn,gptq", …) → exit code; records lie in tmp_path/runs/swept."""
    return lambda *arguments: main(["run", "-m", *SHORT, f"results_dir={tmp_path}", *arguments])


@pytest.fixture
def home(tmp_path) -> Path:
    return tmp_path / "runs" / "swept"
