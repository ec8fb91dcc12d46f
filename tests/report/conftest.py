"""Fake runs, true to the schema, written with harness.record.write; and a headless Chromium that is offline."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditbench.eval.base import PerSample
from ditbench.harness.quant.spec import label_bits
from ditbench.harness.records import sample_values
from ditbench.harness.records.attempts import attempt
from ditbench.harness.records.record import Record

PARTS = ("attn1.to_q", "attn1.to_out.0", "ff.net.2")
LAYERS = [f"transformer_blocks.{block}.{part}" for block in range(4) for part in PARTS]


def metric_entry(value, half=None, *, better="higher", paired=True, unit="", floor=None, n=64, reason=None):
    return {
        "value": value,
        "ci95": None if half is None or value is None else [value - half, value + half],
        "n": n if value is not None else 0,
        "better": better,
        "paired": paired,
        "unit": unit,
        "noise_floor": floor,
        "status": "skipped" if value is None else "ok",
        "reason": reason,
        "passport": {} if value is None else {"implementation": "test", "version": "1.0", "resize": None},
    }


def fid_entry(value, floor=4.0, **kwargs):
    return metric_entry(value, 1.5, better="lower", paired=False, floor=floor, **kwargs)


@pytest.fixture
def metric():
    """metric(value, half width of the interval, …) → an entry of a record's metrics."""
    return metric_entry


@pytest.fixture
def fid():
    """fid(value, noise floor, …) → an entry of a metric that is unpaired and better when lower."""
    return fid_entry


@pytest.fixture
def results_dir(tmp_path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def add_run(results_dir):
    """add_run("rtn", "W4A8", metrics={…}, …) writes one record with its images and returns it.

    tested: values per sample lie beside it that tell any two runs apart whose numbers are not the same.
    """

    def add(
        method,
        bits="W4A8",
        *,
        metrics=None,
        experiment="demo",
        stress=None,
        measured=False,
        error=None,
        tested=True,
        seed=0,
        labels="balanced",
        **more,
    ):
        efficiency = more.pop("efficiency", {})  # what differs from the usual
        weight_bits, act_bits = (int(part) for part in label_bits(bits))
        config = {
            "method": {"name": method, **more},
            "bits": {"label": bits},
            "model": {"name": "tiny-dit", "stress": stress, "note": "toy model"},
            "protocol": {"name": "digits-fast", "n": 64, "steps": 10, "guidance": 1.5, "labels": labels},
            "seed": seed,
        }
        run_id = hashlib.sha256(repr((config, experiment)).encode()).hexdigest()[:12]
        is_float = method == "fp"
        clock = {"median": 52.0 - weight_bits, "p10": 50.0 - weight_bits, "p90": 55.0 - weight_bits}
        record = Record(
            run_id=run_id,
            status="failed" if error else "ok",
            error=error,
            config=config,
            method=method,
            model="tiny-dit",
            experiment=experiment,
            env={
                "git": "0123456789abcdef0123456789abcdef01234567-dirty",
                "ditbench": "0.1.0",
                "packages": {"torch": "2.13.0", "diffusers": "0.39.0", "clean-fid": None},
                "device": "cpu",
                "started_at": "2026-11-20T10:00:00",
            },
        )
        with attempt(results_dir, experiment, run_id) as this:
            folder = this.folder
            if not error:
                record.bits = {
                    "label": bits,
                    "weight_bits_effective": weight_bits + 0.25,
                    "act_bits_effective": float(act_bits),
                    "mac_share_quantized": 0.0 if is_float else 0.97,
                    "float_layers": ["proj_out"],
                }
                record.metrics = metrics if metrics is not None else {"psnr": metric_entry(25.0, 0.5, unit="dB")}
                record.efficiency = {
                    "kind": "measured" if measured or is_float else "simulated",
                    "backend": "onednn_int8" if measured else "simulate",
                    "device": "cpu (2 cores)",
                    "latency_ms": clock if measured or is_float else None,
                    "baseline_latency_ms": {"median": 60.0, "p10": 58.0, "p90": 63.0} if measured else None,
                    "speedup": 60.0 / clock["median"] if measured else None,
                    "model_bytes": int(1.5e6 * weight_bits / 16 + 8e4),
                    "baseline_model_bytes": 1_580_000,
                    "compression": 1_580_000 / int(1.5e6 * weight_bits / 16 + 8e4),
                    "peak_memory_bytes": None,
                } | efficiency
                record.timings_s = {"calibrate": 1.5, "quantize": 0.75, "generate": 9.0}
                if not is_float:
                    record.layers = {name: _layer(i, method, weight_bits, act_bits) for i, name in enumerate(LAYERS)}
                record.artifacts = {"grid": "grid.png", "float_grid": "float_grid.png"}
                if tested:
                    sample_values.save(
                        sample_values.Values(beside(record.metrics), {}, f"seed {seed}"), folder / "per_sample.npz"
                    )
                    record.artifacts["per_sample"] = "per_sample.npz"
                if not is_float:
                    decibels = np.arange(3 * len(LAYERS), dtype=np.float32).reshape(len(LAYERS), 3)
                    np.savez(folder / "layer_errors.npz", names=LAYERS, steps=[0, 9, 19], sqnr_db=decibels)
                    record.artifacts["layer_errors"] = "layer_errors.npz"
                _grid(folder / "grid.png", run_id)
                _grid(folder / "float_grid.png", "float")
            this.publish(record, force=True)
        return record

    return add


@pytest.fixture
def sweep(add_run, results_dir):
    """Two models (one stressed), three methods, three bits; one run inside the noise floor, one failed, one skip."""
    no_clean_fid = "pip install clean-fid"
    for stress in (None, "outliers x32"):
        loss = 6.0 if stress else 0.0
        add_run("fp", "W16A16", stress=stress, metrics=_metrics(None, 30.0, 0.985, no_clean_fid))
        for bits, base in (("W8A8", 38.0), ("W4A8", 27.0), ("W4A4", 19.0)):
            for place, method in enumerate(("rtn", "balance", "hadamard")):
                if (method, bits, stress) == ("balance", "W4A4", "outliers x32"):
                    why = "RuntimeError: blocks.0.attn1.to_q saw no calibration batch"
                    add_run(method, bits, stress=stress, error=why)
                    continue
                psnr = base - loss + 1.7 * place
                score = 30.0 + max(38.0 - psnr, 0) * 1.3 - 0.4 * place
                metrics = _metrics(psnr, score, 0.985 - max(30 - psnr, 0) * 0.02, no_clean_fid)
                add_run(method, bits, stress=stress, measured=bits == "W8A8" and not stress, metrics=metrics)
    return results_dir


@pytest.fixture(scope="session")
def browser():
    """Chromium, or playwright's own; missing is a skip here and a failure in CI."""
    sync_api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_api.sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        except sync_api.Error as error:
            if os.environ.get("CI") == "true":
                pytest.fail(f"CI has no browser to open the report with: {error}")
            pytest.skip("no Chromium here; install chromium, or run 'playwright install chromium'")
        yield chromium
        chromium.close()


def beside(metrics):
    """Values per sample of these entries, all spread alike, so that every difference is found."""
    spread_N = np.sin(np.arange(64))
    return {
        name: PerSample(entry["value"] + 0.01 * (spread_N - spread_N.mean()))
        for name, entry in metrics.items()
        if entry["value"] is not None
    }


def _metrics(psnr, score, accuracy, skip_reason):
    paired = {}
    if psnr is not None:  # the float row is not compared with itself
        paired = {"psnr": metric_entry(psnr, 0.6, unit="dB"), "ssim": metric_entry(1 - 2.2 / psnr, 0.011)}
        paired["sqnr"] = metric_entry(psnr - 8, 0.6, unit="dB")
    return {
        "torchmetrics/fid_judge": fid_entry(score),
        **paired,
        "torch_fidelity/precision_judge": metric_entry(min(0.99, 0.6 + accuracy / 3), 0.03, paired=False, floor=0.05),
        "accuracy": metric_entry(accuracy, 0.02, paired=False, floor=0.015),
        "clean_fid/fid": metric_entry(None, better="lower", paired=False, reason=skip_reason),
    }


def _layer(place, method, weight_bits, act_bits):
    sqnr = 4.0 * min(weight_bits, act_bits) + 3 * (place % 3) + 2 * len(method) - place
    return {"sqnr_db": float(sqnr), "backend": "simulate", "weight_bits": weight_bits, "act_bits": act_bits}


def _grid(path: Path, seed: str) -> None:
    tint = hashlib.sha256(seed.encode()).digest()
    image = Image.new("RGB", (128, 128), "white")
    for x in range(8):
        for y in range(8):
            shade = (tint[x] ^ (y * 30)) % 256
            image.paste((shade, tint[y], 255 - shade // 2), (16 * x + 1, 16 * y + 1, 16 * x + 15, 16 * y + 15))
    image.save(path)
