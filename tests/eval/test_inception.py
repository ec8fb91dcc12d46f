"""The Inception path with random weights in the libraries' own file formats; images are larger than 299 pixels,
so that every resize has something to do."""

import hashlib
import os

import pytest
import torch
from PIL import Image
from torch import nn

from ditbench.eval import inception
from ditbench.eval.base import Evidence, evaluate, known_metrics
from ditbench.harness.common.devices import CPU

INCEPTION_METRICS = [
    "clean_fid/fid", "clean_fid/kid", "torch_fidelity/fid", "torch_fidelity/is", "torch_fidelity/kid",
    "torch_fidelity/precision", "torch_fidelity/recall", "torchmetrics/fid", "torchmetrics/is", "torchmetrics/kid",
]  # fmt: skip


class StandIn(nn.Module):
    """NVIDIA's TorchScript file as clean-fid uses it: `.layers` maps (B, 3, 299, 299) to 2,048 features."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.AvgPool2d(13), nn.Flatten(), nn.Linear(3 * 23 * 23, 2048))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.fixture
def clean_fid_installed(tmp_path, monkeypatch):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        scripted = torch.jit.script(StandIn())
    path = tmp_path / "inception-2015-12-05.pt"
    scripted.save(str(path))
    monkeypatch.setenv("DITBENCH_WEIGHTS", str(tmp_path))
    return path


def scored(name: str, evidence: Evidence) -> dict:
    entry = evaluate([name], evidence)[name]
    assert entry["status"] == "ok", entry["reason"]
    return entry


def test_the_names_are_those_promised():
    libraries = ("torchmetrics/", "torch_fidelity/", "clean_fid/")
    names = [name for name in known_metrics() if name.startswith(libraries) and "_judge" not in name]
    assert names == sorted([*INCEPTION_METRICS, *(f"{library}fid_to_float" for library in libraries)])


@pytest.mark.parametrize("name", INCEPTION_METRICS)
def test_without_weights_it_is_skipped_with_the_upstream_file_and_where_to_put_it(name, photos):
    entry = evaluate([name], photos)[name]
    file = "inception-2015-12-05.pt" if "clean_fid" in name else "weights-inception-2015-12-05-6726825d.pth"
    assert entry["status"] == "skipped" and entry["value"] is None
    assert f"put {file} from https://" in entry["reason"] and os.environ["DITBENCH_WEIGHTS"] in entry["reason"]


def test_torchmetrics_is_called_with_antialias_and_gives_the_librarys_own_features(port_installed, photos):
    from torchmetrics.image.fid import FrechetInceptionDistance

    path = str(port_installed)
    entry = scored("torchmetrics/kid", photos)
    ours = inception._output(photos.generated.images_NHWC, inception.torchmetrics_network(*weights(), CPU), 0)
    images_NCHW = photos.generated.images_NHWC.permute(0, 3, 1, 2)
    with torch.no_grad():
        theirs, jagged = (
            FrechetInceptionDistance(2048, feature_extractor_weights_path=path, antialias=on).inception(images_NCHW)
            for on in (True, False)
        )
    torch.testing.assert_close(ours, theirs)
    assert (jagged - theirs).abs().max() > 0.05 * theirs.abs().max()
    assert entry["passport"]["antialias"] is True
    assert entry["passport"]["weights_sha256"] == hashlib.sha256(port_installed.read_bytes()).hexdigest()


def test_torch_fidelity_gives_the_value_of_its_own_calculate_metrics(port_installed, photos):
    from torch_fidelity import calculate_metrics

    class Images(torch.utils.data.Dataset):
        def __init__(self, images_NHWC):
            self.images = images_NHWC.permute(0, 3, 1, 2)

        def __len__(self):
            return len(self.images)

        def __getitem__(self, index):
            return self.images[index]

    theirs = calculate_metrics(
        input1=Images(photos.generated.images_NHWC), input2=Images(photos.reference.images_NHWC), cuda=False,
        kid=True, isc=True, prc=True, isc_splits=1, kid_subset_size=4, rng_seed=0, verbose=False, save_cpu_ram=True,
        cache=False, feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(port_installed),
    )  # fmt: skip
    assert scored("torch_fidelity/kid", photos)["value"] == pytest.approx(
        theirs["kernel_inception_distance_mean"], rel=1e-3
    )
    assert scored("torch_fidelity/is", photos)["value"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert scored("torch_fidelity/precision", photos)["value"] == theirs["precision"]
    assert scored("torch_fidelity/recall", photos)["value"] == theirs["recall"]
    assert scored("torch_fidelity/is", photos)["passport"]["antialias"] is False


def test_fid_in_2048_features_has_an_interval_and_says_that_images_are_few(port_installed, photos):
    entry = scored("torch_fidelity/fid", photos)
    assert entry["value"] > 0 and entry["ci95"][0] < entry["value"] < entry["ci95"][1]
    assert "2048" in entry["passport"]["note"] and entry["passport"]["ci_method"].startswith("Student's t")


def test_clean_fid_resizes_as_its_own_folder_reader_does(clean_fid_installed, photos, tmp_path):
    from cleanfid.fid import get_files_features
    from cleanfid.inception_torchscript import InceptionV3W

    files = [str(tmp_path / f"{index}.png") for index in range(4)]
    for file, image in zip(files, photos.generated.images_NHWC.numpy(), strict=True):
        Image.fromarray(image).save(file)
    network = InceptionV3W(str(tmp_path), download=False)
    theirs = get_files_features(files, network, num_workers=0, device=torch.device("cpu"), mode="clean", verbose=False)
    entry = scored("clean_fid/kid", photos)
    path = clean_fid_installed
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    ours = inception._output(photos.generated.images_NHWC, inception.clean_fid_network(path, sha256, CPU), 0)
    torch.testing.assert_close(ours, torch.from_numpy(theirs))
    assert entry["passport"]["weights_sha256"] == sha256 and entry["passport"]["resize"].startswith("PIL bicubic")


def test_a_file_that_is_not_torchscript_is_skipped_with_its_path(clean_fid_installed, photos):
    clean_fid_installed.write_bytes(b"<html>404</html>")
    entry = evaluate(["clean_fid/kid"], photos)["clean_fid/kid"]
    assert entry["status"] == "skipped" and str(clean_fid_installed) in entry["reason"]


def test_loading_a_network_leaves_the_global_random_state_alone(port_installed):
    before = torch.get_rng_state()
    inception.torch_fidelity_network.cache_clear()
    inception.torch_fidelity_network(*weights(), CPU)
    assert torch.equal(torch.get_rng_state(), before)


def weights():
    return inception.find_weights(inception.torch_fidelity_upstream())
