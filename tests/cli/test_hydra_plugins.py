"""Hydra imports every package called hydra_plugins, so that a stranger's can stand in the way of any run."""

from __future__ import annotations

from pathlib import Path

import pytest
from outcomes import REFUSED, assert_short, process


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
    assert_short(told := process("run", "model=tiny-dit", cwd=tmp_path), str(file), why)
    assert told.code == REFUSED and told.err.count("\n") == 1


def test_commands_that_compose_name_it_too(tmp_path):
    file = plugin(tmp_path, "raise ValueError('half written')")
    told = process("bench", "model=tiny-dit", cwd=tmp_path)
    assert told.code == REFUSED and str(file) in told.err and "Traceback" not in told.err


def test_a_plugin_that_lacks_a_package_is_left_out_in_a_line(tmp_path):
    plugin(tmp_path, "import no_such_package")
    told = process("run", "model=tiny-dit", "protocol.n=0", cwd=tmp_path)
    assert told.code == REFUSED and "protocol.n" in told.err.splitlines()[-1]
    assert [line for line in told.err.splitlines() if "no_such_package" in line][0].startswith("Hydra: Error importing")
