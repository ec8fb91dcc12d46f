"""Which engines this machine has, and sweeps in processes of their own, as a user starts them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import ditbench
from ditbench.harness.records import attempts, sweeps

SLURM, RAY = os.environ.get("DITBENCH_TEST_SLURM"), os.environ.get("DITBENCH_TEST_RAY")
START = "`tests/cluster/setup.sh start` starts one, its env file says where"

TINY = (
    "model=tiny-dit",
    "device=cpu",
    "protocol.n=4",
    "protocol.steps=2",
    "calibration.n=2",
    "metrics=fidelity",
    "metrics.resamples=5",
    "generate.noise_floor_seeds=0",
    "measure.repeats=1",
    "measure.warmup=0",
    "measure.samples=1",
    "tracker=none",
    "name=swept",
)


def missing(module: str) -> bool:
    return importlib.util.find_spec(module) is None


needs_slurm = pytest.mark.skipif(
    not SLURM or missing("submitit"), reason=f"no SLURM of the tests, or no submitit: {START}"
)
needs_ray = pytest.mark.skipif(not RAY or missing("ray"), reason=f"no Ray cluster of the tests, or no ray: {START}")
needs_joblib = pytest.mark.skipif(missing("joblib"), reason="no joblib")

ENGINES = {
    "joblib": ("launcher=joblib", "launcher.workers=2"),
    "slurm": ("launcher=slurm",),
    "ray": ("launcher=ray", f"launcher.address='{RAY}'"),
}
EVERY = [
    pytest.param("joblib", marks=needs_joblib),
    pytest.param("slurm", marks=needs_slurm),
    pytest.param("ray", marks=needs_ray),
]


def begun(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`ditbench …` in this folder; both of its streams in one."""
    variables = {"PYTHONPATH": str(Path(ditbench.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", "from ditbench.harness.cli import entry; entry()", *arguments],
        cwd=folder,
        env=os.environ | variables | ({"SLURM_CONF": SLURM} if SLURM else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def swept(folder: Path, engine: str, *arguments: str) -> tuple[int, str]:
    """(exit code, what was said) of a sweep that this engine carries out."""
    process = begun(folder, "run", "-m", *TINY, *ENGINES.get(engine, ()), *arguments)
    said, _ = process.communicate(timeout=900)
    return process.returncode, said


def until(seen: Callable[[], bool], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def home(folder: Path) -> Path:
    return attempts.experiment_folder(folder / "results", "swept")


def recorded(folder: Path) -> dict[str, tuple[str, dict[str, object], object]]:
    """{folder of a record: (status, metrics' values, effective bits)}: what has to be the same whoever carried it out."""
    found = {}
    for path in sorted(home(folder).glob("*/record.json")):
        values = attempts.read(path)
        metrics = {name: each.get("value") for name, each in values.metrics.items()}
        found[path.parent.name] = (values.status, metrics, values.bits)
    return found


def states(folder: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for each in sweeps.outcomes(sweeps.newest(home(folder))):
        counts[each.state] = counts.get(each.state, 0) + 1
    return counts


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"SLURM_CONF": str(SLURM)}).stdout


def kept(folder: Path) -> dict[Path, int]:
    """Every file that runs keep of what they made, with when it was written."""
    places = [
        path for path in (folder / "results" / "cache").rglob("*") if path.suffix in (".safetensors", ".npy", ".pt")
    ]
    return {path: path.stat().st_mtime_ns for path in places if ".part" not in str(path)}
