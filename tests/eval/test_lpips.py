import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from both_devices import same_there
from torch import nn

from ditbench.eval import lpips
from ditbench.eval.base import Evidence, evaluate, known_metrics
from ditbench.eval.weights import Upstream
from ditbench.harness.common.devices import CPU
from ditbench.harness.samples.samples import Samples

METRICS = ["lpips_alex", "lpips_vgg"]


@pytest.fixture(scope="session")
def alexnet_file(tmp_path_factory):
    """Random weights of torchvision's AlexNet in torchvision's file format, the hash in its name as upstream has it."""
    from torchvision.models import alexnet

    folder = tmp_path_factory.mktemp("alexnet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = alexnet(weights=None).features
    torch.save({f"features.{name}": tensor for name, tensor in features.state_dict().items()}, folder / "weights.pth")
    sha256 = hashlib.sha256((folder / "weights.pth").read_bytes()).hexdigest()
    return (folder / "weights.pth").rename(folder / f"alexnet-{sha256[:8]}.pth")


@pytest.fixture
def installed(alexnet_file, monkeypatch):
    upstream = Upstream(f"https://example.invalid/{alexnet_file.name}", alexnet_file.parent)
    monkeypatch.setattr(lpips, "backbone_upstream", lambda backbone: upstream)
    return alexnet_file


@pytest.fixture(scope="module")
def pairs() -> Evidence:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 5, 64, 70, 3), dtype=np.uint8))
    images[0] = images[1] // 2 + images[0] // 2
    return Evidence(Samples(images[0]), Samples(images[1]), resamples=20)


class Network(nn.Module):
    """A small random LPIPS: one convolution, its features at unit length, weighted squared differences."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.convolution = nn.Conv2d(3, 8, 5)
            self.weight_8 = torch.rand(8)

    def forward(self, ours, theirs):
        a, b = (nn.functional.normalize(self.convolution(x), dim=1) for x in (ours, theirs))
        return ((a - b) ** 2 * self.weight_8[:, None, None]).sum(dim=1).mean(dim=(1, 2))[:, None, None, None]


def test_both_are_paired_and_lower_is_better():
    assert all(known_metrics()[name].paired and known_metrics()[name].better == "lower" for name in METRICS)


@pytest.mark.parametrize(
    ("name", "file"), [("lpips_alex", "alexnet-owt-7be5be79.pth"), ("lpips_vgg", "vgg16-397923af.pth")]
)
def test_without_the_backbones_weights_it_is_skipped_with_file_and_command(name, file, pairs):
    entry = evaluate([name], pairs)[name]
    assert entry["status"] == "skipped" and entry["value"] is None
    assert file in entry["reason"] and f"ditbench data fetch {name.replace('_', '-')}" in entry["reason"]


def test_the_value_is_torchmetrics_own_with_the_same_backbone(installed, pairs, monkeypatch):
    from torchmetrics.functional.image import lpips as theirs
    from torchvision.models import alexnet

    model = alexnet(weights=None)
    model.load_state_dict(torch.load(installed), strict=False)
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda net, pretrained: model.features)
    images, float_images = (
        samples.pixels.permute(0, 3, 1, 2) / 255.0 for samples in (pairs.generated, pairs.float_model)
    )
    expected = theirs.learned_perceptual_image_patch_similarity(images, float_images, "alex", normalize=True)
    entry = evaluate(["lpips_alex"], pairs)["lpips_alex"]
    assert entry["status"] == "ok", entry["reason"]
    assert entry["value"] == pytest.approx(float(expected), rel=1e-5) and entry["value"] > 0.01
    assert entry["n"] == 5 and entry["ci95"][0] < entry["value"] < entry["ci95"][1]
    assert entry["passport"]["weights_sha256"] == hashlib.sha256(installed.read_bytes()).hexdigest()


def test_images_reach_the_network_between_minus_one_and_one_with_channels_first(pairs):
    seen = []

    def network(ours, theirs):
        seen.append((ours, theirs))
        return torch.zeros(len(ours))

    black_and_white = torch.zeros(2, 4, 5, 3, dtype=torch.uint8)
    black_and_white[1] = 255
    lpips.distances(network, black_and_white, black_and_white.flip(0), CPU)
    ((ours, theirs),) = seen
    assert ours.shape == (2, 3, 4, 5) and torch.equal(ours, theirs.flip(0))
    assert ours[0].unique().tolist() == [-1.0] and ours[1].unique().tolist() == [1.0]


def test_batches_change_nothing_and_equal_images_are_at_distance_zero(pairs, monkeypatch):
    network, (ours, theirs) = Network(), (pairs.generated.pixels, pairs.float_model.pixels)
    whole = lpips.distances(network, ours, theirs, CPU)
    monkeypatch.setattr(lpips, "BATCH", 2)
    torch.testing.assert_close(lpips.distances(network, ours, theirs, CPU), whole)
    assert whole.min() > 1e-3 and lpips.distances(network, ours, ours, CPU).abs().max() == 0


def test_a_videos_distance_is_the_mean_over_its_frames(pairs):
    ours, theirs = pairs.generated.pixels[:4], pairs.float_model.pixels[:4]
    frames = lpips.distances(Network(), ours, theirs, CPU)
    videos = lpips.distances(Network(), ours.reshape(2, 2, 64, 70, 3), theirs.reshape(2, 2, 64, 70, 3), CPU)
    torch.testing.assert_close(videos, frames.reshape(2, 2).mean(dim=1))


def test_images_too_small_for_the_backbone_are_skipped_before_weights_are_asked_for(pairs):
    small = Samples(pairs.generated.pixels[:, :30, :30])
    entry = evaluate(["lpips_alex"], Evidence(small, small))["lpips_alex"]
    assert entry["status"] == "skipped" and "31 pixels" in entry["reason"] and "got 30" in entry["reason"]


@pytest.mark.parametrize("backbone", lpips.SMALLEST)
def test_the_smallest_size_is_the_smallest_that_the_backbone_takes(backbone):
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    network, side = _NoTrainLpips(net=backbone, pnet_rand=True), lpips.SMALLEST[backbone]
    image = torch.zeros(1, 3, side, side)
    assert torch.isfinite(network(image, image)).all()
    with pytest.raises(RuntimeError):
        network(image[..., 1:, 1:], image[..., 1:, 1:])


def test_a_file_that_is_not_the_backbone_is_skipped_with_its_path(tmp_path, pairs, monkeypatch):
    torch.save({"something": torch.zeros(1)}, tmp_path / "alexnet.pth")
    upstream = Upstream("https://example.invalid/alexnet.pth", tmp_path)
    monkeypatch.setattr(lpips, "backbone_upstream", lambda backbone: upstream)
    entry = evaluate(["lpips_alex"], pairs)["lpips_alex"]
    assert entry["status"] == "skipped" and str(tmp_path / "alexnet.pth") in entry["reason"]


def test_loading_leaves_the_global_random_state_alone(installed):
    before = torch.get_rng_state()
    lpips.load_network.cache_clear()
    lpips.load_network("alex", installed, "0", CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_computes_on_the_runs_device(second, installed, pairs):
    few = [Samples(samples.pixels[:2]) for samples in (pairs.generated, pairs.float_model)]
    same_there(["lpips_alex"], replace(pairs, generated=few[0], float_model=few[1]), second)
