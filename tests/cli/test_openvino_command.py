"""`ditbench export --format openvino`: of a run whose recipe OpenVINO has a form for; of others, why not and what to take."""

from __future__ import annotations

import json

import pytest
import torch

from ditbench.harness.build.flat_calls import relative_error
from ditbench.harness.build.openvino_run import load_openvino
from ditbench.harness.common.extras import installed
from ditbench.harness.stages.config import parse
from ditbench.harness.stages.loaded import forget_models, model_of

STATIC = ("bits=w8a8", "bits.act.dynamic=false", "bits.act.granularity=per_tensor")
needs_openvino = pytest.mark.skipif(not installed("openvino"), reason="the extra ditbench[openvino] is not installed")


@pytest.fixture
def recorded(run, tmp_path):
    def record(*overrides):
        assert run(*overrides, "name=ov").code == 0
        return next(tmp_path.glob("runs/ov/*/record.json")).parent

    return record


@needs_openvino
def test_an_exported_run_computes_in_openvino_nearly_what_the_float_model_computes(
    ditbench, recorded, tmp_path, request
):
    folder = recorded(*STATIC)
    out = tmp_path / "ov"
    done = ditbench("export", folder.name, "--format", "openvino", "--out", str(out), "--results-dir", str(tmp_path))
    assert done.code == 0 and "W8A8, openvino" in done.out and "from simulate (relative)" in done.out
    described = json.loads((out / "recipe.json").read_text())
    assert described["run_id"] == folder.name and described["error_to_simulate"] < 2e-2
    assert f"{described['files']['model.bin']['bytes']:,} bytes" in done.out
    assert "× larger than in 16 bits" in done.out, "tiny-dit's adaLN stays in float32"

    forget_models()
    request.addfinalizer(forget_models)  # its pipeline has another transformer then
    model = model_of(parse(json.loads((folder / "record.json").read_text())["config"]).model)
    inputs = model.step_inputs(4)
    with torch.no_grad():
        expected = model.transformer.float()(**inputs).sample
    load_openvino(out, model.pipe, precision="f32")
    assert 1e-4 < relative_error(model.pipe.transformer(**inputs).sample, expected) < 0.05


def test_a_recipe_without_a_form_is_refused_with_the_reason(ditbench, recorded, tmp_path, monkeypatch):
    for module in ("build.openvino_export", "cli.export"):
        monkeypatch.setattr(f"ditbench.harness.{module}.needed", lambda *_: None)
    folder = recorded("bits=w8a8")
    done = ditbench("export", str(folder), "--format", "openvino", "--out", str(tmp_path / "ov"))
    assert done.code == 2 and not (tmp_path / "ov").exists()
    assert "find their range in each call" in done.err and "--format openvino-weights" in done.err


def test_activations_without_a_form_are_refused_before_anything_is_calibrated(ditbench, tmp_path, monkeypatch):
    monkeypatch.setattr("ditbench.harness.cli.export.needed", lambda *_: None)
    monkeypatch.setattr("ditbench.harness.cli.export.calibrate", lambda *_: pytest.fail("calibrated"))
    done = ditbench("export", "bits=w4a8", "--format", "openvino", "--out", str(tmp_path / "ov"))
    assert done.code == 2 and "bits=w4a8: its activations find their range in each call" in done.err


@needs_openvino
def test_weights_alone_of_the_same_run_are_written_and_said_to_be_so(ditbench, recorded, tmp_path):
    folder = recorded("bits=w8a8")
    done = ditbench("export", str(folder), "--format", "openvino-weights", "--out", str(tmp_path / "ov"))
    assert done.code == 0 and "activations are float" in done.out


def test_a_format_that_is_none_is_said_with_those_that_are(ditbench):
    done = ditbench("export", "any", "--format", "onnx", "--out", "nowhere")
    assert done.code == 2 and "openvino-weights" in done.err
