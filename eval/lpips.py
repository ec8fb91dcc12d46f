"""LPIPS to the float model: how different a person would find two images (Zhang et al. 2018, arXiv:1801.03924, eq. 1).

    d(x, y) = Σ_l mean_hw ‖ w_l ⊙ (f_l(x) − f_l(y)) ‖²,   f_l: layer l's features, scaled to unit length over channels

The code and the learned w_l are torchmetrics'. The backbone's ImageNet weights are torchvision's and belong where
torchvision keeps them; nothing is downloaded here. Images are compared at their own size.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ditbench.eval.base import Evidence, Measurement, MetricSkipped, Need, metric
from ditbench.eval.features import full_precision, seeded
from ditbench.eval.fidelity import frame_pairs, paired_measurement, pixel_pairs, unit_range
from ditbench.eval.needs import weights as weights_here
from ditbench.eval.weights import Upstream, local_weights, weights_folder
from ditbench.harness.samples.samples import Rows

Backbone = Literal["alex", "vgg"]

BATCH = 16
SMALLEST: dict[Backbone, int] = {
    "alex": 31,
    "vgg": 16,
}  # pixels a side: below, the backbone's last pooling has nothing left to pool

HELD: dict[Backbone, int] = {"alex": 95, "vgg": 860}  # bytes per value of an image while it is compared, measured

Network = Callable[[Tensor, Tensor], Tensor]  # two batches (B, 3, H, W) in [−1, 1] → B distances, of any shape


def backbone_upstream(backbone: Backbone) -> Upstream:
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    url = {"alex": AlexNet_Weights.DEFAULT, "vgg": VGG16_Weights.DEFAULT}[backbone].url
    return Upstream(url, Path(torch.hub.get_dir()) / "checkpoints")


def _here(backbone: Backbone) -> Need:
    return weights_here(f"{backbone}'s ImageNet weights", f"lpips-{backbone}", lambda: backbone_upstream(backbone))


@metric("lpips_alex", better="lower", paired=True, needs=(_here("alex"),))
def lpips_alex(evidence: Evidence) -> Measurement:
    """LPIPS (AlexNet) to the float model's image, mean of the per-sample values (of a video: of its frames)."""
    return lpips(evidence, "alex")


@metric("lpips_vgg", better="lower", paired=True, needs=(_here("vgg"),))
def lpips_vgg(evidence: Evidence) -> Measurement:
    """LPIPS (VGG-16) to the float model's image, mean of the per-sample values (of a video: of its frames)."""
    return lpips(evidence, "vgg")


def lpips(evidence: Evidence, backbone: Backbone) -> Measurement:
    pixels_N, float_N = pixel_pairs(evidence)
    side, smallest = min(pixels_N.shape[-3:-1]), SMALLEST[backbone]
    if side < smallest:
        raise MetricSkipped(f"LPIPS with {backbone} needs images of {smallest} pixels or more a side, got {side}")
    path, sha256 = _weights(backbone)
    network = load_network(backbone, path, sha256, evidence.device)
    values_N = distances(network, pixels_N, float_N, evidence.device, HELD[backbone])
    settings = {"weights_sha256": sha256, "dtype": "float32", "backbone": f"{backbone} {path.name}", "heads": "v0.1"}
    return paired_measurement(evidence, f"torchmetrics lpips {backbone}", "torchmetrics", values_N, settings)


def distances(network: Network, pixels_N: Rows, float_N: Rows, device: torch.device, held: int = HELD["vgg"]) -> Tensor:
    """One distance per row of uint8 images (N, H, W, 3), or the mean over frames of videos (N, F, H, W, 3)."""
    values = []
    with torch.no_grad(), full_precision():
        for batch, float_batch in frame_pairs(device, pixels_N, float_N, held, BATCH):
            ours, theirs = 2 * unit_range(batch) - 1, 2 * unit_range(float_batch) - 1
            values.append(network(ours, theirs).flatten().cpu())
    return torch.cat(values).reshape(len(pixels_N), -1).mean(dim=1)


@cache
def load_network(backbone: Backbone, weights: Path, sha256: str, device: torch.device) -> nn.Module:
    """torchmetrics' network with its own heads and the backbone's weights from the file."""
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    with seeded(0):  # the backbone is drawn at random before it is filled
        network = _NoTrainLpips(net=backbone, pnet_rand=True)
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        for part in network.net.children():
            for index, layer in part.named_children():
                layer.load_state_dict({key: state[f"features.{index}.{key}"] for key in layer.state_dict()})
    except (RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise MetricSkipped(f"{weights}: not {backbone}'s weights ({error}); delete it and fetch it again") from error
    return network.eval().to(device)


def _weights(backbone: Backbone) -> tuple[Path, str]:
    upstream = backbone_upstream(backbone)
    found = local_weights(upstream)
    if found is None:
        raise MetricSkipped(
            f"{backbone}'s ImageNet weights are not here; `ditbench data fetch lpips-{backbone}`, or put "
            f"{upstream.file_name} from {upstream.url} into {weights_folder()}"
        )
    return found
