"""Top-level packages `eval`, `methods`, `conf` and `harness` of other people, which raise when imported, disturb nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NAMES = ("eval", "methods", "conf", "harness")
METHOD = '''"""Round: to nearest, by another package's file."""

from ditbench.methods.rtn import Params, apply, fit

__all__ = ["Params", "apply", "fit"]
'''
METRIC = '''"""Brightness, by another package's file."""

from ditbench.eval.base import metric
from ditbench.eval.per_sample import mean_or_share


@metric("brightness", better="none", unit="levels")
def brightness(evidence):
    """Mean level of an image."""
    values_N = evidence.generated.images_NHWC[:].double().flatten(1).mean(dim=1)
    return mean_or_share(evidence, values_N, "others brightness", "ditbench", dtype="float64")
'''


def populate(folder: Path) -> Path:
    """Packages that must not be imported, with the files that ours would look for in them."""
    for name in NAMES:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f'raise RuntimeError("the {name} of somebody else was imported")\n')
        (folder / name / "config.yaml").write_text("somebody: else\n")
    return folder


@pytest.fixture
def neighbours(tmp_path) -> Path:
    """A folder for the path, before the wheel's: the hostile packages, a method and a metric of a third party."""
    folder = populate(tmp_path / "site")
    info = folder / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[ditbench.methods]\nround = others_round\n[ditbench.metrics]\nbrightness = others_brightness\n"
    )
    (folder / "others_round.py").write_text(METHOD)
    (folder / "others_brightness.py").write_text(METRIC)
    return folder


@pytest.fixture
def hostile(interpreter, neighbours, tmp_path):
    """`interpreter` beside the neighbours, in a folder that holds such packages too."""
    populate(tmp_path / "elsewhere")
    return lambda *arguments: interpreter(*arguments, extra=(neighbours,))


def test_the_neighbours_are_what_such_an_import_would_find(hostile):
    for name in NAMES:
        found = hostile("-c", f"import {name}")
        assert f"the {name} of somebody else was imported" in found.stderr


def test_the_command_the_module_and_the_script_say_their_version(hostile, installed):
    script = installed / "bin" / "ditbench"
    for call in (("-m", "ditbench"), (str(script),), ("-c", "from ditbench.harness.cli import entry; entry()")):
        said = hostile(*call, "--version")
        assert said.returncode == 0 and said.stdout.startswith("ditbench "), said.stderr


def test_a_run_of_a_plugins_method_with_a_plugins_metric_is_recorded(hostile, tmp_path, tiny):
    tiny = [each for each in tiny if not each.startswith("metrics.names")]
    done = hostile("-m", "ditbench", "run", "method=round", "bits=w4a8", "metrics.names=[psnr,brightness]", *tiny)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "elsewhere" / "results").glob("runs/default/*/record.json")
    record = json.loads(file.read_text())
    assert record["status"] == "ok" and record["method"] == "round"
    assert {entry["status"] for entry in record["metrics"].values()} == {"ok"}


def test_plugins_are_listed_and_no_module_of_the_neighbours_is_loaded(hostile):
    code = (
        "import sys\n"
        "from ditbench.harness.cli import main\n"
        "assert main(['list', 'methods']) == main(['list', 'metrics']) == 0\n"
        f"print([name for name in sys.modules if name.partition('.')[0] in {NAMES!r}])"
    )
    said = hostile("-c", code)
    *listed, loaded = said.stdout.splitlines() or [""]
    assert loaded == "[]", said.stderr
    for name in ("round", "brightness"):
        assert [line for line in listed if line.startswith(name)]
