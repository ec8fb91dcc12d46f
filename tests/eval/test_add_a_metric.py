"""The example of docs/add-a-metric.md is a metric; one that cannot be had says so, and none takes another's name."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ditbench.eval import base
from ditbench.eval.base import evaluate_samples, known_metrics, plugin_sources
from ditbench.harness.common.errors import UserError
from ditbench.harness.stages.identity import evaluator_identity

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add-a-metric.md"
pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="not a source checkout")


def example() -> str:
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return source


@pytest.fixture
def package(tmp_path, monkeypatch):
    """package(source) installs a package of that source as a stranger would; gives its file."""
    known_metrics()
    folder, before = tmp_path / "site", dict(base._METRICS)

    def install(source: str) -> Path:
        info = folder / "mine-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{base.ENTRY_POINTS}]\ncontrast = mine_contrast\n")
        (folder / "mine_contrast.py").write_text(source)
        monkeypatch.syspath_prepend(str(folder))
        importlib.invalidate_caches()
        known_metrics.cache_clear()
        return folder / "mine_contrast.py"

    yield install
    sys.modules.pop("mine_contrast", None)
    base._METRICS.clear()
    base._METRICS.update(before)
    known_metrics.cache_clear()


def test_the_example_of_the_page_needs_its_file_only(package, evidence):
    package(example())
    entries, samples = evaluate_samples(["contrast"], evidence)
    entry = entries["contrast"]
    grey_NHW = evidence.generated.pixels.double().numpy() @ [0.299, 0.587, 0.114]
    assert entry["status"] == "ok", entry["reason"]
    assert entry["value"] == pytest.approx(grey_NHW.std(axis=(1, 2)).mean())
    assert entry["ci95"][0] < entry["value"] < entry["ci95"][1] and samples["contrast"].values_N.shape == (96,)
    assert known_metrics()["contrast"].summary.startswith("Standard deviation")


def test_editing_a_plugin_makes_new_runs_of_it_and_of_no_others(package):
    file = package(example())
    config = SimpleNamespace(section=lambda _: {"names": ["psnr", "contrast"], "reference": None}, device=None)
    model = SimpleNamespace(extras={})
    before = evaluator_identity(config, model)
    file.write_text(example().replace("0.299", "0.3"))
    assert evaluator_identity(config, model) != before
    assert set(plugin_sources(["psnr", "contrast"])) == {"contrast"}


def test_editing_a_helper_in_a_plugins_package_makes_new_runs_of_it(tmp_path, monkeypatch):
    folder = tmp_path / "pack_of_metrics"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "helper.py").write_text("SCALE = 1")
    (folder / "scores.py").write_text("def score(evidence): ...")
    monkeypatch.syspath_prepend(str(tmp_path))
    compute = importlib.import_module("pack_of_metrics.scores").score
    monkeypatch.setitem(known_metrics(), "score", base.Metric("score", compute, "higher", False, "", ""))
    before = plugin_sources(["score"])
    (folder / "helper.py").write_text("SCALE = 2")
    assert plugin_sources(["score"]) != before


def test_a_plugin_cannot_take_the_name_of_a_metric_that_is_there(package, capsys):
    package(example().replace('@metric("contrast"', '@metric("psnr"'))
    assert known_metrics()["psnr"].compute.__module__ == "ditbench.eval.fidelity"
    said = capsys.readouterr().err
    assert "'psnr' of mine_contrast has the name of one of ditbench.eval.fidelity; rename it" in said
    assert said.count("\n") == 1


BROKEN = {
    "import no_such_module\n": "No module named 'no_such_module'",
    "def f(:\n": "mine_contrast.py:1: SyntaxError",
    "from ditbench.eval.base import metric\n@metric('half', better='higher')\ndef half(evidence): ...\nraise OSError('x')\n": "x",
}


@pytest.mark.parametrize("source", BROKEN)
def test_a_broken_plugin_is_named_once_and_left_out_until_it_is_asked_for(package, source, capsys, evidence):
    file = package(source)
    assert "psnr" in known_metrics() and "half" not in known_metrics()
    said = capsys.readouterr().err
    assert said.startswith(f"ditbench: metrics 'contrast' of mine_contrast ({file}) is left out: it cannot be imported")
    assert BROKEN[source] in said and "`pip uninstall mine`" in said and said.count("\n") == 1
    with pytest.raises(UserError, match="cannot be imported"):
        evaluate_samples(["contrast"], evidence)
