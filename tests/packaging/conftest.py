"""The wheel, built from a copy of the tree and installed where the checkout cannot be imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from checkout import ROOT, checked
from warm import Warm

NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", "__pycache__", ".*_cache", "runs", "cache", "dist", "node_modules", ".zoo-checkpoints"
)


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """A copy of the checkout, without what was made in it."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("copy") / "tree", ignore=NOT_COPIED, symlinks=True))


@pytest.fixture(scope="session")
def wheel(tree, tmp_path_factory) -> Path:
    """Built from the tree itself."""
    work = tmp_path_factory.mktemp("wheel")
    checked([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(work), str(tree)])
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


@pytest.fixture(scope="session")
def beside_the_wheel(installed) -> Callable[..., dict[str, str]]:
    """beside_the_wheel(*extra): the environment of a process that sees `extra` and the installed wheel but not the checkout.

    It is for python -S, which leaves out `site`, and with it the .pth file that makes the checkout importable; the dependencies
    are put on the path by hand, after the wheel.
    """

    def environment(*extra: Path) -> dict[str, str]:
        path = [*map(str, extra), str(installed), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "WANDB"))}
        return kept | {"PYTHONPATH": os.pathsep.join(path)}

    return environment


@pytest.fixture(scope="session")
def interpreter_in(beside_the_wheel) -> Callable[..., subprocess.CompletedProcess[str]]:
    """interpreter_in(folder, "-m", "ditbench", …): Python there, in that environment."""

    def call(elsewhere: Path, *arguments: str, extra: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-S", *arguments]
        return subprocess.run(command, cwd=elsewhere, env=beside_the_wheel(*extra), capture_output=True, text=True)

    return call


@pytest.fixture(scope="session")
def ditbench_in(beside_the_wheel) -> Callable[..., subprocess.CompletedProcess[str]]:
    """ditbench_in(folder, "list", …): the command there, where how it is imported is not the point."""
    warm = Warm("-S", environment=beside_the_wheel())

    def call(elsewhere: Path, *arguments: str, extra: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
        return warm(*arguments, cwd=elsewhere, environment=beside_the_wheel(*extra), path=extra)

    return call


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """An empty folder."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


@pytest.fixture
def interpreter(interpreter_in, elsewhere) -> Callable[..., subprocess.CompletedProcess[str]]:
    """interpreter("-m", "ditbench", …): the same, in a folder that is empty."""
    return partial(interpreter_in, elsewhere)


@pytest.fixture
def python(interpreter) -> Callable[..., subprocess.CompletedProcess[str]]:
    """python("code", "argument", …) by `interpreter`."""
    return lambda code, *arguments, **kwargs: interpreter("-c", code, *arguments, **kwargs)


@pytest.fixture
def ditbench(ditbench_in, elsewhere) -> Callable[..., subprocess.CompletedProcess[str]]:
    return partial(ditbench_in, elsewhere)


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
