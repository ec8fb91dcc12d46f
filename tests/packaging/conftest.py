"""The wheel, built from a copy of the tree and installed where the checkout cannot be imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", "__pycache__", ".*_cache", "runs", "cache", "dist", "node_modules", ".zoo-checkpoints"
)


def checked(command: list[str], **kwargs) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{command[:6]}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    work = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, work / "tree", ignore=NOT_COPIED, symlinks=True)
    checked([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(work), str(work / "tree")])
    (built,) = work.glob("ditbench-*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder for PYTHONPATH with the wheel's content."""
    folder = tmp_path_factory.mktemp("installed") / "site"
    checked(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--target",
            str(folder),
            str(wheel),
        ]
    )
    return folder


@pytest.fixture
def python(installed, tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """python("code", "argument", …) in an empty folder, seeing `extra` and the installed wheel but not the checkout.

    -S leaves out `site`, and with it the .pth file that makes the checkout importable; the dependencies are put on the
    path by hand, after the wheel.
    """
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def call(code: str, *arguments: str, extra: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
        path = [*map(str, extra), str(installed), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "WANDB"))}
        return subprocess.run(
            [sys.executable, "-S", "-c", code, *arguments],
            cwd=elsewhere,
            env=environment | {"PYTHONPATH": os.pathsep.join(path)},
            capture_output=True,
            text=True,
        )

    return call


@pytest.fixture
def ditbench(python) -> Callable[..., subprocess.CompletedProcess[str]]:
    return lambda *arguments, **kwargs: python("from ditbench.harness.cli import entry; entry()", *arguments, **kwargs)


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    return (
        "protocol.n=4",
        "protocol.steps=2",
        "calibration.n=2",
        "metrics.resamples=5",
        "metrics.names=[psnr,torchmetrics/fid_judge]",
        "generate.noise_floor_seeds=0",
        "measure.repeats=1",
        "measure.warmup=0",
        "measure.samples=1",
        "tracker=none",
    )
