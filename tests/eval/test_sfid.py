"""sFID with random weights in torch-fidelity's file format."""

import pytest
import torch
import torch.nn.functional as F

from ditbench.eval import libraries, sfid
from ditbench.eval.base import evaluate
from ditbench.eval.inception import torch_fidelity_network, torch_fidelity_upstream
from ditbench.eval.weights import find_weights
from ditbench.harness.common.devices import CPU


@pytest.fixture
def network(port_installed):
    return torch_fidelity_network(*find_weights(torch_fidelity_upstream()), CPU)


def test_without_weights_it_is_skipped_with_the_upstream_file(photos):
    entry = evaluate(["adm/sfid"], photos)["adm/sfid"]
    assert entry["status"] == "skipped" and "weights-inception-2015-12-05-6726825d.pth" in entry["reason"]


def test_features_are_the_first_7_channels_of_the_1x1_convolution_of_the_7th_mixed_block_at_17x17(network, photos):
    """mixed, mixed_1, … mixed_6 of TensorFlow's graph, followed block by block."""
    images = photos.generated.images_NHWC
    port = network.network
    entry, entered = {}, port.Mixed_5b.register_forward_hook(lambda _, given, __: entry.update(x=given[0]))
    with torch.no_grad():
        port(images.permute(0, 3, 1, 2).contiguous())
        entered.remove()
        x = entry["x"]
        for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"):  # mixed … mixed_5
            x = getattr(port, block)(x)
        mixed_6 = port.Mixed_6d.branch1x1
        convolved = F.relu(mixed_6.bn(mixed_6.conv(x)))
    assert convolved.shape[1:] == (192, 17, 17)
    expected = convolved.permute(0, 2, 3, 1)[..., :7].reshape(4, -1)
    ours = sfid.spatial_features(images, network)
    assert ours.shape == (4, 2023) and ours.std() > 1e-3
    torch.testing.assert_close(ours, expected)


def test_it_is_the_frechet_distance_of_those_features_to_the_references(network, photos, monkeypatch):
    given = {}

    def distance(generated_NF, reference_MF, seed):
        given.update(generated=generated_NF, reference=reference_MF)
        return 12.5, {}

    monkeypatch.setitem(libraries.FID, "torch_fidelity", distance)
    entry = evaluate(["adm/sfid"], photos)["adm/sfid"]
    assert entry["status"] == "ok", entry["reason"]
    assert entry["value"] == 12.5 and entry["ci95"][0] < 12.5 < entry["ci95"][1] and entry["better"] == "lower"
    torch.testing.assert_close(given["generated"], sfid.spatial_features(photos.generated.images_NHWC, network))
    torch.testing.assert_close(given["reference"], sfid.spatial_features(photos.reference.images_NHWC, network))
    passport = entry["passport"]
    assert "7 channels" in passport["features"] and passport["antialias"] is False and passport["reference"] == "noise"
    assert "sfid" in passport["implementation"] and "reference batch" in passport["reference_moments"]


def test_the_hook_is_taken_off_again(network, photos):
    sfid.spatial_features(photos.generated.images_NHWC.clone(), network)
    assert not network.network.Mixed_6d.branch1x1._forward_hooks
