"""MLPerf's protocols as presets: what they say, and what they need."""

from __future__ import annotations

import json

import pytest
import torch

from ditbench.eval.mlperf_wan import DIMENSIONS
from ditbench.harness.common.errors import UserError
from ditbench.harness.samples.noise import GIVEN, OWN, SHARED
from ditbench.harness.stages.config import parse
from ditbench.harness.stages.identity import identity
from ditbench.harness.stages.loaded import model_of
from ditbench.harness.stages.noise import load_noise
from ditbench.harness.stages.prompt_sets import load_prompts
from ditbench.harness.sweep.compose import composed

# VBench's prompts by dimension (its README): 72 of motion, 90 of style, 86 of scenes; others that MLPerf leaves out.
OF_VBENCH = {
    ("subject_consistency", "dynamic_degree", "motion_smoothness"): 72,
    ("appearance_style",): 90,
    ("scene", "background_consistency"): 86,
    ("human_action",): 100,
}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """What `ditbench data fetch` would have put there, but for the bytes of the latent."""
    monkeypatch.setenv("DITBENCH_DATA", str(tmp_path / "data"))
    for folder in ("prompts", "noise"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    entries = [
        {"prompt_en": f"{'-'.join(dimensions)} {number}", "dimension": list(dimensions)}
        for dimensions, count in OF_VBENCH.items()
        for number in range(count)
    ]
    (tmp_path / "data" / "prompts" / "VBench_full_info.json").write_text(json.dumps(entries))
    captions = "\n".join(["id\timage_id\tcaption", *(f"{number}\t1\ta cat {number}" for number in range(9))])
    (tmp_path / "data" / "prompts" / "coco-2014.tsv").write_text(captions)
    torch.save(torch.randn(1, 16, 21, 90, 160).bfloat16(), tmp_path / "data" / "noise" / "mlperf-wan22-latent.pt")
    caches = (load_prompts, load_noise)
    for each in caches:
        each.cache_clear()
    yield tmp_path / "data"
    for each in caches:
        each.cache_clear()


def test_wan_2_2_is_drawn_as_mlperf_says(data):
    config = parse(
        composed([["model=wan2.2-t2v-a14b", "protocol=mlperf_wan22", "calibration.prompts=shapes", "tracker=none"]])[0]
    )
    sampler, protocol = config.protocol.sampler, config.protocol
    assert (sampler.steps, sampler.guidance, sampler.guidance_2) == (20, 4.0, 3.0)
    assert (
        sampler.negative_prompt.startswith("vivid colors, overexposed, static,") and "\n" not in sampler.negative_prompt
    )
    assert sampler.negative_prompt.endswith("many people in the background, walking backwards")
    assert config.model.size == {"height": 720, "width": 1280, "num_frames": 81}
    assert protocol.n == len(protocol.prompts) == len({prompt.text for prompt in protocol.prompts}) == 248
    assert all(set(prompt.about["dimension"]) & set(DIMENSIONS) for prompt in protocol.prompts)
    assert protocol.noise.kind == GIVEN and protocol.noise.latents.shape == (1, 16, 21, 90, 160)


def test_text_to_image_is_drawn_as_mlperf_draws_sdxl(data):
    config = parse(composed([["model=sd3-medium", "protocol=mlperf_sdxl", "protocol.n=9", "tracker=none"]])[0])
    sampler = config.protocol.sampler
    assert (sampler.steps, sampler.guidance, sampler.guidance_2) == (20, 8.0, None)
    assert sampler.negative_prompt == "normal quality, low quality, worst quality, low res, blurry, nsfw, nude"
    assert config.protocol.noise.kind == SHARED and config.seed == 0
    assert composed([["model=sd3-medium", "protocol=mlperf_sdxl"]])[0]["protocol"]["n"] == 5000


def test_fewer_of_vbenchs_prompts_than_mlperf_has_are_refused(data):
    path = data / "prompts" / "VBench_full_info.json"
    path.write_text(json.dumps(json.loads(path.read_text())[1:]))
    with pytest.raises(UserError, match="expected 248 of VBench's prompts, came 247; fetch vbench again"):
        load_prompts("vbench-mlperf")


def test_what_was_not_fetched_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setenv("DITBENCH_DATA", str(tmp_path / "none"))
    load_prompts.cache_clear()
    for wanted, load in (
        ("vbench", lambda: load_prompts("vbench-mlperf")),
        ("mlperf-wan22-latent", lambda: load_noise("mlperf-wan22-latent")),
    ):
        with pytest.raises(UserError, match=f"`ditbench data fetch {wanted}`"):
            load()


def test_a_latent_is_known_by_what_is_in_it_and_not_by_its_place(tmp_path):
    shape = (1, 4, 4, 4)
    torch.save(torch.zeros(shape), tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes((tmp_path / "a.pt").read_bytes())
    torch.save(torch.ones(shape), tmp_path / "c.pt")

    def known_as(noise: str) -> str:
        config = parse(composed([["model=tiny-t2i", f"protocol.noise={noise}"]])[0])
        known = identity(config, model_of(config.model))
        return json.dumps({"protocol": known["protocol"], "noise": known["noise"]})

    a, b, c = (known_as(str(tmp_path / f"{name}.pt")) for name in "abc")
    assert a == b != c and len({a, c, known_as(OWN), known_as(SHARED)}) == 4


@pytest.mark.parametrize("override", ["protocol.noise=FILE", "protocol.noise=shared", "protocol.negative_prompt=ugly"])
def test_models_of_labels_take_neither_one_noise_nor_a_negative_prompt(override, tmp_path):
    torch.save(torch.zeros(1, 4, 4, 4), tmp_path / "a.pt")
    with pytest.raises(UserError, match="is of models that are told by prompts; set protocol."):
        parse(composed([["model=tiny-dit", override.replace("FILE", str(tmp_path / "a.pt"))]])[0])


def test_with_one_noise_no_prompt_is_drawn_twice(tmp_path):
    (tmp_path / "two.txt").write_text("a red circle\ntwo blue squares\n")
    asked = ["model=tiny-t2i", f"protocol.prompts={tmp_path}/two.txt", "protocol.noise=shared"]
    with pytest.raises(UserError, match="gives one sample twice; set protocol.n to at most 2"):
        parse(composed([[*asked, "protocol.n=3"]])[0])
    assert parse(composed([[*asked, "protocol.n=2"]])[0]).protocol.n == 2


def test_records_of_before_are_parsed_as_what_they_were():
    raw = composed([["model=tiny-dit"]])[0]
    del raw["protocol"]["noise"], raw["protocol"]["negative_prompt"]
    config = parse(raw)
    assert config.protocol.noise.kind == OWN and config.protocol.sampler.negative_prompt is None
