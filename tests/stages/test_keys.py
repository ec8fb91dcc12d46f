"""Each stage's artifact has the key of all that makes it, and of nothing else."""

from __future__ import annotations

import pytest

from ditbench.harness.stages.config import parse
from ditbench.harness.stages.keys import quantized_key, samples_address, values_address
from ditbench.harness.stages.loaded import model_of
from ditbench.harness.stages.quantize import recording_key
from ditbench.harness.sweep.compose import composed


def keys(*overrides: str) -> dict[str, str | None]:
    config = parse(composed([["method=smoothquant", "bits=w4a8", *overrides]])[0])
    model = model_of(config.model)
    recording = recording_key(config, model)
    quantized = quantized_key(config, model, recording, {})
    samples = samples_address(config, model, seed=config.seed, dtype="bfloat16", of=quantized)
    float_samples = samples_address(config, model, seed=config.seed, dtype="float32")
    values = values_address(config, model, "lpips_alex", samples.key, float_samples.key)
    pixels = values_address(config, model, "psnr", samples.key, float_samples.key)
    return {
        "recording": recording,
        "quantized": quantized,
        "samples": samples.key,
        "float": float_samples.key,
        "values": values.key,
        "psnr": pixels.key,
    }


ALL = {"recording", "quantized", "samples", "float", "values", "psnr"}
QUANTIZED = {"quantized", "samples", "values", "psnr"}
CHANGES = {
    "model=tiny-dit-stress": ALL,
    "protocol.steps=3": ALL,
    "seed=1": ALL,
    "calibration.n=8": ALL - {"float"},
    "calibration.select=salient": QUANTIZED,
    "calibration.keep=30": set(),
    "method=rtn": QUANTIZED,
    "method.strength=0.6": QUANTIZED,
    "bits=w4a4": QUANTIZED,
    "protocol.skip=[proj]": QUANTIZED,
    "protocol.attention=int8": QUANTIZED,
    "backend=simulate": QUANTIZED,
    "protocol.n=8": {"samples", "float", "values", "psnr"},
    "generate.batch_size=3": {"samples", "float", "values", "psnr"},
    "metrics.resamples=5": {"values", "psnr"},
    "metrics.reference=null": {"values", "psnr"},
    "measure.repeats=5": set(),
    "generate.noise_floor_seeds=0": set(),
    "name=other": set(),
    "results_dir=/elsewhere": set(),
}


@pytest.mark.parametrize("override", CHANGES)
def test_a_setting_changes_the_keys_of_what_it_makes_and_no_other(override):
    before, after = keys(), keys(override)
    assert {name for name in before if before[name] != after[name]} == CHANGES[override]


def test_the_float_model_is_no_quantized_one():
    assert keys("method=fp")["quantized"] is None


def test_other_weights_of_a_metrics_network_are_another_value(monkeypatch, tmp_path):
    monkeypatch.setenv("DITBENCH_WEIGHTS", str(tmp_path))
    before = keys()
    (tmp_path / "alexnet.pth").write_bytes(b"other weights")
    after = keys()
    assert {name for name in before if before[name] != after[name]} == {"values"}, "psnr asks no network"


def test_samples_of_another_kind_of_processor_are_others(monkeypatch):
    """One cache may lie on a disk that machines of a cluster share: a quantized model's samples are compared with those of the
    float model on the same kind. What was fitted is told by its own key, wherever it was.
    """
    before = keys()
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "another")
    assert {name for name, key in keys().items() if before[name] != key} == {"samples", "float", "values", "psnr"}


def test_latents_are_kept_where_a_metric_computes_with_them_or_somebody_asks():
    without = keys("metrics.names=[psnr]")
    assert without["samples"] != keys()["samples"], "sqnr is among the default metrics"
    assert without["samples"] != keys("metrics.names=[psnr]", "generate.keep_latents=true")["samples"]


def test_one_noise_for_all_changes_what_is_drawn_and_nothing_that_is_learned():
    before, after = (keys("model=tiny-t2i", f"protocol.noise={noise}") for noise in ("own", "shared"))
    assert {name for name in before if before[name] != after[name]} == {"samples", "float", "values", "psnr"}
