"""What only a CUDA device can show; skipped without one (`pytest -m gpu`, bench/gpu.sh)."""

import pytest
import torch

from ditbench.harness.cli import main
from ditbench.harness.records.attempts import read_all
from ditbench.harness.records.drawn_samples import samples_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

TINY = [
    "protocol.n=4",
    "protocol.steps=2",
    "calibration.n=2",
    "metrics.resamples=5",
    "generate.noise_floor_seeds=0",
    "measure.repeats=3",
    "measure.warmup=1",
    "tracker=none",
]


def run_on(device, folder, *overrides):
    assert main(["run", f"device={device}", f"results_dir={folder}", *TINY, *overrides]) == 0
    return read_all(folder)


@pytest.mark.parametrize("method", ["rtn", "smoothquant", "quarot", "ptq4dit"])
def test_a_quantized_run_on_cuda_is_recorded_with_its_device(tmp_path, method):
    (record,) = run_on("cuda", tmp_path, f"method={method}", "bits=w4a8")
    assert record.status == "ok" and torch.cuda.get_device_name() in record.efficiency["device"]


def test_the_float_model_draws_the_same_images_on_both_devices(tmp_path):
    images = []
    for device in ("cuda", "cpu"):
        (record,) = run_on(device, tmp_path / device, "method=fp", "generate.dtype=float32")
        images.append(samples_of(record).images_NHWC[:].int())
    assert (images[0] - images[1]).abs().float().mean() < 1.0  # of 255: float32 kernels differ in their last bits
