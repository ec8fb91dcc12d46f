"""The command of docs/models.md runs a pipeline that no family knows; what it needs beside the weights is said before they are loaded."""

from __future__ import annotations

import re
import shlex

import pytest
import torch
from generic_pipelines import aura_flow

from ditbench.harness.cli import main
from ditbench.harness.common.paths import CONF

PAGE = CONF.parent / "docs" / "models.md"
SMALL = (
    "model.size={height: 16, width: 16}", "protocol.n=2", "protocol.steps=2", "calibration.n=1", "metrics.names=[psnr]",
    "metrics.resamples=5", "generate.noise_floor_seeds=0", "measure.repeats=1", "measure.warmup=0",
    "measure.layer_errors=false", "tracker=none", "results_dir=results",
)  # fmt: skip


@pytest.mark.skipif(not PAGE.is_file(), reason="not a source checkout")
def test_the_command_of_the_page_runs_a_pipeline_that_no_family_knows(tmp_path, monkeypatch, read_records):
    command, *arguments = shlex.split(
        re.search(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)[1].replace("\\\n", "")
    )
    assert (command, arguments[0]) == ("ditbench", "run")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    aura_flow().save_pretrained("my-model")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    given = {each.split("=")[0] for each in SMALL}
    assert main([*(each for each in arguments if each.split("=")[0] not in given), *SMALL]) == 0
    (record,) = read_records(tmp_path / "results").values()
    assert record["status"] == "ok" and record["model"] == "my-model" and record["metrics"]["psnr"]["value"] is not None


def refused(capsys, *arguments: str) -> str:
    """What is said of a run whose weights are nowhere: they are not looked for."""
    assert main(["run", "model.source=./nowhere", "tracker=none", *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("ditbench: ") and said.count("\n") <= 1 and "nowhere" not in said
    return said


def test_the_name_of_a_shipped_model_is_not_kept_by_another_family(capsys):
    said = refused(capsys, "model.family=generic", "protocol.sampler=pipeline", "protocol.prompts=shapes")
    assert "model.name=tiny-dit is a shipped model of family dit" in said and "set model.name=" in said


def test_prompts_that_are_not_set_are_asked_for_together(capsys):
    said = refused(capsys, "model.family=generic", "model.name=mine", "protocol.sampler=pipeline")
    assert "set protocol.prompts and calibration.prompts" in said and "a file of your own" in said


def test_prompt_sets_that_are_not_here_are_named_together(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("DITBENCH_DATA", str(tmp_path))
    said = refused(capsys, "model=flux.1-dev")
    assert "ditbench data fetch geneval" in said and "ditbench data fetch coco-2014" in said
    assert "a file of your own will do: protocol.prompts=FILE calibration.prompts=FILE" in said
