"""The same metrics through Inception-v3, as papers report them; each library with its own weights file and resizing.

    library          network                              resized to 299×299 by
    torchmetrics     torch-fidelity's port of FID's       bilinear, antialiased (its default since 1.8)
    torch-fidelity   the same weights                     bilinear as in TensorFlow 1, not antialiased
    clean-fid        NVIDIA's TorchScript of the same     PIL bicubic per channel, antialiased, not rounded

None of the three may be compared with another, and none with a number through a judge. Precision and recall are here
in Inception's features, as in ADM's evaluator; torch-fidelity itself would take VGG16's.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditbench.eval.base import Evidence, MetricSkipped, Need
from ditbench.eval.batches import remembered
from ditbench.eval.distribution import View, register
from ditbench.eval.features import (
    Pair,
    channels_first,
    device_of,
    full_precision,
    need_reference,
    pair_of,
    seeded,
)
from ditbench.eval.needs import weights as weights_here
from ditbench.eval.passport import need_samples
from ditbench.eval.weights import CLEAN_FID_FOLDER, Upstream, find_weights
from ditbench.harness.samples.samples import Rows

BATCH = 32
LAYERS = ["2048", "logits_unbiased"]  # pooled features, and class scores without bias as IS wants them

Network = Callable[[Tensor], tuple[Tensor, ...]]  # uint8 (B, 3, H, W) → features, and logits where it has them


def torch_fidelity_upstream() -> Upstream:
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    return Upstream(inception.URL_INCEPTION_V3, Path(torch.hub.get_dir()) / "checkpoints")


def clean_fid_upstream() -> Upstream:
    from cleanfid import downloads_helper

    return Upstream(downloads_helper.inception_url, CLEAN_FID_FOLDER)


port_here: Need = weights_here("Inception's weights (torch-fidelity's port)", "inception-fid", torch_fidelity_upstream)
script_here: Need = weights_here("Inception's weights (NVIDIA's script)", "inception-clean-fid", clean_fid_upstream)


@cache
def torchmetrics_network(weights: Path, sha256: str, device: torch.device) -> nn.Module:
    from torchmetrics.image.fid import NoTrainInceptionV3

    with _loading(weights):
        network = NoTrainInceptionV3("inception-v3-compat", LAYERS, str(weights), antialias=True).to(device)
    return _Called(network, network._torch_fidelity_forward)  # its forward drops all layers but the first


@cache
def torch_fidelity_network(weights: Path, sha256: str, device: torch.device) -> nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with _loading(weights):
        network = FeatureExtractorInceptionV3("inception-v3-compat", LAYERS, str(weights)).to(device)
    return _Called(network, network)


@cache
def clean_fid_network(weights: Path, sha256: str, device: torch.device) -> nn.Module:
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer

    with _loading(weights):
        network = InceptionV3W(str(weights.parent), download=False).to(device)
    resize = build_resizer("clean")

    def features(images_BCHW: Tensor) -> tuple[Tensor]:
        resized = [torch.from_numpy(resize(image.permute(1, 2, 0).cpu().numpy())) for image in images_BCHW]
        return (network(torch.stack(resized).permute(0, 3, 1, 2).to(images_BCHW.device)),)

    return _Called(network, features)


class _Called(nn.Module):
    """A network together with the way it is to be called."""

    def __init__(self, network: nn.Module, call: Network) -> None:
        super().__init__()
        self.network = network
        self.call = call

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        return self.call(images_BCHW)


def inception_view(
    upstream: Callable[[], Upstream],
    here: Need,
    load: Callable[[Path, str, torch.device], nn.Module],
    resize: str,
    antialias: bool,
) -> View:
    def network(device: torch.device) -> nn.Module:
        return load(*find_weights(upstream(), here), device)

    def pair(evidence: Evidence) -> Pair:
        need_samples(evidence, 2)
        need_reference(evidence)  # before the weights are asked for
        inception = network(evidence.device)
        return pair_of(evidence, inception, lambda images_NHWC: _output(images_NHWC, inception, 0))

    def logits(evidence: Evidence) -> Tensor:
        return _output(evidence.generated.images_NHWC, network(evidence.device), 1)

    def origin(evidence: Evidence) -> dict[str, Any]:
        path, sha256 = find_weights(upstream(), here)
        return {
            "weights_sha256": sha256,
            "resize": resize,
            "antialias": antialias,
            "dtype": "float32",
            "features": f"Inception {path.name}",
        }

    return View(pair, logits, origin, needs=(here,))


def _output(images_NHWC: Rows, network: nn.Module, index: int) -> Tensor:
    """Output number `index` (features 0, logits 1); one pass over the images computes all of them."""

    def all_outputs() -> tuple[Tensor, ...]:
        with full_precision():
            batches = [network(batch.to(device_of(network))) for batch in channels_first(images_NHWC, BATCH)]
        return tuple(torch.cat([part.float().cpu() for part in parts]) for parts in zip(*batches, strict=True))

    return remembered(images_NHWC, network, "all outputs", all_outputs)[index]


@contextmanager
def _loading(weights: Path) -> Iterator[None]:
    """Building a network draws random initial weights: keep that from the global state, and explain a bad file."""
    try:
        with seeded(0):
            yield
    except (RuntimeError, KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError, AttributeError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise MetricSkipped(f"{weights}: not Inception's weights ({reason}); delete it and fetch it again") from error


TORCH_FIDELITY_VIEW = inception_view(
    torch_fidelity_upstream, port_here, torch_fidelity_network, "bilinear as TensorFlow 1 to 299", False
)

register(
    {
        "torchmetrics": inception_view(
            torch_fidelity_upstream, port_here, torchmetrics_network, "bilinear to 299", True
        ),
        "torch_fidelity": TORCH_FIDELITY_VIEW,
        "clean_fid": inception_view(
            clean_fid_upstream, script_here, clean_fid_network, "PIL bicubic per channel to 299, not rounded", True
        ),
    },
    "",
    "in Inception's features",
)
