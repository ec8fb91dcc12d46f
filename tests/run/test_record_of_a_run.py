"""What a finished run leaves: every field of the record, the same again when repeated, nothing twice without being asked."""

from __future__ import annotations

import math
import re
import shutil

import pytest
import torch

import ditbench
from ditbench.harness.backends.base import choose
from ditbench.harness.backends.matrix import example_recipe
from ditbench.harness.records.drawn_samples import samples_of
from ditbench.harness.records.record import read
from ditbench.harness.samples.store import found_store

FIELDS = {
    "schema": int,
    "run_id": str,
    "status": str,
    "error": type(None),
    "config": dict,
    "method": str,
    "model": str,
    "experiment": str,
    "bits": dict,
    "metrics": dict,
    "efficiency": dict,
    "layers": dict,
    "timings_s": dict,
    "cost": dict,
    "env": dict,
    "artifacts": dict,
    "made_from": dict,
    "files": dict,
    "non_finite": list,
    "sha256": str,
}


@pytest.fixture
def first(twice, read_records):
    return next(iter(read_records(twice).values()))


def test_a_record_has_every_field_with_its_type(first):
    assert {name: type(value) for name, value in first.items()} == FIELDS
    assert first["status"] == "ok" and first["schema"] == 1
    assert re.fullmatch(r"[0-9a-f]{12}", first["run_id"])
    assert (first["method"], first["model"], first["experiment"]) == ("rtn", "tiny-dit", "default")


def test_a_record_holds_the_whole_configuration_with_defaults(first):
    config = first["config"]
    assert config["protocol"]["n"] == 4 and config["protocol"]["scope"] == "blocks"
    assert config["bits"]["weight"] == {
        "bits": 4, "number": "int", "granularity": "per_channel", "group_size": None, "symmetric": True,
    }  # fmt: skip
    assert config["generate"]["reference_dtype"] == "float32", "an interpolation is not resolved"
    assert config["seed"] == 0


def test_a_record_says_what_the_bits_really_are(first):
    bits = first["bits"]
    assert bits["label"] == "W4A4"
    assert 4 < bits["weight_bits_effective"] < 16 and 4 < bits["act_bits_effective"] < 16
    assert 0.5 < bits["mac_share_quantized"] < 1
    assert "proj_out_2" in bits["float_layers"]


def test_every_metric_has_a_value_an_interval_and_a_passport(first):
    assert list(first["metrics"]) == ["psnr", "sqnr", "torchmetrics/fid_judge"]
    for entry in first["metrics"].values():
        assert entry["status"] == "ok" and entry["reason"] is None and entry["n"] == 4
        low, high = entry["ci95"]
        assert math.isfinite(entry["value"]) and low <= high
        assert {"implementation", "version", "reference", "dtype"} <= set(entry["passport"])
    assert {"weights_sha256", "resize", "antialias"} <= set(first["metrics"]["torchmetrics/fid_judge"]["passport"])


def test_only_unpaired_metrics_have_a_noise_floor(first):
    floors = {name: entry["noise_floor"] for name, entry in first["metrics"].items()}
    assert floors["psnr"] is None and floors["sqnr"] is None
    assert floors["torchmetrics/fid_judge"] > 0


def test_a_run_in_integers_is_measured_against_bf16_in_the_same_process(swept, read_records):
    best = {bits: choose(example_recipe(f"w{bits}a{bits}"), _cpu()) for bits in (8, 4)}
    for bits, backend in best.items():
        if backend.KIND != "measured":
            pytest.skip(f"no backend runs W{bits}A{bits} in integers here")
        efficiency = _of(swept, read_records, "rtn", f"W{bits}A{bits}")["efficiency"]
        assert efficiency["kind"] == "measured" and efficiency["backend"] == backend.NAME
        ours, baseline = efficiency["latency_ms"], efficiency["baseline_latency_ms"]
        assert 0 < ours["p10"] <= ours["median"] <= ours["p90"]
        assert efficiency["speedup"] == baseline["median"] / ours["median"]
        assert "bf16" in efficiency["baseline"] and "same process" in efficiency["baseline"]
        assert efficiency["peak_memory_bytes"] > efficiency["model_bytes"] / 2


def test_a_simulated_run_has_bytes_but_no_latency_ratio_or_peak(run, tmp_path, read_records):
    assert run("bits=w8a8", "backend=simulate", "metrics=fidelity", "generate.noise_floor_seeds=0") == 0
    (only,) = read_records(tmp_path).values()
    efficiency = only["efficiency"]
    assert efficiency["kind"] == "simulated" and efficiency["backend"] == "simulate"
    for name in ("latency_ms", "baseline_latency_ms", "speedup", "peak_memory_bytes", "baseline_peak_memory_bytes"):
        assert efficiency[name] is None
    assert 0 < efficiency["model_bytes"] < efficiency["baseline_model_bytes"]
    assert efficiency["compression"] == efficiency["baseline_model_bytes"] / efficiency["model_bytes"]


def test_a_record_says_the_rule_of_its_scales_and_that_the_format_is_simulated(run, tmp_path, read_records):
    assert run("bits=mxfp8", "bits.act.rule=floor", "generate.noise_floor_seeds=0") == 0
    (only,) = read_records(tmp_path).values()
    assert only["bits"]["label"] == "MXFP8" and only["bits"]["weight_format"].endswith("scales in e8m0 (rceil)")
    assert only["bits"]["act_format"] == "e4m3 blocks of 1 × 32, scales in e8m0 (floor)"
    assert (only["config"]["bits"]["weight"]["rule"], only["config"]["bits"]["act"]["rule"]) == ("rceil", "floor")
    assert only["efficiency"]["kind"] == "simulated" and only["efficiency"]["backend"] == "simulate"


def test_a_run_with_attention_in_four_bits_says_so_and_its_float_row_stays_float(run, tmp_path, read_records):
    """On top of weights and activations in float, so that attention is all that is rounded."""
    settings = ("protocol.attention=nvfp4", "generate.noise_floor_seeds=0")
    assert run("method=rtn", "bits=w16a16", *settings) == 0 and run("method=fp", *settings) == 0
    rounded, exact = sorted(read_records(tmp_path).values(), key=lambda record: record["method"], reverse=True)
    bits = rounded["bits"]
    assert bits["attention_format"].startswith("q and k e2m1") and bits["attention_bits_effective"] == 4.5
    assert len(bits["attention_operands_quantized"]) == 5 and 0 < bits["mac_share_quantized"] < 0.2
    assert bits["act_bits_effective"] == bits["weight_bits_effective"] == 16
    assert rounded["efficiency"]["kind"] == "simulated" and 15 < rounded["metrics"]["psnr"]["value"] < 60
    assert exact["method"] == "fp" and exact["bits"]["attention_operands_quantized"] == []
    assert exact["bits"]["mac_share_quantized"] == 0 and "attention_format" not in exact["bits"]


def test_a_mix_of_formats_keeps_the_protocols_attention(run, tmp_path, read_records):
    """It is put on what was chosen: no candidate has it, so that no unit is tied by it."""
    mix = (
        "bits=mixed",
        "bits.candidates=[w4a8,w8a8]",
        "bits.budget.average_weight_bits=6",
        "generate.noise_floor_seeds=0",
    )
    assert run("method=rtn", *mix, "protocol.attention=int8") == 0
    (only,) = read_records(tmp_path).values()
    assert len(only["bits"]["attention_operands_quantized"]) == 5 and only["bits"]["attention_bits_effective"] == 8


def test_a_run_in_fp8_says_so_and_is_close_to_the_float_model(run, tmp_path, read_records):
    assert run("bits=fp8", "generate.noise_floor_seeds=0") == 0
    (only,) = read_records(tmp_path).values()
    assert only["bits"]["label"] == "FP8" and only["config"]["bits"]["label"] == "fp8"
    assert {only["config"]["bits"][side]["number"] for side in ("weight", "act")} == {"e4m3"}
    assert 8 < only["bits"]["weight_bits_quantized_layers"] < 8.7 and 8 < only["bits"]["act_bits_effective"] < 9
    assert 34 < only["metrics"]["psnr"]["value"] < 42  # of two steps; twenty give 44
    backend = choose(example_recipe("fp8"), _cpu())
    assert only["efficiency"]["kind"] == backend.KIND and only["efficiency"]["backend"] == backend.NAME


def test_every_quantized_layer_has_its_error(first):
    layers = first["layers"]
    assert len(layers) == 5 * 6  # blocks × (q, k, v, out, two of the FFN)
    assert all(entry["weight_bits"] == 4 and entry["act_bits"] == 4 for entry in layers.values())
    assert all(0 < entry["sqnr_db"] < 60 for entry in layers.values())
    assert not set(layers) & set(first["bits"]["float_layers"])


def test_timings_and_environment_are_there(first):
    stages = {"calibrate", "quantize", "generate", "evaluate", "measure"}
    assert stages <= set(first["timings_s"]) and all(value >= 0 for value in first["timings_s"].values())
    assert first["cost"]["fit_s"] == first["timings_s"]["calibrate"] + first["timings_s"]["quantize"]
    assert first["cost"]["peak_memory_bytes"] >= first["cost"]["memory_before_bytes"] > 2**26
    env = first["env"]
    assert env["ditbench"] == ditbench.__version__ and env["seeds"] == {"seed": 0}
    assert env["packages"]["torch"] and env["packages"]["diffusers"] and env["device"] and env["python"]
    assert env["float32"] == "float32"
    assert env["git"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", env["git"])


def test_the_artifacts_lie_beside_the_record(twice, first):
    folder = twice / "runs" / "default" / first["run_id"]
    assert set(first["artifacts"]) >= {"grid", "float_grid"}
    for name in first["artifacts"].values():
        assert (folder / name).stat().st_size > 0
    samples = samples_of(read(folder / "record.json"))
    assert samples.pixels.shape == (4, 16, 16, 3) and samples.pixels.dtype == torch.uint8
    assert samples.labels_N.tolist() == [0, 1, 2, 3]


def test_force_makes_a_second_attempt_beside_the_first(twice, read_records):
    first, second = read_records(twice)
    assert second == f"{first}.2"


def test_a_repeated_run_gives_the_same_images_and_values_bit_for_bit(twice, read_records):
    one, two = read_records(twice).values()
    caches = zip((one, two), ("cache", "second-cache"), strict=True)
    before, after = (found_store(twice / name / "samples" / r["made_from"]["samples"]).samples() for r, name in caches)
    assert torch.equal(before.pixels[:], after.pixels[:]) and torch.equal(before.latents[:], after.latents[:])
    assert one["metrics"] == two["metrics"]
    assert one["layers"] == two["layers"] and one["bits"] == two["bits"]


def test_a_recorded_run_is_skipped_and_the_user_told(twice, read_records, tmp_path, run, capsys):
    shutil.copytree(twice, tmp_path, dirs_exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")}
    left = tmp_path / "runs" / "default" / ".0123456789ab.0123abcd.part"
    left.mkdir()  # by a process that was killed
    assert run("bits=w4a4") == 0
    assert not left.exists()
    said = capsys.readouterr()
    assert "tiny-dit rtn W4A4: already recorded in" in said.err and "--force runs it again" in said.err
    assert "W4A4" in said.out, "the comparison is printed all the same"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")} == before


def test_the_16_bit_reference_is_one_run_in_a_sweep_over_bits(swept, read_records):
    made = [(values["method"], values["bits"]["label"]) for values in read_records(swept).values()]
    assert sorted(made) == [("fp", "W16A16"), ("rtn", "W4A4"), ("rtn", "W8A8")]


def test_the_16_bit_reference_is_measured_and_close_to_the_float_model(swept, read_records):
    reference = _of(swept, read_records, "fp", "W16A16")
    assert reference["efficiency"]["kind"] == "measured" and reference["efficiency"]["compression"] == 1
    assert reference["layers"] == {} and reference["bits"]["mac_share_quantized"] == 0
    assert reference["metrics"]["psnr"]["value"] > _of(swept, read_records, "rtn", "W4A4")["metrics"]["psnr"]["value"]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_images_do_not_depend_on_the_batch_size_beyond_bf16_rounding(twice, first, run, tmp_path, batch_size):
    """Bit for bit on the CPU this was written on; a kernel that adds in another order per shape is allowed to round."""
    assert (
        run("bits=w4a4", f"generate.batch_size={batch_size}", "metrics=fidelity", "generate.noise_floor_seeds=0") == 0
    )
    (other,) = tmp_path.glob("runs/default/*/record.json")
    records = twice / "runs/default" / first["run_id"] / "record.json", other
    ours, theirs = (samples_of(read(path)).latents for path in records)
    assert (ours[:] - theirs[:]).norm() / ours[:].norm() < 0.05, "a row of noise or a label moved"


def _of(results_dir, read_records, method, label):
    (found,) = [
        values
        for values in read_records(results_dir).values()
        if (values["method"], values["bits"]["label"]) == (method, label)
    ]
    return found


def _cpu():
    import torch

    return torch.device("cpu")


def test_a_state_whose_entries_share_a_tensor_is_saved(run, tmp_path, read_records):
    """HTG with static ranges names one grouping of the steps for every layer that reads a site."""
    static = "bits.act={granularity:per_tensor,symmetric:false,dynamic:false}"
    assert run("method=htg", "bits=w8a8", static, "metrics=fidelity", "generate.noise_floor_seeds=0") == 0
    (only,) = read_records(tmp_path).values()
    assert only["status"] == "ok" and only["artifacts"]["state"] == "state.safetensors"
