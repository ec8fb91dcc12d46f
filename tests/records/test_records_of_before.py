"""What earlier versions wrote is read today: records, values per sample, exports; and their commands are still there.

`553773a/` was made by that commit, the last one before the package was called `ditbench`:
    runs/      ditbench run -m model=tiny-dit method=fp,rtn,htg bits=w4a8 name=old, tiny; without the images
    exports/   `save_quantized` of a random DiT of one block, 24 wide, and in expected.safetensors what it answered there; but
               svdquant-w4a4 has the right answer: there simulation took groups' scales in turn where sides had groups of other sizes
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ditbench.harness.build.export import load_quantized
from ditbench.harness.cli import main
from ditbench.harness.cli.command_line import COMMANDS
from ditbench.harness.fitting.conformance import SMALL_DIT
from ditbench.harness.models.base import ModelSpec
from ditbench.harness.models.loading import load_model
from ditbench.harness.records.attempts import read_all
from ditbench.harness.sweep.compose import composed

OLD = Path(__file__).parent / "553773a"
RUNS = ("model=tiny-dit", "bits=w4a8", "protocol.n=4", "protocol.steps=2", "calibration.n=2", "name=old")
OLD_COMMANDS = {
    "run",
    "report",
    "compare",
    "export",
    "list",
    "paper",
    "reproduce",
    "check-method",
    "parity",
    "bench",
    "data",
}
OLD_COMMANDS |= {"vbench", "doctor", "zoo"}


@pytest.fixture
def results(tmp_path) -> Path:
    """A results folder of one's own with the old records."""
    shutil.copytree(OLD / "runs", tmp_path / "runs")
    return tmp_path


def test_an_old_record_is_read_with_the_values_that_it_had():
    records = {record.method: record for record in read_all(OLD)}
    assert set(records) == {"fp", "rtn", "htg"}
    for record in records.values():
        written = json.loads((record.folder / "record.json").read_text())
        assert record.run_id == written["run_id"] and record.status == "ok"
        assert record.config == written["config"] and record.env == written["env"]
        assert {name: entry["value"] for name, entry in record.metrics.items()} == {
            name: entry["value"] for name, entry in written["metrics"].items()
        }
    assert records["htg"].metrics["psnr"]["value"] == pytest.approx(33.0767, abs=1e-4)


@pytest.mark.parametrize("format_", ["md", "csv", "latex", "html"])
def test_old_records_are_reported(results, capsys, format_):
    assert main(["report", "--results-dir", str(results), "--format", format_]) == 0
    said = capsys.readouterr()
    written = "".join(path.read_text() for path in results.glob("report*"))
    assert re.search(r"33\.0[78]", said.out + written) and "htg" in said.out + written
    assert "Traceback" not in said.err


def test_old_records_are_compared_prompt_by_prompt(results, capsys):
    assert main(["compare", "old", "--results-dir", str(results), "--metric", "psnr"]) == 0
    said = capsys.readouterr().out
    assert "htg" in said and "rtn" in said and "n=4" in said.replace(" ", "")


def test_an_old_run_cannot_be_exported_by_other_code_and_says_so_in_one_line(results, capsys):
    """Its method's source has changed since, and what its model's hash covers: the same numbers cannot be promised."""
    (htg,) = (record for record in read_all(results) if record.method == "htg")
    assert main(["export", str(htg.folder), "--out", str(results / "export")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ditbench: ") and error.count("\n") == 1 and "run it again" in error


def test_every_setting_of_an_old_record_is_still_a_setting():
    """Hydra refuses what is no setting: whatever could be overridden then can be overridden now."""
    old = {record.method: record.config for record in read_all(OLD)}
    made = composed((f"method={name}", *RUNS) for name in old)
    for (name, before), now in zip(old.items(), made, strict=True):
        assert not set(settings(before)) - set(settings(now)), name


def settings(section: dict, prefix: str = "") -> Iterator[str]:
    for key, value in section.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from settings(value, f"{prefix}{key}.")


def test_every_command_of_before_is_still_a_command():
    assert set(COMMANDS) >= OLD_COMMANDS


@pytest.mark.parametrize("name", ["htg-w4a8", "svdquant-w4a4", "lrq_dit-w3a8"])
def test_an_old_export_answers_as_it_did(name):
    """Into a model of other weights: all that the answer rests on comes out of the file."""
    random = SMALL_DIT | {"num_layers": 1, "attention_head_dim": 12}
    model = load_model(ModelSpec("one-block-dit", "dit", random=random, seed=7))
    transformer = load_quantized(OLD / "exports" / name, model.transformer, backend="simulate")
    tensors = load_file(OLD / "exports" / name / "expected.safetensors")
    inputs = {key.removeprefix("input/"): value for key, value in tensors.items() if key.startswith("input/")}
    for step in (0, 3):
        transformer.clock.set(step, 4)
        with torch.no_grad():
            (answer,) = transformer(**inputs, return_dict=False)
        torch.testing.assert_close(answer, tensors[f"step_{step}"], rtol=1e-4, atol=1e-5)
    steps_differ = not torch.equal(tensors["step_0"], tensors["step_3"])
    assert steps_differ == (name == "htg-w4a8"), "tables by denoising step are read by step"
