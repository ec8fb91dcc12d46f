"""`ditbench(...)` calls the command line in this process; `finished` is one recorded run, made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from outcomes import TINY, Outcome

from ditbench.harness.cli import main


@pytest.fixture
def ditbench(capsys) -> Callable[..., Outcome]:
    """ditbench("list", "methods") → Outcome(exit code, stdout, stderr)."""

    def call(*arguments: str) -> Outcome:
        capsys.readouterr()
        try:
            code = main(list(arguments))
        except SystemExit as left:  # argparse leaves this way
            code = left.code if isinstance(left.code, int) else 1
        said = capsys.readouterr()
        return Outcome(code, said.out, said.err)

    return call


@pytest.fixture
def run(ditbench, tmp_path) -> Callable[..., Outcome]:
    """run("bits=w4a4", …): a run of seconds, its results in tmp_path."""
    return lambda *arguments: ditbench("run", *TINY, f"results_dir={tmp_path}", *arguments)


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert main(["run", *TINY, f"results_dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="session")
def smoothed_once(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smoothed")
    assert main(["run", *TINY, f"results_dir={folder}", "method=smoothquant", "bits=w4a8", "name=smooth"]) == 0
    return folder


@pytest.fixture
def finished(finished_once, tmp_path) -> Path:
    """A results folder of one's own with one record, made by `run()` without further arguments."""
    shutil.copytree(finished_once, tmp_path, dirs_exist_ok=True)
    return next(tmp_path.glob("runs/default/*/record.json"))


@pytest.fixture
def zoo_copy(tmp_path) -> Path:
    """A copy of tiny-dit's weights that may be damaged."""
    from ditbench.harness.models.zoo import WEIGHTS

    return Path(shutil.copytree(WEIGHTS / "tiny-dit", tmp_path / "weights"))
