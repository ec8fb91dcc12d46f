"""MLPerf's FID and CLIP score of pictures: against pytorch-fid's way through the layers, scipy's root, and a plain cosine."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import nn

from ditbench.eval import mlperf
from ditbench.eval.base import Evidence, evaluate, evaluate_samples, known_metrics
from ditbench.eval.clip import HUB
from ditbench.eval.inception import torch_fidelity_network
from ditbench.eval.needs import lacking
from ditbench.eval.weights import weights_folder
from ditbench.harness.common.devices import CPU
from ditbench.harness.samples.samples import Prompt, Samples

pytestmark = pytest.mark.usefixtures("no_hub_cache")
WIDTH = 7


def pictures(n: int = 12, side: int = 20) -> torch.Tensor:
    return torch.randint(0, 256, (n, side, side + 3, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


class Small(nn.Module):
    """In Inception's place: WIDTH means of parts of a picture."""

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images_B3HW.float() / 255, (3, 3)).flatten(1)[:, :WIDTH]


@pytest.fixture
def moments() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    rows = random.normal(0.45, 0.1, (40, WIDTH))
    return rows.mean(axis=0), np.cov(rows, rowvar=False)


@pytest.fixture
def installed(moments, monkeypatch):
    weights_folder().mkdir(parents=True)
    np.savez(weights_folder() / mlperf.MOMENTS_FILE, mu=moments[0], sigma=moments[1])
    monkeypatch.setattr(mlperf, "find_weights", lambda *_: (weights_folder() / "inception.pth", "a" * 64))
    monkeypatch.setattr(mlperf, "load_network", lambda *_: Small())
    return weights_folder()


def test_fid_is_the_distance_to_the_files_moments_by_scipys_matrix_root(installed, moments):
    features = Small()(pictures().permute(0, 3, 1, 2)).double().numpy()
    mean, cov = features.mean(axis=0), np.cov(features, rowvar=False)
    root = linalg.sqrtm(cov @ moments[1]).real
    expected = ((mean - moments[0]) ** 2).sum() + np.trace(cov) + np.trace(moments[1]) - 2 * np.trace(root)
    entries, kept = evaluate_samples(["mlperf/fid"], Evidence(Samples(pictures())))
    entry = entries["mlperf/fid"]
    assert entry["status"] == "ok", entry["reason"]
    assert entry["value"] == pytest.approx(expected, rel=1e-6) and entry["n"] == 12 and entry["better"] == "lower"
    assert entry["ci95"][0] < entry["value"] < entry["ci95"][1]
    assert kept["mlperf/fid"].pseudo and kept["mlperf/fid"].values_N.mean() == pytest.approx(entry["value"])
    sha256 = hashlib.sha256((installed / mlperf.MOMENTS_FILE).read_bytes()).hexdigest()
    assert entry["passport"]["reference_sha256"] == sha256 and entry["passport"]["antialias"] is False


def test_inception_is_looked_through_as_pytorch_fid_does(port_weights):
    """Layer by layer, after [0, 1], bilinear to 299 × 299, [−1, 1]; torch-fidelity's own preparation gives other features."""
    network = torch_fidelity_network(port_weights, "a" * 64, CPU)
    images = torch.randint(0, 256, (2, 3, 330, 310), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    i = network.network
    with torch.no_grad():
        x = (
            nn.functional.interpolate(images.float() / 255, size=(299, 299), mode="bilinear", align_corners=False) * 2
            - 1
        )
        x = nn.functional.max_pool2d(i.Conv2d_2b_3x3(i.Conv2d_2a_3x3(i.Conv2d_1a_3x3(x))), 3, 2)
        x = nn.functional.max_pool2d(i.Conv2d_4a_3x3(i.Conv2d_3b_1x1(x)), 3, 2)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = getattr(i, f"Mixed_{name}")(x)
        expected = x.mean(dim=(2, 3))
        ours = mlperf.load_network(port_weights, "a" * 64, CPU)(images)
        as_torch_fidelity = network(images)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert (ours - as_torch_fidelity).abs().max() > 1e-3 * ours.abs().max()


def test_the_clip_score_is_100_cosines_not_cut_off_at_0(judges, judge_folders):
    from ditbench.eval.clip import embed_images, embed_texts, load_clip

    texts = ("a cat", "dogs", "a long road", "b &amp; c")
    given = Evidence(Samples(pictures(4, 40), prompts=tuple(Prompt(text) for text in texts)))
    clip = load_clip(HUB["b32"], CPU)
    cosines = (embed_images(clip, given.generated.pixels) * embed_texts(clip, (*texts[:3], "b & c"))).sum(dim=1)
    assert cosines.min() < 0
    entries, kept = evaluate_samples(["mlperf/clip_score", "clipscore_b32"], given)
    np.testing.assert_allclose(kept["mlperf/clip_score"].values_N, 100 * cosines.numpy(), atol=1e-4)
    assert entries["mlperf/clip_score"]["value"] < entries["clipscore_b32"]["value"], "which counts those below 0 as 0"


@pytest.mark.parametrize(("value", "inside"), [(31.68, False), (31.7, True), (31.8134, False)])
def test_the_window_and_what_it_is_of_stand_in_the_passport(value, inside):
    said = mlperf.window(mlperf.CLIP_WINDOW, value)
    assert said["in_window"] is inside and "SDXL base 1.0" in said["window_of"]
    assert said["window"] == [
        pytest.approx(31.74981837 * 0.998, abs=1e-6),
        pytest.approx(31.74981837 * 1.002, abs=1e-6),
    ]
    low, high = mlperf.FID_WINDOW
    assert (low, high) == (pytest.approx(23.48046692 * 0.98, abs=1e-6), pytest.approx(23.48046692 * 1.02, abs=1e-6))


def test_every_entry_says_its_window(installed, judges):
    given = Evidence(Samples(pictures(4), prompts=(Prompt("a cat"),) * 4))
    for name, entry in evaluate(["mlperf/fid", "mlperf/clip_score"], given).items():
        assert entry["status"] == "ok", entry["reason"]
        low, high = entry["passport"]["window"]
        assert entry["passport"]["in_window"] is (low <= entry["value"] <= high), name


@pytest.mark.parametrize("damage", ["nothing", "html", "no sigma", "another width"])
def test_moments_that_are_not_here_or_damaged_are_skipped_with_the_command(damage, installed, moments):
    path = installed / mlperf.MOMENTS_FILE
    path.unlink()
    if damage == "html":
        path.write_bytes(b"<html>404</html>")
    elif damage == "no sigma":
        np.savez(path, mu=moments[0])
    elif damage == "another width":
        np.savez(path, mu=np.zeros(5), sigma=np.eye(5))
    entry = evaluate(["mlperf/fid"], Evidence(Samples(pictures())))["mlperf/fid"]
    assert entry["status"] == "skipped"
    said = (
        "moments of 5 features, and Inception gives 7"
        if damage == "another width"
        else "`ditbench data fetch mlperf-val2014`"
    )
    assert said in entry["reason"]
    if damage == "nothing":
        assert entry["reason"] in " ".join(lacking(known_metrics()["mlperf/fid"]))
