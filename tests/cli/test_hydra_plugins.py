"""Hydra imports every package called hydra_plugins, so that a stranger's can stand in the way of any run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from outcomes import REFUSED, Outcome, assert_short

import ditbench


def run_in(folder: Path, *arguments: str) -> Outcome:
    """`python -m ditbench`, which has the working directory on its path."""
    root = str(Path(ditbench.__file__).parents[1])
    command = [sys.executable, "-m", "ditbench", *arguments]
    told = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root})
    return Outcome(told.returncode, told.stdout, told.stderr)


def plugin(folder: Path, source: str) -> Path:
    file = folder / "hydra_plugins" / "mine" / "__init__.py"
    file.parent.mkdir(parents=True)
    file.write_text(source)
    return file


@pytest.mark.parametrize(
    "source, why",
    [
        ("raise ValueError('half written')", "ValueError in __init__.py:1: half written"),
        ("def f(:", "SyntaxError"),
        ("import sys\nsys.exit(3)", "SystemExit"),
    ],
)
def test_a_plugin_that_breaks_is_named_in_a_line(source, why, tmp_path):
    file = plugin(tmp_path, source)
    assert_short(told := run_in(tmp_path, "run", "model=tiny-dit"), str(file), why)
    assert told.code == REFUSED and told.err.count("\n") == 1


def test_commands_that_compose_name_it_too(tmp_path):
    file = plugin(tmp_path, "raise ValueError('half written')")
    told = run_in(tmp_path, "bench", "model=tiny-dit")
    assert told.code == REFUSED and str(file) in told.err and "Traceback" not in told.err


def test_a_plugin_that_lacks_a_package_is_left_out_in_a_line(tmp_path):
    plugin(tmp_path, "import no_such_package")
    told = run_in(tmp_path, "run", "model=tiny-dit", "protocol.n=0")
    assert told.code == REFUSED and "protocol.n" in told.err.splitlines()[-1]
    assert [line for line in told.err.splitlines() if "no_such_package" in line][0].startswith("Hydra: Error importing")
