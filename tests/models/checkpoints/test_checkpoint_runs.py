"""From a configuration to a record and an export, with a checkpoint that is put together: variant, adapter, fused projections."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_cases import load
from diffusers import DiffusionPipeline
from test_lora import save_adapter

from ditbench.harness.build.export import load_quantized, read_recipe
from ditbench.harness.cli.export import export_run
from ditbench.harness.common.errors import UserError
from ditbench.harness.generation.generate import conditions
from ditbench.harness.models.known_families import family
from ditbench.harness.models.layers import fuse_qkv
from ditbench.harness.models.loading import load_model
from ditbench.harness.records.drawn_samples import samples_of
from ditbench.harness.records.record import Record
from ditbench.harness.run import run
from ditbench.harness.stages.config import RunConfig, parse
from ditbench.harness.stages.loaded import model_of
from ditbench.harness.sweep.compose import composed


def configuration(folders, adapter: Path, results: Path, *more: str) -> RunConfig:
    (raw,) = composed([[
        "model=flux.1-dev", f"model.source={folders['flux-fp16']}", "model.revision=null", "model.size={height:16,width:16}",
        "model.variant=fp16", f"model.lora=[{{path:{adapter},scale:0.5}}]", "model.fuse_qkv=true", "protocol.n=2",
        "protocol.steps=2", "protocol.prompts=shapes", "calibration.n=2", "calibration.prompts=shapes-calibration",
        "method=smoothquant", "bits=w8a8", "generate.noise_floor_seeds=0", "generate.dtype=float32", "model.dtype=float32",
        "metrics.names=[sqnr]", "metrics.resamples=5", "measure.samples=1", "measure.repeats=1", "measure.warmup=0",
        "tracker=none", "device=cpu", f"results_dir={results}", *more,
    ]])  # fmt: skip
    return parse(raw)


@pytest.fixture(scope="module")
def adapter(folders, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    save_adapter(load(folders["flux"]).pipe, folder, ["to_q", "proj_mlp"])
    return folder / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def config(folders, adapter, tmp_path_factory) -> RunConfig:
    return configuration(folders, adapter, tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def done(config) -> Record:
    return run(config)


def test_the_record_says_what_was_put_together_and_what_nothing_calls(done):
    assert done.status == "ok", done.error
    parts = done.env["checkpoint_parts"]
    assert {"transformer", "scheduler", "lora.0"} <= parts.keys() and {len(sha256) for sha256 in parts.values()} == {64}
    assert "transformer_blocks.0.attn.to_qkv" in done.layers and "transformer_blocks.0.attn.to_q" not in done.layers
    assert "transformer_blocks.0.attn.to_q" in done.bits["unreached_layers"]
    assert set(done.bits["unreached_layers"]).isdisjoint([*done.layers, *done.bits["float_layers"]])


def test_an_export_contains_the_adapter(config, done, folders, tmp_path):
    """Loaded into a pipeline that has never seen the adapter, it draws what the run drew."""
    exported = export_run(done, tmp_path / "x")
    assert read_recipe(exported.folder)["model"]["lora"] == config.model.lora
    pipe = DiffusionPipeline.from_pretrained(folders["flux"])
    plain = drawn(pipe, config)
    fuse_qkv(pipe.transformer)
    load_quantized(exported.folder, pipe)
    expected = samples_of(done).pixels[:].numpy()
    assert np.array_equal(drawn(pipe, config), expected)
    assert np.abs(plain.astype(int) - expected).mean() > 2  # far more than eight bits round


def drawn(pipe: DiffusionPipeline, config: RunConfig) -> np.ndarray:
    """uint8, (N, H, W, 3): what plain diffusers draws of the run's prompts and seeds."""
    wanted = conditions(model_of(config.model), 2, config.seed, prompts=config.protocol.prompts)
    with torch.no_grad():
        images = pipe(
            [prompt.text for prompt in wanted.prompts],
            generator=[torch.Generator().manual_seed(seed) for seed in wanted.seeds],
            num_inference_steps=2,
            guidance_scale=config.protocol.sampler.guidance,
            output_type="np",
            **family("flux").call(pipe) | config.model.size,
        ).images
    return (images * 255).round().astype(np.uint8)


def test_an_export_replaces_no_adapter_in_silence(done, adapter, folders, tmp_path):
    exported = export_run(done, tmp_path / "x")
    pipe = DiffusionPipeline.from_pretrained(folders["flux"])
    pipe.load_lora_weights(str(adapter.parent))
    with pytest.raises(UserError, match="carries LoRA adapters, which an export replaces"):
        load_quantized(exported.folder, pipe.transformer)


def test_an_edited_adapter_under_the_same_path_makes_another_model(config, adapter):
    before = load_model(config.model).fingerprint
    whole = adapter.read_bytes()
    adapter.write_bytes(whole[:-1] + bytes([whole[-1] ^ 64]))
    try:
        assert load_model(config.model).fingerprint != before
    finally:
        adapter.write_bytes(whole)


def test_a_configuration_from_before_these_options_is_read(config):
    """As records hold it."""
    model = {
        k: v
        for k, v in config.raw["model"].items()
        if k not in ("variant", "config", "transformer", "lora", "fuse_qkv")
    }
    old = parse(config.raw | {"model": model}).model
    assert (old.variant, old.config, old.transformer, old.lora, old.fuse_qkv) == (None, None, None, None, False)


@pytest.mark.parametrize(
    "override, words", [("model.lora=3", "model.lora must be"), ("model.fuse_qkv=yes", "true or false")]
)
def test_options_of_the_wrong_type_are_refused(override, words, folders, adapter, tmp_path):
    with pytest.raises(UserError, match=words):
        configuration(folders, adapter, tmp_path, override)
