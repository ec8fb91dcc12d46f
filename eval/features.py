"""What a network sees in a set of images: computed once per set, then shared by every metric that asks.

A sweep scores many runs against one reference, so results are remembered by the identity of the images and of the
network, and forgotten with them (`remembered`, eval/batches.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ditbench.eval.base import Evidence, FeatureModel, MetricSkipped, Reference
from ditbench.eval.batches import BATCH, frames
from ditbench.eval.batches import remembered as remembered  # plugins know it here
from ditbench.eval.passport import FLOAT_MODEL, need_samples
from ditbench.eval.reference import images_sha256
from ditbench.harness.common.devices import CPU
from ditbench.harness.samples.samples import Rows, Samples

SEEN = 32  # bytes per value of the images that a network is given, as they are prepared for it; most make them smaller

_pairs: WeakIdKeyDictionary = WeakIdKeyDictionary()  # evidence → {network: Pair}
_against_float: WeakIdKeyDictionary = WeakIdKeyDictionary()  # evidence → the same with the float model as reference


@dataclass(eq=False)
class Pair:
    """Features of both sets, float32 on the CPU; `shared` holds results that several metrics need."""

    generated_NF: Tensor
    reference_MF: Tensor
    shared: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        if name not in self.shared:
            self.shared[name] = compute()
        return self.shared[name]


def judge_pair(evidence: Evidence) -> Pair:
    """The judge's features of the generated and the reference images."""
    judge = need_judge(evidence)

    def features(images_NHWC: Rows) -> Tensor:
        return outputs(images_NHWC, judge.module, "features")

    return pair_of(evidence, judge.module, features)


def pair_of(evidence: Evidence, network: object, features: Callable[[Rows], Tensor]) -> Pair:
    """features(images_NHWC) of both sets; the same Pair each time the same evidence and network come."""
    need_samples(evidence, 2)
    reference = need_reference(evidence)
    known = _pairs.setdefault(evidence, WeakIdKeyDictionary())
    if network not in known:
        known[network] = Pair(features(evidence.generated.images_NHWC), features(reference.images_NHWC))
    return known[network]


def outputs(images_NHWC: Rows, judge: nn.Module, name: str) -> Tensor:
    """The judge's "features" (N, width) or "logits" (N, num_classes) of uint8 images, float32 on the CPU."""
    compute = {"features": judge.features, "logits": judge}[name]
    device = device_of(judge)

    def all_batches() -> Tensor:
        was_training = judge.training
        judge.eval()
        try:
            return torch.cat([compute(batch.to(device)).float().cpu() for batch in channels_first(images_NHWC, BATCH)])
        finally:
            judge.train(was_training)

    return remembered(images_NHWC, judge, name, all_batches)


def channels_first(pixels_N: Rows, most: int, held: int = SEEN) -> Iterator[Tensor]:
    """uint8 batches (B, 3, H, W) of images or of the frames of videos, `most` of them or as many as fit (eval/batches.py)."""
    for images in frames(pixels_N, held, most):
        yield images.permute(0, 3, 1, 2).contiguous()


def device_of(network: nn.Module) -> torch.device:
    return next((tensor.device for tensor in network.parameters()), CPU)


def need_judge(evidence: Evidence) -> FeatureModel:
    if evidence.judge is None:
        raise MetricSkipped("this model comes without a judge; use metrics=inception")
    return evidence.judge


def need_reference(evidence: Evidence) -> Reference:
    if evidence.reference is None:
        raise MetricSkipped("no reference images were given; choose a known set, an .npz or a folder of images")
    if len(evidence.reference.images_NHWC) < 2:
        raise MetricSkipped(f"reference {evidence.reference.name} has fewer than 2 images")
    return evidence.reference


def need_float_model(evidence: Evidence) -> Samples:
    if evidence.float_model is None:
        raise MetricSkipped("no samples of the float model to compare with")
    if None in evidence.generated.seeds:
        raise MetricSkipped(
            "the noise that these samples came from is not known: they cannot be held against the float model's"
        )
    return evidence.float_model


def against_float(evidence: Evidence) -> Evidence:
    """The same evidence with the float model's images for a reference; the same object each time it is asked for."""
    if evidence not in _against_float:
        images_NHWC = need_float_model(evidence).images_NHWC
        if images_NHWC.shape != evidence.generated.images_NHWC.shape:
            raise ValueError(
                f"generated {tuple(evidence.generated.images_NHWC.shape)} and float model {tuple(images_NHWC.shape)} "
                "must pair row by row; generate both with the same seeds"
            )
        reference = Reference(FLOAT_MODEL, images_NHWC, images_sha256(images_NHWC))
        _against_float[evidence] = replace(evidence, reference=reference)
    return _against_float[evidence]


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions in float32 on a GPU too, as products are by default: TF32 would move the features."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """BLAS and torch on one thread: many small products on two busy cores were ten times slower on two threads."""
    threads = torch.get_num_threads()
    with threadpool_limits(1):
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global CPU generators the libraries draw from, silences their advice, and puts the states back."""
    numpy_state, torch_state = np.random.get_state(), torch.get_rng_state()
    try:
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
