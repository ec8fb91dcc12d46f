"""--config-dir: configurations of one's own, outside the checkout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ditbench.harness.common.paths import CONF

MODEL = "# Mine: the digits, under another name\n" + "".join((CONF / "model" / "tiny-dit.yaml").open().readlines()[1:])
RUN = (
    "protocol.n=4", "protocol.steps=2", "calibration.n=2", "metrics=fidelity", "metrics.resamples=5",
    "generate.noise_floor_seeds=0", "measure.repeats=1", "measure.warmup=0", "measure.samples=1", "tracker=none",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with a space and a quote in its name, and the working directory beside it."""
    found = tmp_path / "it's mine"
    (found / "model").mkdir(parents=True)
    (found / "model" / "mytiny.yaml").write_text(MODEL.replace("name: tiny-dit", "name: mytiny"))
    monkeypatch.chdir(tmp_path)
    return found


def record_in(results: Path) -> dict:
    (path,) = results.glob("runs/*/*/record.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("how", ["absolute", "relative", "one word", "searchpath", "sweep"])
def test_a_model_of_ones_own_runs(how, folder, ditbench):
    arguments = {
        "absolute": ["--config-dir", str(folder)],
        "relative": ["--config-dir", folder.name],
        "one word": [f"--config-dir={folder}"],
        "searchpath": ["hydra.searchpath=['file://{}']".format(str(folder).replace("'", "\\'"))],
        "sweep": ["-m", "--config-dir", str(folder)],
    }[how]
    told = ditbench("run", "model=mytiny", "method=fp", f"results_dir={folder.parent}/out", *RUN, *arguments)
    assert told.code == 0, told.err
    assert record_in(folder.parent / "out")["model"] == "mytiny"


def test_a_folder_may_be_a_package_s_and_stand_beside_others(folder, ditbench, tmp_path, monkeypatch):
    (tmp_path / "theirs" / "model").mkdir(parents=True)
    (tmp_path / "theirs" / "__init__.py").touch()
    (tmp_path / "theirs" / "model" / "another.yaml").write_text(MODEL.replace("name: tiny-dit", "name: another"))
    monkeypatch.syspath_prepend(tmp_path)
    listed = ditbench("list", "models", "--config-dir", str(folder), "hydra.searchpath=[pkg://theirs]")
    assert "mytiny" in listed.out and "another" in listed.out


def test_every_command_knows_it(folder, ditbench):
    listed = ditbench("list", "models", "--config-dir", str(folder))
    assert "mytiny" in listed.out and "Mine: the digits" in listed.out and "tiny-dit" in listed.out
    assert "mytiny" not in ditbench("list", "models").out
    plan = ditbench("reproduce", "ptq4dit-table1", "--plan", "--model", "mytiny", "--config-dir", str(folder))
    assert plan.code == 0 and "mytiny" in plan.out
    for command in (["bench"], ["parity"]):
        told = ditbench(*command, "model=mytiny", "model.wrong=1", "--config-dir", str(folder))
        assert told.code == 2 and "wrong" in told.err, "it composes the model before it refuses the setting"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--config-dir", "absent"], "--config-dir absent: there is no such folder"),
        (["--config-dir"], "--config-dir: of which folder?"),
        (["--config-dir", "it's mine/model"], "--config-dir it's mine/model: none of bits, "),
        (["hydra.searchpath=['file://absent']"], "hydra.searchpath absent: there is no such folder"),
        (["hydra.searchpath=['pkg://no.such']"], "hydra.searchpath pkg://no.such: there is no such package"),
        (["hydra.searchpath=[absent]"], "write file://FOLDER or pkg://PACKAGE"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named(arguments, said, folder, ditbench):
    told = ditbench("run", "model=mytiny", *arguments)
    assert told.code == 2 and said in told.err and told.err.count("\n") == 1


def test_a_name_that_is_taken_is_refused(folder, ditbench):
    (folder / "model" / "tiny-dit.yaml").write_text(MODEL)
    told = ditbench("run", "model=tiny-dit", "--config-dir", str(folder))
    assert told.code == 2 and f"{folder}/model/tiny-dit.yaml: there is a model of that name already" in told.err
