"""A package outside the checkout: its model, family, method, metric and set of metrics in one sweep, by its entry points alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from outcomes import Outcome, process

from ditbench.harness.common.paths import CONF

DOCS = Path(__file__).resolve().parents[2] / "docs"
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="not a source checkout")

ENTRY_POINTS = """
[ditbench.methods]
halve = my_package.halve
[ditbench.metrics]
contrast = my_package.contrast
[ditbench.models]
digits = my_package.digits
"""
FAMILY = (
    '"""The family of tiny-dit under another name."""\n\nfrom ditbench.harness.models.families import dit as FAMILY\n'
)
METRICS = "reference: null\nresamples: 200\nnames: [psnr, contrast]\n"
RUN = (
    "protocol.n=4", "protocol.steps=2", "calibration.n=2", "generate.noise_floor_seeds=0", "measure.repeats=1",
    "measure.warmup=0", "measure.samples=1", "measure.layer_errors=false", "tracker=none",
)  # fmt: skip


def first_example(page: str) -> str:
    return re.findall(r'```python\n(""".*?)```', (DOCS / page).read_text(), re.DOTALL)[0]


@pytest.fixture
def site(tmp_path) -> Path:
    """A folder for the path, with the package as pip would install it there."""
    folder = tmp_path / "site"
    model = (CONF / "model" / "tiny-dit.yaml").read_text().replace("name: tiny-dit", "name: my-digits")
    files = {
        "my_package-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n",
        "my_package-1.0.dist-info/entry_points.txt": ENTRY_POINTS,
        "my_package/__init__.py": "",
        "my_package/halve.py": first_example("add-a-method.md"),
        "my_package/contrast.py": first_example("add-a-metric.md"),
        "my_package/digits.py": FAMILY,
        "my_package/conf/model/my-digits.yaml": model.replace("family: dit", "family: digits"),
        "my_package/conf/metrics/mine.yaml": METRICS,
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def ditbench(site: Path, *arguments: str) -> Outcome:
    return process(*arguments, cwd=site.parent, path=(site,))


def records(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("results/runs/*/*/record.json"))]


def test_its_model_method_and_metric_run_in_one_sweep(site):
    done = ditbench(site, "run", "-m", "model=my-digits", "method=halve,rtn", "metrics=mine", "bits=w4a8", *RUN)
    assert done.code == 0, done.err
    found = records(site.parent)
    assert sorted((each["model"], each["method"], each["status"]) for each in found) == [
        ("my-digits", "halve", "ok"),
        ("my-digits", "rtn", "ok"),
    ]
    assert all(each["metrics"]["contrast"]["value"] > 0 for each in found)
    assert "contrast" in done.out and max(map(len, done.out.splitlines())) <= 120


def test_editing_its_family_makes_other_runs(site):
    """What draws the samples is part of what the numbers rest on."""
    code = (
        "from ditbench.harness.models.base import ModelSpec\n"
        "from ditbench.harness.models.loading import fingerprint_without_loading as found\n"
        "print(*(found(ModelSpec('x', family, 'zoo:tiny-dit')) for family in ('dit', 'digits')))"
    )

    def fingerprints() -> list[str]:
        path = os.pathsep.join([str(site), str(CONF.parents[1]), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-c", code]
        return subprocess.check_output(command, env=os.environ | {"PYTHONPATH": path}, text=True).split()

    before = fingerprints()
    with (site / "my_package" / "digits.py").open("a") as file:
        file.write("# edited\n")
    after = fingerprints()
    assert before[0] == after[0] and before[1] != after[1]


def test_what_it_brings_is_listed_and_a_file_with_a_taken_name_is_left_out_in_a_line(site):
    listed = ditbench(site, "list", "models")
    assert "my-digits" in listed.out and listed.err == ""
    (site / "my_package" / "conf" / "model" / "tiny-dit.yaml").write_text("name: tiny-dit\n")
    refused = ditbench(site, "list", "models")
    assert refused.code == 0 and "my-digits" not in refused.out
    assert "there is a model of that name already" in refused.err and refused.err.count("\n") == 1


def test_a_family_that_cannot_be_imported_is_named_where_it_is_asked_for(site):
    (site / "my_package" / "digits.py").write_text("import no_such_package\n")
    done = ditbench(site, "run", "model=my-digits", "metrics=mine", *RUN)
    assert done.code == 2 and "Traceback" not in done.err
    assert "model family 'digits' of my_package.digits" in done.err and "no_such_package" in done.err
