"""The wheel is whole: it runs from any directory, without the checkout."""

from __future__ import annotations

import configparser
import json
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize(
    "folder", ["conf", "harness", "methods", "eval", "harness/models/zoo/weights", "harness/report"]
)
def test_every_file_of_the_packages_and_their_data_is_inside(names, folder):
    files = {
        f"ditbench/{path.relative_to(ROOT).as_posix()}"
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    assert files and not files - names


def test_the_report_templates_are_inside(names):
    for suffix in (".html", ".css", ".js"):
        assert [name for name in names if name.startswith("ditbench/harness/report/") and name.endswith(suffix)]


def test_the_papers_tables_are_inside_where_there_are_any(names):
    tables = {f"ditbench/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "results" / "papers").glob("*.yaml")}
    if not tables:
        pytest.skip("results/papers holds no table yet")
    assert not tables - names


def test_nothing_that_is_not_part_of_the_product_is_inside(names, wheel):
    ours = [name for name in names if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in ours} == {"ditbench"}, "another top-level package could shadow a user's own"
    inside = {"harness", "methods", "eval", "conf", "results", "__init__.py", "__main__.py", "py.typed"}
    assert {name.split("/")[1] for name in ours} == inside
    assert not [name for name in ours if "/results/" in name and not name.startswith("ditbench/results/papers/")]
    assert wheel.stat().st_size < 40 * 2**20  # two thirds of it the weights of the embedded models


def test_the_license_is_inside_and_named(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (file,) = (name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE"))
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        assert archive.read(file) == (ROOT / "LICENSE").read_bytes()
        assert {"License-Expression: Apache-2.0", "License-File: LICENSE"} <= set(
            archive.read(metadata).decode().splitlines()
        )


def test_the_command_is_declared(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (file,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        parser = configparser.ConfigParser()
        parser.read_string(archive.read(file).decode())
    assert parser["console_scripts"]["ditbench"] == "ditbench.harness.cli:entry"


def test_an_installed_ditbench_lists_its_models_from_another_directory(ditbench, python, installed):
    where = python(
        "from ditbench import harness, eval, methods; print(harness.__file__, eval.__file__, methods.__file__)"
    )
    for file in where.stdout.split():
        assert Path(file).is_relative_to(installed), f"the checkout was imported: {file} {where.stderr}"
    listed = ditbench("list", "models")
    assert listed.returncode == 0, listed.stderr
    assert "tiny-dit" in listed.stdout


def test_an_installed_ditbench_runs_and_reports_in_another_directory(interpreter, ditbench, tmp_path, tiny):
    done = interpreter("-m", "ditbench", "run", "model=tiny-dit", *tiny)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "elsewhere" / "results").glob("runs/default/*/record.json")
    record = json.loads(file.read_text())
    assert record["status"] == "ok" and record["metrics"]["torchmetrics/fid_judge"]["status"] == "ok"
    assert record["env"]["git"] is None, "a wheel has no commit; the one of the folder it runs in is not its own"
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"results"}, "Hydra left something"
    reported = ditbench("report", "--format", "html")
    assert reported.returncode == 0, reported.stderr
    assert (tmp_path / "elsewhere" / "results" / "report.html").stat().st_size > 10_000
