"""A method in somebody else's package is found, checked and run like one of ours; a broken one is named in one line."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

METHOD = '''"""Shrink: round to nearest after clipping every weight range (a method of another package)."""

from dataclasses import dataclass, replace

from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.fitting.rounding import nearest, static_ranges


@dataclass(frozen=True)
class Params:
    keep: float = 1.0  # share of the usual scale

    def __post_init__(self) -> None:
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(f"shrink: keep must be in (0, 1], got {self.keep}")


def fit(target, calibration, bits, params):
    return static_ranges(target, bits, calibration)


def apply(target, state, bits, params):
    recipe = nearest(target, bits, state)
    layers = {
        name: replace(layer, weight=layer.weight and replace(layer.weight, scale_OG=layer.weight.scale_OG * params.keep))
        for name, layer in recipe.layers.items()
    }
    return replace(recipe, layers=layers)
'''


def installed(folder: Path, name: str, source: str, method: str | None = None) -> Path:
    """A distribution with one method, as pip would install it into the folder."""
    info = folder / f"{name}_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[ditbench.methods]\n{method or name} = {name}_plugin\n")
    (folder / f"{name}_plugin.py").write_text(source)
    return folder


@pytest.fixture
def package(tmp_path) -> Callable[[str, str], Path]:
    """package("shrink", source) → the folder of an installed distribution with one method."""
    return lambda name, source: installed(tmp_path / "site", name, source)


def test_a_method_of_another_package_passes_check_method(ditbench, package):
    checked = ditbench("check-method", "shrink", extra=(package("shrink", METHOD),))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout.count("  ok    ") == 8 and "FAIL" not in checked.stdout


def test_a_method_of_another_package_runs_with_its_parameter_overridden(ditbench, package, tmp_path, tiny):
    site = package("shrink", METHOD)
    done = ditbench("run", "-m", "method=shrink", "method.keep=1.0,0.5", "bits=w4a8", *tiny, extra=(site,))
    assert done.returncode == 0, done.stderr
    files = (tmp_path / "elsewhere" / "results").glob("runs/default/*/record.json")
    records = {r["config"]["method"]["keep"]: r for r in (json.loads(file.read_text()) for file in files)}
    assert set(records) == {1.0, 0.5}
    assert records[0.5]["metrics"]["psnr"]["value"] != records[1.0]["metrics"]["psnr"]["value"], "keep was not used"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.keap=0.5", "did you mean method.keep?"),
        ("method.keep=2", "shrink: keep must be in (0, 1], got 2"),
    ],
)
def test_a_bad_parameter_of_another_packages_method_is_refused(ditbench, package, override, words):
    done = ditbench("run", "method=shrink", override, "tracker=none", extra=(package("shrink", METHOD),))
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr and done.stderr.count("\n") == 1


BROKEN = {
    "import": ("import no_such_package\n", "No module named 'no_such_package'"),
    "syntax": ("def fit(:\n", "syntax_plugin.py:1: SyntaxError"),
    "fit": (METHOD.replace("def fit(", "def fitt("), "it has no fit; see docs/add-a-method.md"),
    "apply": (METHOD.replace("def apply(", "def aply("), "it has no apply"),
    "params": (METHOD.replace("class Params", "class Parameters"), "it has no Params"),
    "frozen": (METHOD.replace("(frozen=True)", ""), "Params must be a frozen dataclass"),
    "plain": (METHOD.replace("@dataclass(frozen=True)\n", ""), "Params must be a frozen dataclass"),
    "defaults": (METHOD.replace("keep: float = 1.0", "keep: float"), "Params() must be what its defaults make"),
    "exit": ("raise SystemExit(1)\n", "SystemExit"),
}


@pytest.fixture(scope="module")
def beside_broken_ones(ditbench_in, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder in which each flaw is a distribution, and `list methods` beside all of them at once: one that works, one of
    which the module was deleted, and one with the name of a method of ours are there as well.
    """
    folder = tmp_path_factory.mktemp("broken")
    for flaw, (source, _) in BROKEN.items():
        installed(folder, flaw, source)
    installed(folder, "shrink", METHOD)
    installed(folder, "deleted", METHOD)
    (folder / "deleted_plugin.py").unlink()
    installed(folder, "named_as_ours", METHOD, method="rtn")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    return folder, ditbench_in(elsewhere, "list", "methods", extra=(folder,))


@pytest.mark.parametrize("flaw", BROKEN)
def test_a_broken_plugin_is_named_once_and_left_out(beside_broken_ones, flaw):
    folder, done = beside_broken_ones
    assert done.returncode == 0 and "smoothquant" in done.stdout and f"\n{flaw} " not in done.stdout
    (line,) = (line for line in done.stderr.splitlines() if f"'{flaw}'" in line)
    assert BROKEN[flaw][1] in line
    assert line.startswith(f"ditbench: method '{flaw}' of {flaw}_plugin ({folder / f'{flaw}_plugin.py'}) is left out")
    assert f"`pip uninstall {flaw}-plugin`" in line


def test_a_plugin_whose_module_was_deleted_is_left_out(beside_broken_ones):
    (line,) = (line for line in beside_broken_ones[1].stderr.splitlines() if "'deleted'" in line)
    assert "No module named 'deleted_plugin'" in line


def test_a_plugin_with_the_name_of_one_of_ours_is_left_out(beside_broken_ones):
    done = beside_broken_ones[1]
    (line,) = (line for line in done.stderr.splitlines() if "there is another method 'rtn'" in line)
    rtn = next(line for line in done.stdout.splitlines() if line.startswith("rtn "))
    assert "named_as_ours_plugin" in line and "round to nearest after clipping" not in rtn


def test_broken_plugins_cost_a_line_each_and_no_plugin_that_works(beside_broken_ones):
    done = beside_broken_ones[1]
    assert done.stderr.count("\n") == len(BROKEN) + 2
    what, parameters = (line for line in done.stdout.splitlines() if line.startswith("shrink"))
    assert "Shrink: round to nearest" in what and parameters.endswith("keep=1.0")


def test_a_broken_plugin_is_an_error_where_it_is_asked_for(ditbench, package):
    done = ditbench("run", "method=shrink", "tracker=none", extra=(package("shrink", "import no_such_package\n"),))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "No module named 'no_such_package'" in done.stderr.splitlines()[-1]
