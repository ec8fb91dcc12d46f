"""Runs of seconds, called through the command line in this process; what several tests read is made once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ditbench.harness.cli import main
from ditbench.harness.fitting import registry
from ditbench.harness.sweep import compose

TINY = (
    "model=tiny-dit",
    "protocol.n=4",
    "protocol.steps=2",
    "calibration.n=2",
    "metrics.resamples=5",
    "metrics.names=[psnr,sqnr,torchmetrics/fid_judge]",
    "generate.noise_floor_seeds=1",
    "measure.repeats=2",
    "measure.warmup=1",
    "measure.samples=1",
    "tracker=none",
)


def records(results_dir: Path) -> dict[str, dict[str, Any]]:
    """{folder name: record.json} of every recorded run, oldest first."""
    paths = sorted(results_dir.glob("runs/*/*/record.json"), key=lambda path: path.stat().st_mtime_ns)
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def tiny_run(results_dir: Path, *arguments: str) -> int:
    return main(["run", *TINY, f"results_dir={results_dir}", *arguments])


@pytest.fixture(scope="session")
def read_records() -> Callable[[Path], dict[str, dict[str, Any]]]:
    return records


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """The arguments that make a run tiny."""
    return TINY


@pytest.fixture
def run(tmp_path) -> Callable[..., int]:
    """run("bits=w4a4", …) → exit code; results in tmp_path."""
    return lambda *arguments: tiny_run(tmp_path, *arguments)


@pytest.fixture(scope="session")
def twice(tmp_path_factory) -> Path:
    """The same W4A4 run, then again with --force and a cache of its own: nothing is shared but the arguments."""
    folder = tmp_path_factory.mktemp("twice")
    assert tiny_run(folder, "bits=w4a4") == 0
    assert tiny_run(folder, "bits=w4a4", "--force", f"cache_dir={folder}/second-cache") == 0
    return folder


@pytest.fixture(scope="session")
def swept(tmp_path_factory) -> Path:
    """fp and rtn at W8A8 and W4A4."""
    folder = tmp_path_factory.mktemp("swept")
    assert tiny_run(folder, "-m", "method=fp,rtn", "bits=w8a8,w4a4", "name=widths") == 0
    return folder


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> Callable[[str, str], Path]:
    """plugin(name, source) makes the file importable as a method; gives its path."""
    folder = tmp_path / "plugins"

    def make(name: str, source: str) -> Path:
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[ditbench.methods]\n{name} = {name}\n")
        (folder / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(str(folder))
        registry.known_methods.cache_clear()
        compose.register()
        return folder / f"{name}.py"

    yield make
    registry.known_methods.cache_clear()
