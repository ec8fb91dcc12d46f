"""What the README shows works: its method, its commands, its links; and its citation names this version."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

from ditbench import __version__
from ditbench.harness.cli.command_line import COMMANDS
from ditbench.harness.fitting import conformance, registry
from ditbench.harness.quant.spec import all_labels
from ditbench.harness.sweep.plan import configurations

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "running.md"]
FLAGS = ("--plan", "--force", "--strict", "--debug")
pytestmark = pytest.mark.skipif(not PAGES[0].is_file(), reason="not a source checkout")


def commands(page: Path) -> list[list[str]]:
    """Every `ditbench …` of its blocks, without comments and with continued lines joined."""
    blocks = re.findall(r"^```\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("ditbench ")]


def swept(override: str) -> list[str]:
    """method=rtn,quarot → method=rtn and method=quarot."""
    name, _, values = override.partition("=")
    return [f"{name}={each}" for each in values.split(",")]


RUNS = [pytest.param(each, id=" ".join(each)) for page in PAGES for each in commands(page) if each[0] == "run"]


def test_every_command_exists():
    assert len(RUNS) >= 8 and {each[0] for page in PAGES for each in commands(page)} <= set(COMMANDS)


@pytest.mark.parametrize("command", RUNS)
def test_every_run_is_one_that_can_be_composed(command, tmp_path, monkeypatch):
    """With the first value of each list, the files that it names, and the device of this machine."""
    known_models = {path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    own = ["model=tiny-dit" if each.startswith("model=dit-xl") else each for each in command[1:] if each not in FLAGS]
    own = ["device=auto" if each.startswith("device=") else each for each in own if each != "-m"]
    lists = [swept(each) if "-m" in command else [each] for each in own]
    found, refused = configurations([*(each[0] for each in lists), "tracker=none"])
    assert found and not refused, refused
    for name, _, value in (each.partition("=") for values in lists for each in values[1:]):
        known = {"method": registry.known_methods(), "bits": all_labels(), "model": known_models}[name]
        assert value in known


def test_the_method_of_the_readme_keeps_the_contract(tmp_path, monkeypatch):
    (source,) = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)
    (tmp_path / "shrink_of_the_readme.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    method = importlib.import_module("shrink_of_the_readme")
    monkeypatch.setattr(registry, "known_methods", lambda: {"shrink": method})
    case = conformance.Case("shrink")
    for check in conformance.CHECKS:
        if (
            check is not conformance.state_survives_a_fresh_process
        ):  # that one looks for it in a package that is installed
            check(case)
    weight = {keep: largest(method, case, keep) for keep in (1.0, 0.5)}
    assert weight[0.5] == pytest.approx(0.5 * weight[1.0], rel=0.01)


def largest(method, case, keep: float) -> float:
    """Weight of one layer as rounded."""
    params = method.Params(keep=keep)
    recipe = method.apply(case.target, method.fit(case.target, case.calibration, case.bits, params), case.bits, params)
    return float(recipe.layers[next(iter(case.target.layers))].weight.dequantize().abs().max())


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_what_is_linked_is_there(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert links and not [each for each in links if "://" not in each and not (page.parent / each).exists()]


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == __version__ and cited["license"] == "Apache-2.0" and cited["cff-version"] == "1.2.0"


def test_the_pictures_are_small():
    assert all((ROOT / "docs" / f"demo-{name}.png").stat().st_size < 300_000 for name in ("page", "samples"))
