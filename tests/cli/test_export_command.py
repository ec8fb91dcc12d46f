"""`ditbench export`: of a recorded run, of an experiment, of a configuration; and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from ditbench.harness.build.export import RECIPE, TENSORS, load_quantized, read_recipe
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.records import hashed_json
from ditbench.harness.records.drawn_samples import samples_of
from ditbench.harness.records.record import read
from ditbench.harness.stages.config import parse
from ditbench.harness.stages.generate import few
from ditbench.harness.stages.loaded import forget_models, model_of
from ditbench.harness.stages.quantize import Quantized


@pytest.fixture
def smoothed(run, tmp_path):
    """The folder of a recorded smoothquant W4A8 run."""
    assert run("method=smoothquant", "bits=w4a8", "name=smooth").code == 0
    return next(tmp_path.glob("runs/smooth/*/record.json")).parent


def drawn_again(folder, run_folder):
    """The images of an export, drawn with a fresh model as the run's configuration says."""
    config = parse(json.loads((run_folder / "record.json").read_text())["config"])
    forget_models()
    model = model_of(config.model)
    return few(config, model, Quantized(ModelRecipe({}), {}, load_quantized(folder, model.transformer)))


def test_the_export_of_a_run_draws_the_images_that_the_run_saved(ditbench, smoothed, tmp_path):
    out = tmp_path / "export"
    done = ditbench("export", smoothed.name, "--out", str(out), "--results-dir", str(tmp_path))
    assert done.code == 0 and done.error_lines == []
    record = json.loads((smoothed / "record.json").read_text())
    described = json.loads((out / RECIPE).read_text())
    assert described["bits"] == record["bits"]
    assert described["tensors"]["bytes"] == record["efficiency"]["model_bytes"]
    assert f"{record['efficiency']['compression']:.2f}× smaller" in done.out
    assert (described["method"], described["run_id"]) == ("smoothquant", record["run_id"])
    saved = samples_of(read(smoothed / "record.json"))
    again = drawn_again(out, smoothed)
    assert torch.equal(saved.pixels[:], again.pixels)
    assert torch.equal(saved.latents[:], again.latents)


def test_a_configuration_is_exported_as_its_run_would_be(ditbench, smoothed, tmp_path):
    """Calibrated and quantized now, without a record; the same file, byte for byte."""
    by_run, by_values = tmp_path / "a", tmp_path / "b"
    assert ditbench("export", str(smoothed), "--out", str(by_run)).code == 0
    values = ("protocol.steps=2", "calibration.n=2", "method=smoothquant", "bits=w4a8", f"results_dir={tmp_path}/none")
    assert ditbench("export", *values, "--out", str(by_values)).code == 0
    assert (by_run / TENSORS).read_bytes() == (by_values / TENSORS).read_bytes()
    assert not (tmp_path / "none" / "runs").exists()


def test_what_the_protocol_puts_on_attention_is_in_the_export_of_a_run(ditbench, run, tmp_path):
    """It is no part of what the method learned, and of the model that was measured."""
    assert run("method=rtn", "bits=w8a8", "protocol.attention=int8", "name=attention").code == 0
    folder, out = next(tmp_path.glob("runs/attention/*/record.json")).parent, tmp_path / "export"
    assert ditbench("export", str(folder), "--out", str(out)).code == 0
    described = read_recipe(out)
    assert described["attention"] and described["bits"] == read(folder / "record.json").bits
    saved, again = samples_of(read(folder / "record.json")), drawn_again(out, folder)
    assert torch.equal(saved.pixels[:], again.pixels)


def test_tables_by_step_are_exported_with_the_timesteps_of_their_run(ditbench, run, tmp_path):
    assert run("method=htg", "bits=w8a8", "name=steps").code == 0
    folder, out = next(tmp_path.glob("runs/steps/*/record.json")).parent, tmp_path / "export"
    assert ditbench("export", str(folder), "--out", str(out)).code == 0
    described = read_recipe(out)
    assert described["num_steps"] == 2
    assert described["schedule"] == {"argument": "timestep", "timesteps": [500.0, 0.0]}
    assert described["sampler"] == {
        "kind": "ddim",
        "steps": 2,
        "guidance": 1.5,
        "guidance_2": None,
        "negative_prompt": None,
    }
    assert drawn_again(out, folder).pixels.shape[0] == 4


def test_an_experiment_is_one_folder_per_run_and_the_float_model_is_none(ditbench, run, tmp_path):
    assert run("-m", "method=fp,rtn,quarot", "bits=w8a8", "name=two").code == 0
    done = ditbench("export", "two", "--out", str(tmp_path / "out"), "--results-dir", str(tmp_path))
    assert done.code == 0
    names = sorted(path.name.rsplit("-", 1)[0] for path in (tmp_path / "out").iterdir())
    assert names == ["tiny-dit-quarot-w8a8", "tiny-dit-rtn-w8a8"]
    assert all((path / TENSORS).exists() for path in (tmp_path / "out").iterdir())


def test_what_a_method_does_to_the_sampler_is_said_to_be_missing(ditbench, run, tmp_path):
    assert run("method=ptqd", "bits=w8a8").code == 0
    folder = next(tmp_path.glob("runs/default/*/record.json")).parent
    said = ditbench("export", str(folder), "--out", str(tmp_path / "export")).out
    assert "note: ptqd also corrects the sampler's steps; that part is not in an export" in said


REFUSED = {
    "no such run": (["nothing"], "no run and no experiment 'nothing'"),
    "both kinds": (["smooth", "method=rtn"], "either runs or overrides, got both"),
    "float": (["method=fp"], "method fp quantizes nothing"),
    "no such method": (["method=smothquant"], "did you mean 'smoothquant'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused_in_one_line(ditbench, tmp_path, case):
    wanted, words = REFUSED[case]
    done = ditbench("export", *wanted, "--out", str(tmp_path / "out"), "--results-dir", str(tmp_path))
    assert done.code == 2
    assert len(done.error_lines) == 1 and words in done.error_lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "words"),
    [("weights_sha256", "weights are not those of model=tiny-dit here"), ("method_sha256", "rtn was edited since")],
)
def test_a_run_that_no_longer_fits_is_refused(ditbench, finished, tmp_path, key, words):
    record = hashed_json.read(finished)
    record["env"][key] = "0" * 64
    finished.write_text(hashed_json.text_of(record))
    done = ditbench("export", str(finished.parent), "--out", str(tmp_path / "out"))
    assert done.code == 2 and words in done.err


def test_a_failed_run_is_refused_with_its_reason(ditbench, finished, tmp_path):
    record = hashed_json.read(finished) | {"status": "failed", "error": "NaN in the samples"}
    finished.write_text(hashed_json.text_of(record))
    done = ditbench("export", str(finished.parent), "--out", str(tmp_path / "out"))
    assert done.code == 2 and "is failed: NaN in the samples" in done.err


def test_an_export_without_a_tracker_has_nowhere_to_be_kept(ditbench, finished, tmp_path):
    done = ditbench("export", str(finished.parent), "--track", "--out", str(tmp_path / "out"))
    assert done.code == 2 and "was told to no tracker (tracker=none)" in done.err
    done = ditbench("export", "method=rtn", "--track", "--out", str(tmp_path / "more"))
    assert done.code == 2 and "a configuration has no run" in done.err
