"""Every text-told family end to end: a small random pipeline of its real classes, saved, loaded, sampled, quantized."""

from __future__ import annotations

import pytest
import torch
from small_pipelines import SIZES, SMALL
from torch import Tensor

from ditbench.harness.build.build import build, float_copy
from ditbench.harness.build.step_finder import StepFinder
from ditbench.harness.calibration import block_stream
from ditbench.harness.calibration.block_stream import BlockStream
from ditbench.harness.calibration.recording import Calibration, calibrate
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import tensors_sha256
from ditbench.harness.generation.generate import conditions, generate
from ditbench.harness.models.base import LoadedModel, ModelSpec, Sampler
from ditbench.harness.models.loading import load_model
from ditbench.harness.models.schedule import schedule_of
from ditbench.harness.quant.blocks import NotInLine
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.smoothing import place
from ditbench.harness.quant.steps import StepClock, StepTable
from ditbench.harness.quant.target import Target
from ditbench.harness.quant.transforms import Transform
from ditbench.harness.samples.samples import Prompt

PROMPTS = (Prompt("a red circle"), Prompt("two blue squares"), Prompt("a cross above a white triangle"))
STEPS = 2
IN_FLOAT32 = ("wan",)  # norms and modulation whatever the model's dtype


@pytest.fixture(scope="module", params=sorted(SMALL))
def model(request, tmp_path_factory) -> LoadedModel:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    SMALL[request.param]().save_pretrained(folder)
    return load_model(
        ModelSpec(f"small-{request.param}", request.param, source=str(folder), size=SIZES.get(request.param))
    )


@pytest.fixture(scope="module")
def sampler(model) -> Sampler:
    return Sampler(model.adapter.SAMPLERS[0], STEPS, 2.0)


@pytest.fixture(scope="module")
def calibration(model, sampler) -> Calibration:
    return calibrate(model, sampler, n=2, seed=0, prompts=PROMPTS)


def output(model: LoadedModel, transformer, dtype: torch.dtype, calibration: Calibration, step: int = 1) -> Tensor:
    with torch.no_grad():
        return calibration.call(transformer, step, calibration.per_step[step])[0].to(dtype)


def test_the_schedule_is_what_the_transformer_was_told_in_a_run(model, sampler, calibration):
    schedule = schedule_of(model, sampler)
    told = [{float(value) for call in calls for value in call[schedule.argument]} for calls in calibration.steps]
    assert told == [{timestep} for timestep in schedule.timesteps]
    assert not hasattr(model.transformer, "clock") and "forward" not in vars(model.transformer)


def test_an_export_would_find_every_step_of_a_run(model, sampler, calibration):
    transformer, clock = float_copy(model.target(), dtype=torch.float32), StepClock(STEPS)
    StepFinder(schedule_of(model, sampler), clock).attach(transformer)
    for step in reversed(range(STEPS)):
        output(model, transformer, torch.float32, calibration, step)
        assert int(clock.step) == step


def test_every_layer_of_the_blocks_reads_a_known_site_once(model):
    target = model.target()
    assert set(target.layers) <= {name for site in target.sites for name in site.consumers}
    names = [name for site in target.sites for name in site.consumers]
    assert len(names) == len(set(names))


def test_a_recording_gives_the_call_back(model, sampler, calibration):
    """What the pipeline called its transformer with, called again from the recording, gives the same."""
    seen = []
    transformer = float_copy(model.target(), dtype=torch.float32)
    handle = transformer.register_forward_hook(lambda module, args, result: seen.append(result[0]))
    with torch.no_grad():
        model.adapter.sample(
            model.pipe, transformer, conditions_of(model, 2, stream="calibration"), sampler, decode=False
        )
    handle.remove()
    again = [output(model, transformer, torch.float32, calibration, step) for step in range(STEPS)]
    torch.testing.assert_close(torch.cat(seen), torch.cat(again), rtol=1e-4, atol=1e-4)


def conditions_of(model, n, stream="generate"):
    from ditbench.harness.calibration.recording import conditions_for_calibration

    return (
        conditions_for_calibration(model, n, 0, PROMPTS)
        if stream == "calibration"
        else conditions(model, n, 0, prompts=PROMPTS)
    )


def folds(target: Target) -> tuple[dict[str, Transform], frozenset[str]]:
    generator = torch.Generator().manual_seed(1)
    by_site = {}
    for site in target.linear_sites():
        width = target.module(site.consumers[0]).weight.shape[1]
        scale = torch.rand(width, generator=generator) + 0.5
        shift = StepTable(torch.randn(2, width, generator=generator), torch.tensor([0, 1]))
        by_site[site.name] = Transform(scale_C=scale, shift=shift if site.foldable else None)
    return place(target, by_site)


def test_folds_keep_the_float_output_in_float64(model, calibration):
    target = model.target()
    transforms, folded = folds(target)
    recipe = ModelRecipe({name: LayerRecipe(t) for name, t in transforms.items()}, folded, num_steps=STEPS)
    plain, changed = float_copy(target, dtype=torch.float64), build(target, recipe, dtype=torch.float64)
    for step in range(STEPS):
        expected, found = (output(model, each, torch.float64, calibration, step) for each in (plain, changed))
        tolerance = 1e-6 if model.spec.family in IN_FLOAT32 else 1e-8
        assert float((found - expected).norm() / expected.norm()) < tolerance
    if folded:
        assert all(site.foldable for site in target.sites if site.name in folded)


def test_a_sample_does_not_depend_on_its_batch(model, sampler):
    transformer = float_copy(model.target(), dtype=torch.float32)
    wanted = conditions(model, 3, 0, prompts=PROMPTS)
    together = generate(model, transformer, wanted, sampler, batch_size=3)
    alone = generate(model, transformer, wanted, sampler, batch_size=1)
    torch.testing.assert_close(together.latents, alone.latents, rtol=1e-3, atol=1e-4)
    assert len(together) == 3 and together.prompts == PROMPTS
    assert float(together.pixels.float().std()) > 1


def test_samples_are_those_of_the_diffusers_pipeline(model, sampler):
    wanted = conditions(model, 2, 0, prompts=PROMPTS)
    with torch.no_grad():
        ours = model.adapter.sample(model.pipe, float_copy(model.target(), dtype=torch.float32), wanted, sampler)
        theirs = model.pipe(
            prompt=[prompt.text for prompt in wanted.prompts],
            num_inference_steps=STEPS,
            guidance_scale=2.0,
            generator=[torch.Generator().manual_seed(seed) for seed in wanted.seeds],
            output_type="pt",
            return_dict=False,
            **model.adapter.call(model.pipe) | model.adapter.size,
        )[0]
    torch.testing.assert_close((ours.pixels + 1) / 2, theirs.float(), rtol=0, atol=1e-4)


def test_blocks_walked_one_by_one_are_the_model(model, calibration):
    """The state behind the last block, block by block, is what the model itself computes."""
    target = model.target()
    transformer = float_copy(target, dtype=torch.float32)
    if isinstance(target.block_call, NotInLine):
        with pytest.raises(UserError, match="block by block"):
            BlockStream(transformer, target, calibration)
        return
    last, seen = transformer.get_submodule(target.blocks[-1]), []
    handle = last.register_forward_hook(lambda module, args, result: seen.append(result))
    for step in range(STEPS):
        output(model, transformer, torch.float32, calibration, step)
    handle.remove()
    stream = BlockStream(transformer, target, calibration)
    for _ in stream:
        pass
    found = torch.cat([call.hidden_BTC.flatten() for call in stream.inputs])
    expected = [
        part for result in seen for part in (result if isinstance(result, tuple) else (result,)) if part is not None
    ]
    assert found.numel() == sum(part.numel() for part in expected)
    torch.testing.assert_close(
        found.sort().values, torch.cat([part.flatten() for part in expected]).sort().values, rtol=1e-3, atol=1e-4
    )


def test_blocks_walked_on_disk_are_those_walked_in_memory_and_tables_are_held_once(model, calibration, monkeypatch):
    """Whatever a family's blocks are called with: masks, complex tables, lists."""
    target = model.target()
    if isinstance(target.block_call, NotInLine):
        pytest.skip("refuses methods that work block by block")
    transformer = float_copy(target, dtype=torch.float32)
    held = BlockStream(transformer, target, calibration)
    monkeypatch.setattr(block_stream, "HELD_BYTES", 0)
    stored = BlockStream(transformer, target, calibration)
    for _ in zip(held, stored, strict=True):
        pass
    for one, other in zip(held.inputs, stored.inputs, strict=True):
        assert torch.equal(one.hidden_BTC, other.hidden_BTC) and one.is_like(other)
        for name, rows in one.others.items():
            assert all(torch.equal(a, b) for a, b in zip(rows, other.others[name], strict=True))
    tables = [table for call in held.inputs for table in call.others.shape.shared.values()]
    assert len({id(table) for table in tables}) == len({tensors_sha256({"": table}) for table in tables})


def test_some_rows_of_a_blocks_input_give_what_they_gave_among_all(model, calibration):
    """Its other arguments go with them, nested ones too (LTX's tables of positions have a row per sample)."""
    target = model.target()
    if isinstance(target.block_call, NotInLine):
        return
    transformer = float_copy(target, dtype=torch.float32)
    stream = BlockStream(transformer, target, calibration)
    block, kept = transformer.get_submodule(target.blocks[0]), torch.tensor([1, 0])
    (call, *_), (whole, *_) = list(stream.calls()), list(stream.outputs(block))
    some = call.rows(kept)
    transformer.clock.set(call.step, STEPS)
    with torch.no_grad():
        torch.testing.assert_close(stream.run(block, some.hidden_BTC, some.kwargs), whole[kept], rtol=1e-4, atol=1e-5)


def test_half_precision_leaves_in_float32_what_the_class_says(tmp_path):
    SMALL["wan"]().save_pretrained(tmp_path / "wan")
    model = load_model(ModelSpec("wan", "wan", source=str(tmp_path / "wan"), size=SIZES.get("wan")))
    kept = set(model.transformer._keep_in_fp32_modules)
    assert "time_embedder" in kept
    for name, tensor in float_copy(model.target(), dtype=torch.bfloat16).named_parameters():
        wanted = torch.bfloat16 if kept.isdisjoint(name.split(".")) else torch.float32
        assert tensor.dtype == wanted, name
