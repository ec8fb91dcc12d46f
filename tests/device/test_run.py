"""`ditbench run device=second_device`, called in the process that registered the device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import second_device
from device_chain import saved
from operations import counted

from ditbench.harness.cli import main
from ditbench.harness.common.devices import memory_of

TINY = (
    "bits=w4a8", "backend=simulate", "generate.dtype=float32", "generate.reference_dtype=float32", "protocol.n=4",
    "protocol.steps=2", "calibration.n=2", "metrics.resamples=5", "measure.samples=1", "tracker=none",
)  # fmt: skip
DIGITS = (
    "model=tiny-dit", "generate.noise_floor_seeds=1", "metrics.names=[psnr,sqnr,accuracy,torchmetrics/fid_judge,collapse]",
)  # fmt: skip


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    """The record that was written last."""
    code = main(["run", *TINY, f"results_dir={folder}", *arguments])
    paths = sorted(folder.glob("runs/*/*/record.json"), key=lambda path: path.stat().st_mtime_ns)
    record = json.loads(paths[-1].read_text())
    assert code == 0 and record["status"] == "ok", record["error"]
    return record


TOLD = (
    "model.revision=null", "model.dtype=float32", "protocol.prompts=shapes", "calibration.prompts=shapes-calibration",
    "generate.noise_floor_seeds=0",
)  # fmt: skip


def values(record: dict[str, Any]) -> dict[str, float]:
    entries = record["metrics"].items()
    found = {f"{name} {each}": entry[each] for name, entry in entries for each in ("value", "noise_floor")}
    return {name: value for name, value in found.items() if value is not None}


def about(record: dict[str, Any]) -> Any:
    return pytest.approx(values(record), rel=0.02, abs=0.01)


def test_a_run_on_it_has_the_cpus_metrics_and_layer_errors_and_names_it(second, tmp_path):
    near, far = run(tmp_path, *DIGITS, "device=cpu"), run(tmp_path, *DIGITS, "device=second_device")
    assert values(far) == about(near) and all(entry["status"] == "ok" for entry in far["metrics"].values())
    for name, layer in near["layers"].items():
        assert far["layers"][name]["sqnr_db"] == pytest.approx(layer["sqnr_db"], abs=1e-3)
    assert far["env"]["device"] == far["efficiency"]["device"] == "a second device made of the CPU"
    assert far["efficiency"]["kind"] == "simulated" and far["efficiency"]["latency_ms"] is None
    assert far["run_id"] != near["run_id"]


def test_its_index_makes_no_other_run(second, tmp_path, capsys):
    first = run(tmp_path, "model=tiny-dit", "metrics.names=[psnr]", "device=second_device")
    capsys.readouterr()
    assert (
        run(tmp_path, "model=tiny-dit", "metrics.names=[psnr]", "device=second_device:0")["run_id"] == first["run_id"]
    )
    assert "already recorded" in capsys.readouterr().err


def test_the_float_model_alone_is_timed_on_it(second, tmp_path):
    record = run(tmp_path, "model=tiny-dit", "method=fp", "metrics.names=[psnr]", "device=second_device")
    assert record["efficiency"]["kind"] == "measured" and record["efficiency"]["latency_ms"]["median"] > 0


def test_a_device_that_does_not_tell_its_memory_gets_no_number_of_the_cpus(second, monkeypatch, tmp_path):
    monkeypatch.delattr(second_device.Module, "memory_allocated")
    assert memory_of(second) is None
    record = run(tmp_path, "model=tiny-dit", "method=fp", "metrics.names=[psnr]", "device=second_device")
    measured = record["efficiency"]
    assert measured["kind"] == "measured" and measured["latency_ms"]["median"] > 0
    assert measured["peak_memory_bytes"] is measured["baseline_peak_memory_bytes"] is None
    assert record["cost"]["peak_memory_bytes"] is None


def test_runs_of_a_sweep_share_a_pipeline_and_do_not_disturb_each_other(second, tmp_path):
    """On the second device, then on the CPU, then there again: each is what it is alone."""
    checkpoint = saved("pixart", tmp_path)
    model = ("model=pixart-alpha-xl-2-512", f"model.source={checkpoint}", *TOLD, "metrics.names=[psnr,sqnr]")
    far, near, again = (
        run(tmp_path / name, *model, f"device={device}")
        for name, device in (("far", "second_device"), ("near", "cpu"), ("again", "second_device"))
    )
    assert values(again) == values(far) == about(near)


def test_a_run_that_offloads_is_the_same_run_with_the_same_numbers(second, tmp_path):
    resident, offloaded = (
        run(tmp_path / memory, *DIGITS, "device=second_device", f"memory={memory}")
        for memory in ("resident", "offload")
    )
    assert values(offloaded) == values(resident) and offloaded["run_id"] == resident["run_id"]
    assert offloaded["layers"] == resident["layers"] and offloaded["config"]["memory"] == "offload"


PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention_for_cpu")
LONGER = (
    "protocol.n=8",
    "protocol.steps=4",
)  # each weight is looked at once when it is loaded, and used more often than in `TINY`


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_nearly_all_operations_of_a_whole_run_are_done_on_it(second, method, tmp_path):
    """From loading to the record; text encoders included, whoever asks for them."""
    checkpoint = saved("flux", tmp_path)
    model = ("model=flux.1-dev", f"model.source={checkpoint}", "model.size={height: 16, width: 16}", *TOLD)
    with counted() as operations:
        run(tmp_path, *model, *LONGER, f"method={method}", "metrics.names=[psnr,ssim]", "device=second_device")
    assert operations.share_on_second_device() >= 0.99, operations.report()
    assert not [op for _, op, _ in operations.on_cpu if op in PRODUCTS], operations.report()
