"""protocol.noise and protocol.negative_prompt on a small Wan 2.2: what diffusers' own pipeline draws when it is told the same."""

from __future__ import annotations

import diffusers
import pytest
import torch
from small_pipelines import SIZES, wan_of_two_experts

from ditbench.harness.build.build import float_copy
from ditbench.harness.common.errors import UserError
from ditbench.harness.generation.generate import conditions
from ditbench.harness.models.base import LoadedModel, ModelSpec, Sampler
from ditbench.harness.models.loading import load_model
from ditbench.harness.models.prompted import _negative
from ditbench.harness.samples.noise import GIVEN, ONE_FOR_ALL, Noise
from ditbench.harness.samples.samples import Prompt

STEPS = 2
PROMPTS = (Prompt("a red circle"), Prompt("two blue squares"))
PLAIN = Sampler("pipeline", STEPS, 3.0)
AWAY = Sampler("pipeline", STEPS, 3.0, negative_prompt="blurry details")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wan2.2") / "checkpoint"
    wan_of_two_experts().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint) -> LoadedModel:
    return load_model(ModelSpec("small-wan2.2", "wan", source=str(checkpoint), size=SIZES["wan"]))


@pytest.fixture(scope="module")
def pipe(checkpoint):
    pipe = diffusers.WanPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(model: LoadedModel, sampler: Sampler, noise: Noise, prompts=PROMPTS, seed: int = 0) -> torch.Tensor:
    transformer = float_copy(model.target(), dtype=torch.float32)
    wanted = conditions(model, 2, seed, prompts=prompts, noise=noise)
    return (model.adapter.sample(model.pipe, transformer, wanted, sampler).pixels + 1) / 2


def theirs(pipe, latents: torch.Tensor, prompts=PROMPTS, **more) -> torch.Tensor:
    return pipe(
        prompt=[prompt.text for prompt in prompts], num_inference_steps=STEPS, guidance_scale=3.0, output_type="pt",
        latents=latents.expand(len(prompts), *latents.shape[1:]).contiguous(), **SIZES["wan"],
        max_sequence_length=min(512, pipe.tokenizer.model_max_length), **more,
    ).frames.float()  # fmt: skip


def latents_of(pipe, seed: int) -> torch.Tensor:
    """As MLPerf makes SDXL's: one generator on the CPU, float32, (1, …)."""
    size = SIZES["wan"]
    shape = (
        1,
        pipe.transformer.config.in_channels,
        (size["num_frames"] - 1) // 4 + 1,
        size["height"] // 8,
        size["width"] // 8,
    )
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def test_all_samples_begin_with_the_latents_of_the_file(model, pipe):
    latents = latents_of(pipe, seed=7)
    drawn = ours(model, PLAIN, Noise(GIVEN, latents, "0" * 64))
    torch.testing.assert_close(drawn, theirs(pipe, latents), rtol=0, atol=1e-4)
    assert float((drawn - theirs(pipe, latents_of(pipe, seed=8))).abs().max()) > 1e-3, "other latents are seen"


def test_a_shared_noise_is_that_of_the_seed_itself(model, pipe):
    """MLPerf's recipe of SDXL's latents, bit for bit what every sample begins with."""
    torch.testing.assert_close(
        ours(model, PLAIN, ONE_FOR_ALL, seed=5), theirs(pipe, latents_of(pipe, seed=5)), rtol=0, atol=1e-4
    )
    same = ours(model, PLAIN, ONE_FOR_ALL, prompts=(PROMPTS[0],) * 2)
    torch.testing.assert_close(same[0], same[1], rtol=0, atol=1e-5, msg="one prompt, one noise")


def test_guidance_leads_away_from_the_negative_prompt(model, pipe):
    latents = latents_of(pipe, seed=7)
    drawn = ours(model, AWAY, Noise(GIVEN, latents, "0" * 64))
    expected = theirs(pipe, latents, negative_prompt=["blurry details"] * 2)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)
    assert float((drawn - theirs(pipe, latents)).abs().max()) > 1e-3, "it is seen"


def test_latents_of_another_shape_are_refused_with_both(model):
    wrong = Noise(GIVEN, torch.zeros(1, 16, 21, 90, 160), "0" * 64)
    with pytest.raises(
        UserError, match=r"the latents of one sample are \(.*\) in this model .* has \(16, 21, 90, 160\)"
    ):
        ours(model, PLAIN, wrong)


def test_a_pipeline_that_takes_no_negative_prompt_says_so():
    class Plain:
        def __call__(self, prompt):
            return prompt

    assert _negative(Plain(), PLAIN, 2) == {}
    with pytest.raises(UserError, match="a Plain takes no negative prompt; set protocol.negative_prompt=null"):
        _negative(Plain(), AWAY, 2)
