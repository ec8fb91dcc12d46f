"""FVD to the float model through a small scripted network that is called as I3D is."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from both_devices import same_there
from scipy.linalg import sqrtm
from torch import nn

from ditbench.eval import frechet, fvd
from ditbench.eval.base import Evidence, evaluate, known_metrics
from ditbench.eval.data import find_data
from ditbench.eval.influence import spread
from ditbench.eval.passport import FLOAT_MODEL
from ditbench.eval.statistics import student
from ditbench.harness.samples.samples import Samples

N, FRAMES, WIDTH = 9, 12, 5


class SmallI3D(nn.Module):
    """Mean colour per half of the video and how it changes, mixed; refuses any other call than StyleGAN-V's."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(6, WIDTH)

    def forward(self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False):
        assert rescale and resize and return_features and x.size(1) == 3 and x.dtype == torch.float32
        half = x.size(2) // 2
        return self.mix(torch.cat([x[:, :, :half].mean([2, 3, 4]), x[:, :, half:].mean([2, 3, 4])], 1) / 255 * 2 - 1)


@pytest.fixture
def installed(monkeypatch, tmp_path):
    path = find_data("i3d-kinetics400").path
    path.parent.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.jit.script(SmallI3D()).save(path)
    return path


def videos(n: int = N, frames: int = FRAMES, seed: int = 0, level: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    hue = torch.randint(0, 150, (n, 1, 1, 1, 3), generator=random)
    return (hue + torch.randint(0, 80, (n, frames, 6, 7, 3), generator=random) + level).to(torch.uint8)


def evidence(frames: int = FRAMES, n: int = N) -> Evidence:
    return Evidence(Samples(videos(n, frames, 0, 20)), Samples(videos(n, frames, 1)), resamples=30)


def entry_of(given: Evidence) -> dict:
    return evaluate(["fvd_to_float"], given)["fvd_to_float"]


def features(path, pixels: torch.Tensor) -> np.ndarray:
    network = torch.jit.load(path)
    with torch.no_grad():
        return network(pixels.permute(0, 4, 1, 2, 3).float(), rescale=True, resize=True, return_features=True).numpy()


def test_it_is_the_frechet_distance_of_the_features_of_both_sets(installed):
    given = evidence()
    x, y = (features(installed, s.pixels).astype(np.float64) for s in (given.generated, given.float_model))
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    gap = x.mean(0) - y.mean(0)
    expected = gap @ gap + np.trace(cov_x + cov_y - 2 * sqrtm(cov_x @ cov_y).real)
    entry = entry_of(given)
    assert entry["value"] == pytest.approx(expected, rel=1e-3) and expected > 1e-3
    assert entry["n"] == N and entry["paired"] and known_metrics()["fvd_to_float"].better == "lower"


def test_its_interval_counts_both_videos_of_a_pair(installed):
    given = evidence()
    entry = entry_of(given)
    influence = frechet.influence_of_pairs(
        features(installed, given.generated.pixels), features(installed, given.float_model.pixels)
    )
    expected = student(entry["value"], spread(influence, np.zeros(N, int)))
    assert entry["ci95"][1] == pytest.approx(expected[1], rel=1e-3) and "pairs" in entry["passport"]["ci_method"]


def test_the_same_videos_are_at_distance_zero(installed):
    given = evidence()
    same = replace(given, float_model=Samples(given.generated.pixels.clone()))
    assert entry_of(same)["value"] == pytest.approx(0, abs=1e-3)


def test_the_passport_names_frames_resize_network_and_the_float_model(installed):
    passport = entry_of(evidence())["passport"]
    assert passport["frames"] == FRAMES and "224" in passport["resize"] and "I3D" in passport["features"]
    assert passport["reference"] == FLOAT_MODEL and len(passport["weights_sha256"]) == 64
    assert "torch-fidelity" in passport["version"] and "fvd" in passport["implementation"]


def test_batches_do_not_move_the_features(installed, monkeypatch):
    one = fvd.i3d_features(videos(), torch.jit.load(installed))
    monkeypatch.setattr(fvd, "BATCH", 2)
    torch.testing.assert_close(fvd.i3d_features(videos(), torch.jit.load(installed)), one)


def test_without_weights_it_is_skipped_with_the_command():
    entry = entry_of(evidence())
    assert entry["status"] == "skipped" and "`ditbench data fetch i3d-kinetics400`" in entry["reason"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (evidence(frames=9), "10 or more frames, these have 9"),
        (evidence(n=1), "needs 2 or more"),
        (Evidence(Samples(videos())), "no samples of the float model"),
        (Evidence(Samples(videos()[:, 0]), Samples(videos()[:, 0])), "these are images"),
    ],
)
def test_what_it_cannot_look_at_is_skipped_with_the_reason(given, reason, installed):
    assert reason in entry_of(given)["reason"]


def test_a_file_that_is_no_torchscript_is_skipped_with_what_to_do(installed):
    installed.write_bytes(b"<html>404</html>")
    assert "delete it" in entry_of(evidence())["reason"]


def test_i3d_looks_on_the_runs_device(second, installed):
    """A few numbers per video make up this small network; the distance, on the CPU, is most of the arithmetic."""
    same_there(["fvd_to_float"], evidence(), second, least=0.5)
