"""A loaded export finds its denoising step from the timestep, whichever pipeline calls, wherever it starts, however often."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxImg2ImgPipeline, StableDiffusion3Img2ImgPipeline
from small_pipelines import SIZES, SMALL
from torch import Tensor

from ditbench.harness.build.export import load_quantized, save_quantized
from ditbench.harness.build.step_finder import Schedule, StepFinder, noisiest, time_argument
from ditbench.harness.calibration.recording import calibrate
from ditbench.harness.fitting.conformance import STATIC
from ditbench.harness.models.base import LoadedModel, ModelSpec, Sampler
from ditbench.harness.models.calls import float_dtype, placed
from ditbench.harness.models.loading import load_model
from ditbench.harness.models.prompted import call_arguments
from ditbench.harness.models.schedule import schedule_of
from ditbench.harness.quant.steps import StepClock
from ditbench.harness.samples.samples import Prompt

STEPS, PROMPT = 4, "a red circle"
SAMPLER = Sampler("pipeline", STEPS, 2.0)
IMG2IMG = {"sd3": StableDiffusion3Img2ImgPipeline, "flux": FluxImg2ImgPipeline}


@dataclass
class Fitted:
    """folder: of the pipeline; export: HTG with a row for every step; run: {timestep: step} as the run's clock had it."""

    model: LoadedModel
    folder: Any
    export: Any
    run: dict[float, int]
    image: Tensor = field(default_factory=lambda: torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)))

    def pipe(self, nearest: bool = False) -> Any:
        pipe = quiet(DiffusionPipeline.from_pretrained(self.folder))
        load_quantized(self.export.folder, pipe, nearest=nearest)
        return pipe


@pytest.fixture(scope="module", params=sorted(IMG2IMG))
def fitted(request, write, tmp_path_factory) -> Fitted:
    torch.manual_seed(0)
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    SMALL[family]().save_pretrained(folder / "pipe")
    model = load_model(ModelSpec(family, family, source=str(folder / "pipe"), size=SIZES.get(family)))
    calibration = calibrate(model, SAMPLER, n=2, seed=0, prompts=[Prompt(PROMPT)])
    made = write(
        folder / "export",
        model.target(),
        calibration,
        model,
        "htg",
        STATIC,
        dtype="float32",
        sampler=SAMPLER,
        groups=STEPS,
    )
    assert made.recipe.num_steps == STEPS
    run = {float(calls[0]["timestep"][0]): step for step, calls in enumerate(calibration.steps)}
    return Fitted(model, folder / "pipe", made, run)


@dataclass
class Seen:
    """Every call: its arguments, the clock's step, what came out."""

    calls: list[tuple[dict[str, Any], int, Tensor]]

    @property
    def steps(self) -> list[int]:
        return [step for _, step, _ in self.calls]


@pytest.fixture
def watch():
    def of(transformer) -> Seen:
        seen = Seen([])

        def leave(module, args, kwargs, output):
            seen.calls.append((call_arguments(module, args, kwargs), int(module.clock.step), output[0].clone()))

        transformer.register_forward_hook(leave, with_kwargs=True)
        return seen

    return of


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, steps: int = STEPS, size: int = 16, **more: Any) -> None:
    with torch.no_grad():
        pipe(
            prompt=PROMPT, num_inference_steps=steps, guidance_scale=2.0, generator=torch.Generator().manual_seed(0),
            height=size, width=size, max_sequence_length=16, output_type="latent", **more,
        )  # fmt: skip


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.75, 1.0])
def test_image_to_image_computes_with_the_rows_that_the_run_had_at_the_same_timestep(fitted, watch, strength):
    """Held against the run's own model, whose clock is set by hand to the run's step: equal outputs, bit for bit."""
    pipe = fitted.pipe()
    seen = watch(pipe.transformer)
    draw(quiet(IMG2IMG[fitted.model.spec.family](**pipe.components)), image=fitted.image, strength=strength)
    assert seen.steps == list(range(STEPS - int(STEPS * strength), STEPS))
    built = fitted.export.built()
    for arguments, step, output in seen.calls:
        assert fitted.run[float(arguments["timestep"][0])] == step
        built.clock.set(step, STEPS)
        with torch.no_grad():
            again = built(**placed(arguments, float_dtype(built), "cpu"), return_dict=False)[0]
            built.clock.set((step + 1) % STEPS, STEPS)
            other = built(**placed(arguments, float_dtype(built), "cpu"), return_dict=False)[0]
        assert torch.equal(output, again)
        assert not torch.equal(output, other), "each step has rows of its own"


def test_a_second_pipeline_around_the_same_transformer_has_its_own_schedule(fitted, watch):
    """With a scheduler of its own, before and after the first pipeline has drawn."""
    pipe = fitted.pipe()
    seen = watch(pipe.transformer)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    second = quiet(type(pipe)(**pipe.components | {"scheduler": scheduler}))
    draw(second)
    draw(pipe)
    draw(second)
    assert seen.steps == [0, 1, 2, 3] * 3


def test_a_run_that_was_broken_off_leaves_nothing_behind(fitted, watch):
    class Stop(Exception):
        pass

    def stop(pipe, index, timestep, values):
        if index == 1:
            raise Stop
        return values

    pipe = fitted.pipe()
    seen = watch(pipe.transformer)
    with pytest.raises(Stop):
        draw(pipe, callback_on_step_end=stop)
    draw(pipe)
    assert seen.steps == [0, 1, 0, 1, 2, 3]


def test_two_calls_in_one_step_read_the_same_rows(fitted, watch):
    """Pipelines that call once for each half of guidance."""
    pipe = fitted.pipe()
    seen = watch(pipe.transformer)
    draw(pipe)
    for arguments, _, _ in list(seen.calls):
        for _ in range(2):
            pipe.transformer(**arguments)
    assert seen.steps[STEPS:] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_another_number_of_steps_is_refused_and_can_be_asked_for(fitted, watch):
    with pytest.raises(
        ValueError, match=r"tables for 4 denoising steps .*; draw with num_inference_steps=4, the scheduler"
    ):
        draw(fitted.pipe(), steps=STEPS + 1)
    pipe = fitted.pipe(nearest=True)
    seen = watch(pipe.transformer)
    draw(pipe, steps=7)
    assert seen.steps == sorted(seen.steps) and {*seen.steps} == {0, 1, 2, 3}


def test_a_pipeline_in_bfloat16_rounds_its_timesteps_and_reads_the_same_rows(fitted, watch, tmp_path):
    made, schedule = fitted.export, schedule_of(fitted.model, SAMPLER)
    save_quantized(tmp_path / "x", made.target, made.recipe, dtype=torch.bfloat16, about={}, schedule=schedule)
    pipe = quiet(DiffusionPipeline.from_pretrained(fitted.folder, torch_dtype=torch.bfloat16))
    seen = watch(load_quantized(tmp_path / "x", pipe))
    draw(pipe)
    assert seen.steps == [0, 1, 2, 3]
    told = [float(arguments["timestep"][0]) for arguments, _, _ in seen.calls]
    if fitted.model.spec.family == "flux":  # SD3's pipeline does not round
        assert told != list(schedule.timesteps)


def test_a_transformer_that_was_loaded_alone_finds_its_step_in_any_pipeline(fitted, watch):
    pipe = quiet(DiffusionPipeline.from_pretrained(fitted.folder))
    pipe.transformer = load_quantized(fitted.export.folder, pipe.transformer)
    seen = watch(pipe.transformer)
    draw(pipe)
    assert seen.steps == [0, 1, 2, 3]


def test_without_a_schedule_steps_are_counted_from_where_the_scheduler_begins(fitted, watch, tmp_path):
    """As exports of format version 1 are: image to image is followed, a pipeline with another scheduler is refused."""
    made = fitted.export
    save_quantized(tmp_path / "x", made.target, made.recipe, dtype=torch.float32, about={})
    pipe = quiet(DiffusionPipeline.from_pretrained(fitted.folder))
    seen = watch(load_quantized(tmp_path / "x", pipe))
    draw(quiet(IMG2IMG[fitted.model.spec.family](**pipe.components)), image=fitted.image, strength=0.5)
    draw(pipe)
    assert seen.steps == [2, 3, 0, 1, 2, 3]
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="written without its timesteps.*; does another pipeline call its transformer"):
        draw(quiet(type(pipe)(**pipe.components | {"scheduler": scheduler})))


def finder(*timesteps: float) -> StepFinder:
    return StepFinder(Schedule("timestep", timesteps), StepClock(len(timesteps)))


def test_rounding_to_half_precision_is_no_other_schedule():
    found = finder(*(1000 - 20 * step for step in range(50)))
    for step in range(50):
        for dtype in (torch.bfloat16, torch.float16):
            rounded = torch.tensor(1000.0 - 20 * step).to(dtype)
            assert found.step_at(float(rounded), dtype) == step
    with pytest.raises(ValueError, match="called at 990"):
        found.step_at(990.0)
    with pytest.raises(ValueError, match="called at 981"):
        found.step_at(981.0, torch.int64)


def test_a_rising_scale_is_rounded_by_its_larger_end():
    found = finder(0.0, 0.25, 0.5, 0.75)
    assert found.step_at(0.002, torch.bfloat16) == 0
    with pytest.raises(ValueError, match="called at 0.002"):
        found.step_at(0.002)


def test_the_timestep_of_a_call_is_that_of_its_noisiest_rows():
    """Numbers, integers, one for all, one a row, one a token: tokens that are given have less noise."""
    assert noisiest(7) == noisiest(torch.tensor(7)) == noisiest(torch.tensor([7, 7])) == 7
    assert noisiest(torch.tensor([[0.0, 500.5], [0.0, 500.5]])) == 500.5
    assert noisiest(torch.tensor([[1.0, 0.25]]), falling=False) == 0.25
    for wrong in (None, "7", torch.zeros(0)):
        with pytest.raises(ValueError, match="a timestep is a number or a tensor"):
            noisiest(wrong)


def test_the_timestep_is_known_by_the_names_that_transformers_give_it():
    for name in ("timestep", "timesteps", "t", "sigma"):
        assert time_argument({"hidden_states": 0, name: 0, "guidance": 0}) == name
    assert time_argument({"hidden_states": 0, "guidance": 0}) is None
