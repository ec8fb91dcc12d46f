"""FVD to the float model: the Fréchet distance in what I3D sees of whole videos (Unterthiner et al. 2018, arXiv:1812.01717).

I3D trained on Kinetics-400, in the TorchScript file that StyleGAN-V (Skorokhodov et al. 2022, arXiv:2112.14683) and most
since then use, called as there: 0–255 to [−1, 1] and the resize to 224×224 are the file's own, features are the 400 class
scores before softmax. The distance is FID's (eval/distribution.py).

Departs from FVD: the reference is the float model's videos of the same noise, not real ones, so the name says `to_float`;
a video is one clip with all its frames.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditbench.eval import distribution
from ditbench.eval.base import Evidence, Measurement, MetricSkipped, metric
from ditbench.eval.batches import batches, remembered
from ditbench.eval.data import find_data
from ditbench.eval.features import Pair, device_of, full_precision, need_float_model
from ditbench.eval.passport import FLOAT_MODEL, need_samples
from ditbench.eval.weights import stored_sha256
from ditbench.harness.samples.samples import Rows

I3D = "i3d-kinetics400"  # in eval/data.yaml
BATCH = 4
HELD = 16  # bytes per value of a video, as it is made float32 and smaller
LEAST_FRAMES = 10  # fewer do not last through I3D's pooling over time


def i3d_here() -> str | None:
    """For `metric(needs=…)`."""
    path = find_data(I3D).path
    return None if path and path.is_file() else f"I3D is not here; fetch it with `ditbench data fetch {I3D}`"


@metric("fvd_to_float", better="lower", paired=True, needs=(i3d_here,))
def fvd_to_float(evidence: Evidence) -> Measurement:
    """Fréchet distance to the float model's videos in I3D's features, by torch-fidelity."""
    measured = distribution.fid("torch_fidelity", _I3D, evidence, pairs=True)
    return replace(
        measured, passport=measured.passport | {"implementation": "ditbench fvd, distance by torch-fidelity"}
    )


def i3d_features(videos_NFHWC: Rows, network: torch.jit.ScriptModule) -> Tensor:
    """(N, 400), float32 on the CPU."""

    def all_batches() -> Tensor:
        with full_precision():
            return torch.cat([_seen(batch, network) for batch in batches(videos_NFHWC, HELD, BATCH)])

    return remembered(videos_NFHWC, network, "i3d", all_batches)


def _seen(videos_BFHWC: Tensor, network: torch.jit.ScriptModule) -> Tensor:
    videos_BCFHW = videos_BFHWC.to(device_of(network)).permute(0, 4, 1, 2, 3).float().contiguous()
    return network(videos_BCFHW, rescale=True, resize=True, return_features=True).float().cpu()


def _network(device: torch.device) -> tuple[torch.jit.ScriptModule, str]:
    """I3D and its SHA-256; MetricSkipped with the command where it is not here."""
    path = find_data(I3D).path
    assert path is not None, "an entry with an url has a path"
    if problem := i3d_here():
        raise MetricSkipped(problem)
    sha256 = stored_sha256(path)
    return _load(path, sha256, device), sha256


@cache
def _load(path: Path, sha256: str, device: torch.device) -> torch.jit.ScriptModule:
    try:
        return torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise MetricSkipped(f"{path}: not a TorchScript file; delete it and fetch {I3D} again") from error


def _pair(evidence: Evidence) -> Pair:
    need_samples(evidence, 2)
    generated, float_model = evidence.generated.videos_NFHWC, need_float_model(evidence).videos_NFHWC
    if generated.shape != float_model.shape:
        raise ValueError(
            f"generated {tuple(generated.shape)} and float model {tuple(float_model.shape)} must pair row by row; "
            "generate both with the same seeds"
        )
    if generated.shape[1] < LEAST_FRAMES:
        raise MetricSkipped(f"I3D needs videos of {LEAST_FRAMES} or more frames, these have {generated.shape[1]}")
    network, _ = _network(evidence.device)
    return Pair(i3d_features(generated, network), i3d_features(float_model, network))


def _no_logits(evidence: Evidence) -> Tensor:
    raise NotImplementedError("FVD is a distance of features")


def _origin(evidence: Evidence) -> dict[str, Any]:
    _, sha256 = _network(evidence.device)
    return {
        "reference": FLOAT_MODEL,
        "weights_sha256": sha256,
        "resize": "bilinear to 224×224, inside the TorchScript file",
        "antialias": False,
        "dtype": "float32",
        "features": "I3D Kinetics-400, class scores before softmax",
        "frames": evidence.generated.pixels.shape[1],
    }


_I3D = distribution.View(_pair, _no_logits, _origin)
