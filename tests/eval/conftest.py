"""Tiny evidence with known truth; no test here asks the network for anything."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import open_clip_cases
import pytest
import torch
from torch import nn

from ditbench.eval import clip_h14, hpsv2, pick_score
from ditbench.eval.base import Evidence, FeatureModel, Reference
from ditbench.eval.dino_similarity import DINOV2
from ditbench.eval.video_judges import CLIP, CLIP_LARGE, DINO
from ditbench.harness.models.zoo.judge import FEATURE_WIDTH, Judge
from ditbench.harness.samples.samples import Samples


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Weights are looked for in empty folders only."""
    monkeypatch.setenv("DITBENCH_OFFLINE", "1")
    monkeypatch.setenv("DITBENCH_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.setattr("ditbench.eval.inception.CLEAN_FID_FOLDER", tmp_path / "clean_fid")


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


@pytest.fixture(scope="session")
def port_weights(tmp_path_factory):
    """A random state_dict of torch-fidelity's network, with its hash in its name as upstream has it."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    folder = tmp_path_factory.mktemp("port")
    torch.save({}, folder / "empty.pth")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Untrained("inception-v3-compat", ["2048"], str(folder / "empty.pth"))
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)  # so that the features do not fade to 1e-8
    torch.save(network.state_dict(), folder / "weights.pth")
    sha256 = hashlib.sha256((folder / "weights.pth").read_bytes()).hexdigest()
    return (folder / "weights.pth").rename(folder / f"weights-inception-{sha256[:8]}.pth")


@pytest.fixture
def port_installed(port_weights, monkeypatch):
    monkeypatch.setenv("DITBENCH_WEIGHTS", str(port_weights.parent))
    url = f"https://example.invalid/{port_weights.name}"
    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.URL_INCEPTION_V3", url)
    return port_weights


@pytest.fixture(scope="session")
def photos() -> Evidence:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (9, 320, 340, 3), dtype=np.uint8)
    images[:4] = images[:4] // 2 + 60
    images = torch.from_numpy(images)
    return Evidence(Samples(images[:4]), reference=Reference("noise", images[4:], "e" * 64), resamples=10)


@pytest.fixture(scope="session")
def judge_folders(tmp_path_factory):
    """Small random networks of the same classes, saved as `hf download` would leave them."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    root = tmp_path_factory.mktemp("judges")
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    text = sizes | {"vocab_size": len(words), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViTModel(ViTConfig(**sizes, image_size=24, patch_size=8)).save_pretrained(root / DINO)
        for name, width in ((CLIP, 16), (CLIP_LARGE, 12), (pick_score.HUB, 14)):
            vision = sizes | {"image_size": 24, "patch_size": 8}
            config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)
            clip = CLIPModel(config)
            _spread(clip, seed=width)
            clip.logit_scale.data.fill_(np.log(50.0))  # trained ones are near 100
            clip.save_pretrained(root / name)
            if name != pick_score.HUB:  # its tokenizer is another folder's
                tokenizer.save_pretrained(root / name)
        dino = Dinov2Model(Dinov2Config(**sizes, image_size=70, patch_size=14, mlp_ratio=2))
        _spread(dino, seed=1)
        dino.save_pretrained(root / DINOV2)
    open_clip_cases.config().save_pretrained(root / clip_h14.NAME)
    tokenizer.save_pretrained(root / clip_h14.NAME)
    (root / hpsv2.HUB).mkdir(parents=True)
    torch.save({"state_dict": open_clip_cases.random_state()}, root / hpsv2.HUB / hpsv2.FILE)
    return root


def _spread(network: nn.Module, seed: int) -> None:
    """Weights large enough that texts and pictures differ, and not transformers' own start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def judges(judge_folders, monkeypatch):
    monkeypatch.setenv("DITBENCH_JUDGES", str(judge_folders))


@pytest.fixture
def no_hub_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("DITBENCH_JUDGES", raising=False)


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
