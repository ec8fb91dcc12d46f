"""What is announced to be skipped is skipped, and what is skipped for want of something was announced."""

import pytest
import torch

from ditbench.eval import needs
from ditbench.eval.base import Evidence, evaluate, known_metrics, metric
from ditbench.harness.samples.samples import Prompt, Samples

KNOWN_ONLY_FROM_THE_SAMPLES = (
    "a metric of images",
    "a metric of videos",
    "pixels or more a side",
    "videos of one frame",
)


@pytest.fixture(autouse=True)
def empty_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("DITBENCH_JUDGES", str(tmp_path / "judges"))


def bare(*, video: bool, prompts: bool) -> Evidence:
    random = torch.Generator().manual_seed(0)
    size = (3, 4, 40, 40, 3) if video else (3, 40, 40, 3)
    made = torch.randint(0, 256, size, generator=random, dtype=torch.uint8)
    said = tuple(Prompt(f"prompt {index}") for index in range(3)) if prompts else ()
    latents = torch.randn(3, 4, generator=random)
    samples = Samples(made, latents=latents, prompts=said)
    return Evidence(samples, Samples(made.flip(0), latents=latents + 1, prompts=said), resamples=3)


@pytest.mark.parametrize(("video", "prompts"), [(False, False), (False, True), (True, True)])
def test_a_metric_is_announced_exactly_if_it_is_skipped(video, prompts):
    evidence = bare(video=video, prompts=prompts)
    offered = needs.offered(evidence)
    for name, entry in evaluate(known_metrics(), evidence).items():
        announced = needs.lacking(known_metrics()[name], offered)
        if entry["status"] == "skipped" and not any(why in entry["reason"] for why in KNOWN_ONLY_FROM_THE_SAMPLES):
            assert announced, f"{name}: {entry['reason']}"
        if announced:
            assert entry["status"] == "skipped", f"{name} ran, but was announced: {announced}"


def test_what_a_run_has_is_seen_in_its_evidence(evidence):
    assert needs.offered(evidence) == {"judge", "labels", "latents", "reference"}
    shapes = Samples(
        torch.zeros(1, 1, 1, 3, dtype=torch.uint8), prompts=(Prompt("x", {"tag": "colors", "include": []}),)
    )
    assert needs.offered(Evidence(shapes)) == {"prompts", "geneval prompts"}


def test_everything_asked_of_a_run_has_words():
    assert {name for metric in known_metrics().values() for name in metric.asks} <= set(needs.ASKS)


def test_each_missing_thing_comes_with_the_command_that_gets_it():
    said = {name: " ".join(needs.lacking(metric)) for name, metric in known_metrics().items()}
    assert (
        "`ditbench data fetch inception-fid`" in said["torch_fidelity/fid"] and said["torch_fidelity/fid_judge"] == ""
    )
    assert "`ditbench data fetch lpips-vgg`" in said["lpips_vgg"]
    assert "`hf download openai/clip-vit-large-patch14`" in said["clip_iqa"]
    assert "`pip install pyiqa`" in said["vbench_style/imaging_quality"]
    assert said["psnr"] == said["geneval_shapes/overall"] == ""


def test_weights_that_are_here_are_not_missing(port_installed):
    assert needs.lacking(known_metrics()["torch_fidelity/fid"]) == []
    assert needs.lacking(known_metrics()["clean_fid/fid"]) != []


def test_only_three_directions_can_be_registered():
    with pytest.raises(ValueError, match="metric x: better must be one of higher, lower, none"):
        metric("x", better="up")
    assert known_metrics()["flow_score"].better == "none"
