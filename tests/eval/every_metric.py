"""Small samples that every registered metric can look at, and small networks in the place of those it asks for."""

from __future__ import annotations

import hashlib
import random
import sys
import types
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from test_fvd import SmallI3D
from test_inception import StandIn
from torch import Tensor, nn

from ditbench.eval import (
    clip,
    dino_similarity,
    geneval_detector,
    hpsv2,
    image_reward,
    lpips,
    mlperf,
    pick_score,
    vbench_style,
    video_judges,
    video_motion,
)
from ditbench.eval.base import Evidence, FeatureModel, Reference, known_metrics
from ditbench.eval.data import find_data
from ditbench.eval.flow import Flow
from ditbench.eval.fvd import I3D
from ditbench.eval.geneval import Found
from ditbench.eval.video_judges import CLIP_LARGE
from ditbench.eval.weights import Upstream
from ditbench.harness.models.zoo import shapes
from ditbench.harness.samples.samples import Prompt, Samples

N, REFERENCE_N, SIDE, FRAMES = 6, 7, 32, 11
OF_VIDEOS = ("vbench_style/", "motion_shapes/", "clipsim", "clip_temp", "flow_score", "warping_error", "fvd_to_float")
EVERY = sorted(known_metrics())


class AnyJudge(nn.Module):
    """A judge of images of any size, random and fixed."""

    def __init__(self) -> None:
        super().__init__()
        random_ = torch.Generator().manual_seed(0)
        self.mix_48F = nn.Parameter(torch.randn(48, 5, generator=random_))
        self.head_FK = nn.Parameter(torch.randn(5, 4, generator=random_))

    def features(self, images_N3HW: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images_N3HW.float() / 255, 4).flatten(1) @ self.mix_48F

    def forward(self, images_N3HW: Tensor) -> Tensor:
        return self.features(images_N3HW) @ self.head_FK


@cache
def image_evidence() -> Evidence:
    """Pictures of the shapes world, some of them wrong; the quantized model's have noise on them."""
    random_, numbers = random.Random(0), torch.Generator().manual_seed(0)
    captions = list(shapes.prompts(N))
    drawn = torch.from_numpy(np.stack([shapes.render(shapes.draw_scene(each, random_)) for each in captions]))
    drawn[::4] = drawn[::4].flip(3)
    prompts = tuple(Prompt(each.text, each.about) for each in captions)
    latents, labels = torch.randn(N, 4, 4, 4, generator=numbers), torch.arange(N) % 4
    noisy = drawn + 4 * torch.randn(drawn.shape, generator=numbers)
    real = torch.randint(0, 256, (REFERENCE_N, SIDE, SIDE, 3), generator=numbers, dtype=torch.uint8)
    return Evidence(
        Samples(uint8(noisy), labels, latents + 0.1 * torch.randn(latents.shape, generator=numbers), prompts),
        Samples(drawn, labels, latents, prompts),
        Reference("noise", real, "f" * 64),
        FeatureModel("any", AnyJudge(), 5, "0" * 64),
        resamples=6,
    )


@cache
def video_evidence() -> Evidence:
    random_, numbers = random.Random(0), torch.Generator().manual_seed(0)
    motions = list(shapes.motions(N))
    drawn = torch.from_numpy(np.stack([shapes.draw_video(each, random_, FRAMES, SIDE) for each in motions]))
    drawn[::4] = drawn[::4].flip(1)
    prompts = tuple(Prompt(each.text, each.about) for each in motions)
    latents = torch.randn(N, 4, 3, 4, 4, generator=numbers)
    noisy = drawn + 4 * torch.randn(drawn.shape, generator=numbers)
    return Evidence(
        Samples(uint8(noisy), None, latents + 0.1, prompts), Samples(drawn, None, latents, prompts), resamples=6
    )


def evidence_for(name: str) -> Evidence:
    """Images or videos, as the metric takes them, with prompts that it understands."""
    if name.startswith(OF_VIDEOS):
        return video_evidence()
    if not name.startswith("geneval/"):
        return image_evidence()
    about = {"cat": [{"class": "cat", "count": 1}], "dog": [{"class": "dog", "count": 1, "color": "red"}]}
    prompts = tuple(
        Prompt(f"a {animal}", {"tag": kind, "include": about[animal]})
        for kind, animal in zip(shapes.KINDS, 3 * ("cat", "dog"), strict=True)
    )
    given = image_evidence()
    return replace(given, generated=replace(given.generated, prompts=prompts))


def uint8(pixels: Tensor) -> Tensor:
    return pixels.round().clamp(0, 255).to(torch.uint8)


class SmallInception(nn.Module):
    """Called as torch-fidelity's port and torchmetrics' class around it are."""

    def __init__(self, *_, **__) -> None:
        super().__init__()
        random_ = torch.Generator().manual_seed(0)
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = nn.Conv2d(3, 9, 1)
        self.Mixed_6d.branch1x1.weight.data = torch.randn(9, 3, 1, 1, generator=random_)
        self.mix = nn.Parameter(torch.randn(9, 12, generator=random_))

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        small = nn.functional.adaptive_avg_pool2d(images_B3HW.float() / 255, 5)
        features = self.Mixed_6d.branch1x1(small).amax(dim=(2, 3))
        return features, features @ self.mix

    _torch_fidelity_forward = forward


@pytest.fixture(scope="session")
def network_files(tmp_path_factory) -> Path:
    """A folder of weights: for Inception (both), LPIPS, LAION's head and I3D."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "weights-inception.pth").write_bytes(b"of SmallInception")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.jit.script(StandIn()).save(folder / "inception-2015-12-05.pt")
        torch.jit.script(SmallI3D()).save(folder / find_data(I3D).path.name)
    random_ = torch.Generator().manual_seed(0)
    head = {"weight": torch.randn(1, 12, generator=random_), "bias": torch.ones(1)}
    torch.save(head, folder / vbench_style.AESTHETIC_FILE)
    for backbone in lpips.SMALLEST:
        backbone_file(backbone, folder)
    np.savez(folder / mlperf.MOMENTS_FILE, mu=np.full(3, 0.5), sigma=0.01 * np.eye(3))
    return folder


@pytest.fixture
def every_network(judges, network_files, tmp_path, monkeypatch):
    """Whatever a metric asks this machine for is there, small and random."""
    monkeypatch.setenv("DITBENCH_WEIGHTS", str(network_files))
    port = "torch_fidelity.feature_extractor_inceptionv3"
    monkeypatch.setattr(f"{port}.URL_INCEPTION_V3", "https://example.invalid/weights-inception.pth")
    monkeypatch.setattr(f"{port}.FeatureExtractorInceptionV3", SmallInception)
    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", SmallInception)
    monkeypatch.setattr(video_motion, "find_flow", lambda device: STEPS)
    files = {backbone: next(network_files.glob(f"{backbone}-*.pth")) for backbone in lpips.SMALLEST}
    monkeypatch.setattr(
        lpips, "backbone_upstream", lambda kind: Upstream(f"https://example.invalid/{files[kind].name}", network_files)
    )
    monkeypatch.setitem(clip.HUB, "l14_336", CLIP_LARGE)
    for loaded in (clip.load_clip, video_judges._load, pick_score.load, hpsv2.load, dino_similarity.load_dinov2):
        loaded.cache_clear()

    monkeypatch.setattr(mlperf, "load_network", lambda *_: MEANS)

    reader = Reader()
    monkeypatch.setattr(geneval_detector, "load_detector", lambda *_: reader)
    monkeypatch.setattr(geneval_detector, "judge_folder", lambda name: None)
    monkeypatch.setattr(image_reward, "_package", lambda: None)
    reward = tmp_path / "ImageReward.pt"
    reward.write_bytes(b"weights")
    monkeypatch.setattr(image_reward, "_local_files", lambda: [reward, reward])
    letters = types.SimpleNamespace(tokenizer=lambda texts, verbose: {"input_ids": [list(text) for text in texts]})
    model = types.SimpleNamespace(score=lambda text, image: np.asarray(image).std() + len(text), blip=letters)
    monkeypatch.setattr(image_reward, "load_model", lambda *_: model)
    brightness = types.SimpleNamespace(create_metric=lambda *_, **__: lambda frames: 100 * frames.mean(dim=(1, 2, 3)))
    monkeypatch.setitem(sys.modules, "pyiqa", brightness)
    monkeypatch.setattr(vbench_style, "_pyiqa", lambda: None)
    absent = ("image-reward", "pyiqa")
    monkeypatch.setattr("ditbench.eval.passport.version", lambda name: "0" if name in absent else version(name))


def steps_of(before_PHWC: Tensor, after_PHWC: Tensor) -> Tensor:
    """In an optical flow's place: a step that follows from how much the frames differ."""
    change_P1 = (after_PHWC.float() - before_PHWC.float()).flatten(1).mean(dim=1, keepdim=True)
    return torch.cat([change_P1, -change_P1], dim=1)[..., None, None].expand(-1, -1, *before_PHWC.shape[1:3])


class Means(nn.Module):
    """In pytorch-fid's Inception's place: the mean of each colour."""

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return images_B3HW.float().mean(dim=(2, 3)) / 255


MEANS = Means()
STEPS = Flow("ditbench", steps_of, {"flow": "steps"})


class Reader:
    """In GenEval's detector's place: a bright picture shows a red cat, a dark one a dog."""

    def __init__(self) -> None:
        self.origin = {"dtype": "float32", "weights_sha256": "0" * 64}

    def __call__(self, image_HWC: np.ndarray, about: dict) -> list[Found]:
        box = (0.0, 0.0, 4.0, 4.0)
        return [Found("cat", "red", box) if image_HWC.mean() > 60 else Found("dog", "red", box)]


def backbone_file(backbone: str, folder: Path) -> Path:
    """Random weights of torchvision's network in its file format, the hash in its name."""
    from torchvision.models import alexnet, vgg16

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = {"alex": alexnet, "vgg": vgg16}[backbone](weights=None).features
    path = folder / f"{backbone}.pth"
    torch.save({f"features.{name}": tensor for name, tensor in features.state_dict().items()}, path)
    return path.rename(folder / f"{backbone}-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth")
