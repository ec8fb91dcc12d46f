"""In a plain diffusers pipeline: text to image, modulation folded into adaLN-single, tables over the denoising steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file
from small_pipelines import SIZES, SMALL

from ditbench.harness.build.export import TENSORS, load_quantized
from ditbench.harness.calibration.recording import calibrate
from ditbench.harness.fitting.conformance import DYNAMIC, STATIC
from ditbench.harness.generation.generate import conditions, generate
from ditbench.harness.models.base import ModelSpec, Sampler
from ditbench.harness.models.calls import placed
from ditbench.harness.models.loading import load_model
from ditbench.harness.samples.samples import Prompt

PAGE = Path(__file__).resolve().parents[2] / "docs" / "export.md"
PROMPTS = (Prompt("a red circle"), Prompt("two blue squares"))
STEPS = 3
SAMPLER = Sampler("ddim", STEPS, 2.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pixart")
    SMALL["pixart"]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_model(ModelSpec("small-pixart", "pixart", source=str(folder)))


@pytest.fixture(scope="module", params=["smoothquant", "htg"])
def export(request, model, write, tmp_path_factory):
    calibration = calibrate(model, SAMPLER, n=2, seed=0, prompts=PROMPTS)
    bits, params = (DYNAMIC, {}) if request.param == "smoothquant" else (STATIC, {"groups": 3})
    out = tmp_path_factory.mktemp(request.param) / "export"
    return write(
        out, model.target(), calibration, model, request.param, bits, dtype="float32", sampler=SAMPLER, **params
    )


@pytest.fixture(scope="module")
def ours(export, model):
    """As a run draws them."""
    return generate(model, export.built(), conditions(model, 2, 0, prompts=PROMPTS), SAMPLER, batch_size=2)


def call(pipe, model, steps=STEPS):
    wanted = conditions(model, 2, 0, prompts=PROMPTS)
    with torch.no_grad():
        return pipe(
            prompt=[prompt.text for prompt in wanted.prompts],
            num_inference_steps=steps,
            guidance_scale=2.0,
            generator=[torch.Generator().manual_seed(seed) for seed in wanted.seeds],
            output_type="latent",
            **model.adapter.call(model.pipe) | model.adapter.size,
        ).images


@pytest.mark.skipif(not PAGE.is_file(), reason="not a source checkout")
def test_the_script_of_the_docs_runs_in_a_process_of_its_own(folder, model, write, tmp_path):
    """With our small pipeline in place of the real one, on the CPU: nothing is imported before the script's first line."""
    calibration = calibrate(model, SAMPLER, n=2, seed=0, prompts=PROMPTS)
    write(tmp_path / "w4a8", model.target(), calibration, model, "rtn", DYNAMIC)
    script = PAGE.read_text().partition("```python\n")[2].partition("```")[0]
    for real, small in {
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": str(folder),
        '"cuda"': '"cpu"',
        "num_inference_steps=20": "num_inference_steps=2, use_resolution_binning=False",
    }.items():
        assert script.count(real) == 1
        script = script.replace(real, small)
    script += "print(image.size, type(pipe.transformer.transformer_blocks[0].ff.net[2]).__name__)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["(16,", "16)", "QuantLinear"], done.stdout


def test_a_plain_pipeline_draws_what_the_run_drew_bit_for_bit(export, ours, model, folder):
    pipe = DiffusionPipeline.from_pretrained(folder)
    load_quantized(export.folder, pipe)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)  # after loading: it is noticed
    assert torch.equal(call(pipe, model), ours.latents)
    assert torch.equal(call(pipe, model), ours.latents), "the second call starts at step 0 again"


def test_the_harness_draws_with_it_as_well(export, ours, model):
    again = load_quantized(export.folder, model.transformer)
    found = generate(model, again, conditions(model, 2, 0, prompts=PROMPTS), SAMPLER, batch_size=2)
    assert torch.equal(found.latents, ours.latents) and torch.equal(found.pixels, ours.pixels)


def test_another_number_of_steps_is_refused_where_tables_were_made_for_theirs(export, model, folder):
    pipe = DiffusionPipeline.from_pretrained(folder)
    load_quantized(export.folder, pipe)
    if export.recipe.num_steps is None:
        assert call(pipe, model, STEPS + 1).isfinite().all()
        return
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    words = (
        f"tables for {STEPS} denoising steps .timestep 999, 500, … 0., and its transformer was called at 666; draw with"
    )
    with pytest.raises(ValueError, match=words) as error:
        call(pipe, model, STEPS + 1)
    assert "\n" not in str(error.value)


def test_what_adaln_single_takes_over_is_counted(export):
    """In float32 everything that the record counts at 16 bits takes twice as much: floats, biases, folds."""
    tensors = load_file(export.folder / TENSORS)
    halved = sum(
        tensor.nbytes // 2
        if name.startswith(("float/", "folds/")) or "/bias/" in name or name.endswith("/weight_OC")
        else tensor.nbytes
        for name, tensor in tensors.items()
        if tensor.dtype != torch.int16
    )
    indices = sum(tensor.nbytes for tensor in tensors.values() if tensor.dtype == torch.int16)
    assert any(name.startswith("folds/") for name in tensors)
    assert halved + indices == export.size["model_bytes"]


def test_what_a_class_keeps_in_float32_is_exported_so(write, tmp_path):
    """Wan's norms, tables and time embedding; rounded to bf16 they would draw another video."""
    SMALL["wan"]().save_pretrained(tmp_path / "wan")
    model = load_model(ModelSpec("wan", "wan", source=str(tmp_path / "wan"), size=SIZES["wan"]))
    made = write(tmp_path / "export", model.target(), None, model, "rtn", DYNAMIC)
    loaded, built = load_quantized(made.folder, model.transformer), made.built()
    kept = {n: t for n, t in loaded.named_parameters() if t.dtype == torch.float32}
    assert any("time_embedder" in name for name in kept)
    for name, tensor in kept.items():
        assert torch.equal(tensor, built.get_parameter(name)), name
    inputs = placed(model.step_inputs(2), torch.bfloat16, "cpu")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).sample, built(**inputs).sample)
