"""FID, KID, IS, precision and recall by three libraries' own code, on features that are already there.

Each function gives the value and the settings that made it. They compute on the CPU, whatever the run's device: sums in float64
and roots of matrices, little beside the networks whose features they are of. Imports are inside: together the libraries take seconds,
and listing metrics should not.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
from scipy import linalg
from torch import Tensor, nn

from ditbench.eval.base import MetricSkipped
from ditbench.eval.features import seeded

Scored = tuple[float, dict[str, Any]]

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000  # the libraries' default, where there are that many images
IS_SPLITS = 10
IS_MIN_PER_SPLIT = 500  # 10 splits of fewer images would measure the split: 1 split then
NEIGHBOURS = 3
PRC_WHOLE_MATRIX = 5000  # above, torch-fidelity works in parts


def torchmetrics_fid(generated_NF: Tensor, reference_MF: Tensor, seed: int) -> Scored:
    from torchmetrics.image.fid import FrechetInceptionDistance

    fid = FrechetInceptionDistance(feature=_Given(reference_MF.shape[1]))
    fid.update(reference_MF, real=True)
    fid.update(generated_NF, real=False)
    return float(fid.compute()), {}


def torchmetrics_kid(generated_NF: Tensor, reference_MF: Tensor, seed: int) -> Scored:
    from torchmetrics.image.kid import KernelInceptionDistance

    size = kid_subset_size(generated_NF, reference_MF)
    with seeded(seed):
        kid = KernelInceptionDistance(feature=_Given(reference_MF.shape[1]), subsets=KID_SUBSETS, subset_size=size)
        kid.update(reference_MF, real=True)
        kid.update(generated_NF, real=False)
        mean, _ = kid.compute()
    return float(mean), {"subsets": KID_SUBSETS, "subset_size": size, "seed": seed}


def torchmetrics_is(logits_NK: Tensor, seed: int) -> Scored:
    from torchmetrics.image.inception import InceptionScore

    splits = is_splits(len(logits_NK))
    with seeded(seed):
        score = InceptionScore(feature=_Given(logits_NK.shape[1]), splits=splits)
        score.update(logits_NK.double())  # in float32 a class no image shows has probability 0, and 0 · log 0 is nan
        mean, _ = score.compute()
    return float(mean), {"splits": splits, "seed": seed}


def torch_fidelity_fid(generated_NF: Tensor, reference_MF: Tensor, seed: int) -> Scored:
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    generated, reference = fid_features_to_statistics(generated_NF), fid_features_to_statistics(reference_MF)
    return fid_statistics_to_metric(generated, reference, verbose=False)[KEY_METRIC_FID], {}


def torch_fidelity_kid(generated_NF: Tensor, reference_MF: Tensor, seed: int) -> Scored:
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    size = kid_subset_size(generated_NF, reference_MF)
    scores = kid_features_to_metric(
        generated_NF, reference_MF, kid_subsets=KID_SUBSETS, kid_subset_size=size, rng_seed=seed, verbose=False
    )
    return scores[KEY_METRIC_KID_MEAN], {"subsets": KID_SUBSETS, "subset_size": size, "seed": seed}


def torch_fidelity_is(logits_NK: Tensor, seed: int) -> Scored:
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    splits = is_splits(len(logits_NK))
    scores = isc_features_to_metric(logits_NK, splits=splits, shuffle=True, rng_seed=seed)
    return scores[KEY_METRIC_ISC_MEAN], {"splits": splits, "seed": seed}


def torch_fidelity_prc(generated_NF: Tensor, reference_MF: Tensor) -> tuple[float, float, dict[str, Any]]:
    """Precision, recall, settings."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    neighbours = min(NEIGHBOURS, len(generated_NF) - 1, len(reference_MF) - 1)
    in_parts = max(len(generated_NF), len(reference_MF)) > PRC_WHOLE_MATRIX
    scores = prc_features_to_metric(
        generated_NF, reference_MF, prc_neighborhood=neighbours, save_cpu_ram=in_parts, verbose=False
    )
    settings = {"neighbours": neighbours, "note": "torch-fidelity's own default features for this metric are VGG16's"}
    return scores[KEY_METRIC_PRECISION], scores[KEY_METRIC_RECALL], settings


def clean_fid_fid(generated_NF: Tensor, reference_MF: Tensor, seed: int) -> Scored:
    from cleanfid import fid

    said = io.StringIO()  # clean-fid prints when it had to add to a singular covariance
    moments = [(x.numpy().mean(axis=0), np.cov(x.numpy(), rowvar=False)) for x in (generated_NF, reference_MF)]
    try:
        with seeded(seed), contextlib.redirect_stdout(said), patch.object(fid, "linalg", _LinalgOfCleanFid):
            value = fid.frechet_distance(*moments[0], *moments[1])
    except ValueError as error:
        raise MetricSkipped(
            f"clean-fid: no real square root of the covariances ({error}); generate more images"
        ) from error
    return float(value), {"library_said": said.getvalue().strip()} if said.getvalue() else {}


def clean_fid_kid(generated_NF: Tensor, reference_MF: Tensor, seed: int) -> Scored:
    from cleanfid.fid import kernel_distance

    with seeded(seed):
        value = kernel_distance(
            reference_MF.numpy(), generated_NF.numpy(), num_subsets=KID_SUBSETS, max_subset_size=KID_SUBSET_SIZE
        )
    size = kid_subset_size(generated_NF, reference_MF)
    return value, {"subsets": KID_SUBSETS, "subset_size": size, "seed": seed}


FID: dict[str, Callable[[Tensor, Tensor, int], Scored]] = {
    "torchmetrics": torchmetrics_fid,
    "torch_fidelity": torch_fidelity_fid,
    "clean_fid": clean_fid_fid,
}
KID: dict[str, Callable[[Tensor, Tensor, int], Scored]] = {
    "torchmetrics": torchmetrics_kid,
    "torch_fidelity": torch_fidelity_kid,
    "clean_fid": clean_fid_kid,
}
IS: dict[str, Callable[[Tensor, int], Scored]] = {"torchmetrics": torchmetrics_is, "torch_fidelity": torch_fidelity_is}
PACKAGES = {"torchmetrics": "torchmetrics", "torch_fidelity": "torch-fidelity", "clean_fid": "clean-fid"}


def kid_subset_size(generated_NF: Tensor, reference_MF: Tensor) -> int:
    return min(KID_SUBSET_SIZE, len(generated_NF), len(reference_MF))


def is_splits(n: int) -> int:
    return IS_SPLITS if n >= IS_SPLITS * IS_MIN_PER_SPLIT else 1


class _LinalgOfCleanFid:
    """scipy.linalg as clean-fid 0.1.35 calls it: sqrtm(…, disp=False) → (root, error). scipy 1.18 has no `disp`."""

    @staticmethod
    def sqrtm(matrix: np.ndarray, disp: bool = True) -> Any:
        root = linalg.sqrtm(matrix)
        return root if disp else (root, None)


class _Given(nn.Module):
    """Stands where torchmetrics expects a feature extractor; its "images" are the features themselves."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
