"""Tiny evidence with known truth; no test here asks the network for anything."""

from __future__ import annotations

import pytest
import torch

from eval.base import Evidence, FeatureModel, Reference, Samples
from harness.models.zoo.judge import FEATURE_WIDTH, Judge


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Weights are looked for in empty folders only."""
    monkeypatch.setenv("DITBENCH_OFFLINE", "1")
    monkeypatch.setenv("DITBENCH_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.setattr("eval.inception.CLEAN_FID_FOLDER", tmp_path / "clean_fid")


@pytest.fixture(scope="session")
def judge() -> FeatureModel:
    """Random weights, spread so that features differ between images far above float32 rounding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Judge().eval()
        for parameter in module.parameters():
            parameter.data.mul_(2.0)
    return FeatureModel("random", module, FEATURE_WIDTH, "0" * 64)


@pytest.fixture
def evidence(judge) -> Evidence:
    return make_evidence(judge)


@pytest.fixture
def evidence_of(judge):
    """evidence_of(n=…, reference_n=…, seed=…) with the random judge."""
    return lambda **sizes: make_evidence(judge, **sizes)


def make_evidence(judge: FeatureModel, n: int = 96, reference_n: int = 300, seed: int = 0) -> Evidence:
    """Smooth random images; the generated ones are the float model's plus noise, the reference a little brighter."""
    random = torch.Generator().manual_seed(seed)

    def images(count: int, level: float) -> torch.Tensor:
        small = torch.rand(count, 3, 4, 4, generator=random) * 150 + level
        return torch.nn.functional.interpolate(small, size=16, mode="bilinear").permute(0, 2, 3, 1).contiguous()

    float_images = images(n, 40.0)
    noisy = float_images + 6 * torch.randn(float_images.shape, generator=random)
    latents = torch.randn(n, 4, 2, 2, generator=random)
    labels = torch.arange(n) % 10
    return Evidence(
        generated=Samples(uint8(noisy), labels, latents + 0.1 * torch.randn(latents.shape, generator=random)),
        float_model=Samples(uint8(float_images), labels, latents),
        reference=Reference("bright", uint8(images(reference_n, 60.0)), "f" * 64),
        judge=judge,
        resamples=60,
    )


def uint8(images: torch.Tensor) -> torch.Tensor:
    return images.round().clamp(0, 255).to(torch.uint8)
