"""sFID: the Fréchet distance in features that still know where things are (Nash et al. 2021, arXiv:2103.03841).

As ADM's evaluator computes it (Dhariwal & Nichol 2021, arXiv:2105.05233; guided-diffusion, evaluations/evaluator.py):
the first 7 channels of Inception's `mixed_6/conv` at all 17×17 places, 2,023 numbers per image, in TensorFlow 1's
resizing. `mixed_6/conv` is the 1×1 branch of the block that torch-fidelity's port of the same weights calls Mixed_6d.

Departs from ADM: moments of the reference come from the images of the reference batch. ADM's evaluator takes those
of the whole training set where the .npz stores them (`mu_s`, `sigma_s`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ditbench.eval import distribution
from ditbench.eval.base import Evidence, Measurement, metric
from ditbench.eval.batches import remembered
from ditbench.eval.features import channels_first, device_of, full_precision, need_reference, pair_of
from ditbench.eval.inception import BATCH, port_here, torch_fidelity_network, torch_fidelity_upstream
from ditbench.eval.passport import need_samples
from ditbench.eval.weights import find_weights
from ditbench.harness.samples.samples import Rows

CHANNELS = 7


@metric("adm/sfid", better="lower", asks=("reference",), needs=(port_here,))
def sfid(evidence: Evidence) -> Measurement:
    """Fréchet distance to the reference in Inception's spatial features, as ADM's evaluator defines sFID."""
    measured = distribution.fid("torch_fidelity", _SPATIAL, evidence)
    return replace(measured, passport=measured.passport | {"implementation": "ditbench sfid after ADM's evaluator"})


def spatial_features(images_NHWC: Rows, network: nn.Module) -> Tensor:
    """(N, 17 · 17 · 7), row by row of the feature map; network: eval.inception.torch_fidelity_network's."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Tensor, ...], output_BChw: Tensor) -> None:
        seen.append(output_BChw[:, :CHANNELS].permute(0, 2, 3, 1).flatten(1).float().cpu())

    def all_batches() -> Tensor:
        hook = network.get_submodule("network.Mixed_6d.branch1x1").register_forward_hook(keep)
        try:
            with full_precision():
                for batch in channels_first(images_NHWC, BATCH):
                    network(batch.to(device_of(network)))
        finally:
            hook.remove()
        return torch.cat(seen)

    return remembered(images_NHWC, network, "spatial", all_batches)


def _pair(evidence: Evidence) -> Any:
    need_samples(evidence, 2)
    need_reference(evidence)  # before the weights are asked for
    network = torch_fidelity_network(*find_weights(torch_fidelity_upstream(), port_here), evidence.device)
    # A Pair is known by its network, and the whole network stands for its pooled features: its branch for these.
    branch = network.get_submodule("network.Mixed_6d.branch1x1")
    return pair_of(evidence, branch, lambda images_NHWC: spatial_features(images_NHWC, network))


def _no_logits(evidence: Evidence) -> Tensor:
    raise NotImplementedError("sFID is a distance of features")


def _origin(evidence: Evidence) -> dict[str, Any]:
    path, sha256 = find_weights(torch_fidelity_upstream(), port_here)
    return {
        "weights_sha256": sha256,
        "resize": "bilinear as TensorFlow 1 to 299",
        "antialias": False,
        "dtype": "float32",
        "features": f"Inception {path.name}, mixed_6/conv, {CHANNELS} channels",
    }


_SPATIAL = distribution.View(_pair, _no_logits, _origin)
