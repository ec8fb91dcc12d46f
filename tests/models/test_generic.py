"""Nine pipelines that no family knows, end to end through `generic`: small, random, of their real classes.

Prompts of unequal length, so that conditional and null calls differ where the pipeline makes two of them.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from generic_pipelines import GENERIC, GENERIC_SIZES
from small_pipelines import wan_of_two_experts
from torch import Tensor, nn

from ditbench.harness.build.build import build, float_copy
from ditbench.harness.calibration.on_disk import StoredList
from ditbench.harness.calibration.recording import Calibration, calibrate, conditions_for_calibration
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.paths import CONF
from ditbench.harness.fitting.conformance import DYNAMIC, STATIC
from ditbench.harness.generation.generate import conditions, generate
from ditbench.harness.measurement.layer_errors import error_atlas
from ditbench.harness.models.base import LoadedModel, ModelSpec, Sampler
from ditbench.harness.models.calls import Call, count_rows, row_dims
from ditbench.harness.models.families.generic import FAMILY
from ditbench.harness.models.loading import check_only_one_denoises, load_model
from ditbench.harness.samples.samples import Prompt, Samples
from ditbench.methods import rtn, smoothquant

PAGE = CONF.parent / "docs" / "models.md"
PROMPTS = (
    Prompt("a red circle"),
    Prompt(
        "two blue squares left of a green cross and three white triangles above a yellow circle right of a red square"
    ),
    Prompt("a cross"),
)
SAMPLER = Sampler("pipeline", 2, 2.0)
BATCH = 2  # of three samples: the last call has fewer rows
LENGTHS_DIFFER = ("qwen_image", "cogview4")  # two calls a step whose texts are as long as they are
TWO_CALLS = (*LENGTHS_DIFFER, "chroma", "flux2_klein")
BY_ITS_BATCH = ("cogview4",)  # pads to the longest text of the batch and masks nothing


@pytest.fixture(scope="module", params=sorted(GENERIC))
def model(request, tmp_path_factory) -> LoadedModel:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    GENERIC[request.param]().save_pretrained(folder)
    return load_model(ModelSpec(request.param, "generic", source=str(folder), size=GENERIC_SIZES[request.param]))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def calibration(model, cache) -> Calibration:
    return calibrate(model, SAMPLER, n=3, seed=0, prompts=PROMPTS, batch_size=BATCH, cache=cache)


@pytest.fixture(scope="module")
def transformer(model) -> torch.nn.Module:
    return float_copy(model.target(), dtype=torch.float32)


@pytest.fixture(scope="module")
def exact(model, transformer) -> Samples:
    """The float model's."""
    return generate(model, transformer, conditions(model, 3, 0, prompts=PROMPTS), SAMPLER, batch_size=BATCH)


def one_per_row(sample: Tensor | list[Tensor]) -> Tensor:
    return torch.stack(sample) if isinstance(sample, list) else sample


def test_a_recording_gives_every_call_back(model, transformer, calibration):
    """In the order in which the pipeline made them, each with its own shapes."""
    seen: list[list[Tensor]] = [[], []]
    handle = transformer.register_forward_hook(
        lambda module, args, result: seen[int(module.clock.step)].append(one_per_row(result[0]))
    )
    wanted = conditions_for_calibration(model, 3, 0, PROMPTS)
    with torch.no_grad():
        for start in range(0, 3, BATCH):
            part = wanted.rows(start, min(start + BATCH, 3))
            model.adapter.sample(model.pipe, transformer, part, SAMPLER, decode=False)
    handle.remove()
    for step, outputs in enumerate(seen):
        calls = calibration.steps[step]
        assert len(calls) == len(outputs) == (4 if model.spec.name in TWO_CALLS else 2)
        for call, expected in zip(calls, outputs, strict=True):
            with torch.no_grad():
                found = calibration.call(transformer, step, call).sample
            assert call.num_rows == len(expected)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_calls_of_prompts_of_unequal_length_keep_their_shapes(model, calibration):
    if model.spec.name in LENGTHS_DIFFER:
        lengths = [[call["encoder_hidden_states"].shape[1] for call in calls] for calls in calibration.steps]
        assert all(len(set(found)) > 1 for found in lengths) and lengths[0] == lengths[1]
        with pytest.raises(UserError, match="differ in their shapes"):
            _ = calibration.per_step
    if model.spec.name == "z_image":
        lengths = [len(text) for text in calibration.steps[0][0]["cap_feats"]]
        assert len(set(lengths)) == 3, "two captions and twice the null one"
    if model.spec.name == "hidream":
        assert calibration.steps[0][0]["encoder_hidden_states_llama3"].shape[:2] == (4, 3), "rows first, then layers"


def test_some_rows_of_a_call_give_what_they_gave_among_all(transformer, calibration):
    for call in calibration.rows(1, 100):
        kept = torch.tensor([call.num_rows - 1, 0])
        with torch.no_grad():
            whole, some = (calibration.call(transformer, 1, each).sample for each in (call, call.pick(kept)))
        torch.testing.assert_close(some, whole[kept], rtol=1e-3, atol=1e-4)


def stored(call: Call, path: str) -> set[str]:
    """Under which hashes of content the rows of an argument lie on disk."""
    rows = call.rows[path]
    return {each.name for each in (rows.tensors if isinstance(rows, StoredList) else [rows])}


def test_what_is_read_again_is_what_was_recorded_and_text_is_stored_once(model, calibration, cache):
    again = calibrate(model, SAMPLER, n=3, seed=0, prompts=PROMPTS, batch_size=BATCH, cache=cache)
    assert again.key == calibration.key and "calibration" in again.saved_s
    for ours, theirs in zip(calibration.steps, again.steps, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.is_like(other)
            for first, second in zip(one.tensors(), other.tensors(), strict=True):
                assert torch.equal(first, second)
    first, second = ({name for call in calls for path in call for name in stored(call, path)} for calls in again.steps)
    text = [name for name in again.steps[0][0] if "encoder" in name or name == "cap_feats"]
    assert text
    for call in again.steps[0]:
        for name in text:
            assert name not in call or stored(call, name) <= second
    assert first != second, "latents differ"


@pytest.mark.parametrize("method, bits", [(rtn, STATIC), (smoothquant, DYNAMIC)], ids=["rtn", "smoothquant"])
def test_it_is_quantized_draws_and_has_its_layer_errors(model, exact, calibration, method, bits):
    target = model.target()
    recipe = method.apply(target, method.fit(target, calibration, bits, method.Params()), bits, method.Params())
    quantized = build(target, recipe, dtype=torch.float32)
    atlas = error_atlas(target, recipe, quantized, calibration)
    assert set(atlas.names) == {*target.layers, *target.blocks}
    assert all(10 < atlas.pooled_db(name) < 60 for name in atlas.names)
    drawn = generate(model, quantized, conditions(model, 3, 0, prompts=PROMPTS), SAMPLER, batch_size=BATCH)
    error, signal = ((drawn.latents - exact.latents).square().sum(), exact.latents.square().sum())
    assert 0 < float(error) < 0.2 * float(signal)
    assert len(drawn) == 3 and float(drawn.pixels.float().std()) > 1


def test_norms_modulation_and_lone_projections_stay_in_float(model):
    layers = model.target().layers
    assert layers and not [name for name in layers if "norm" in name or "mod" in name.lower().replace("model", "")]
    assert not [name for name in layers if name.startswith("caption_projection")]


def test_a_sample_does_not_depend_on_its_batch_but_where_the_pipeline_makes_it(model, transformer, exact):
    alone = generate(model, transformer, conditions(model, 3, 0, prompts=PROMPTS), SAMPLER, batch_size=1)
    difference = float((exact.latents - alone.latents).abs().max())
    assert difference > 1e-3 if model.spec.name in BY_ITS_BATCH else difference < 1e-3


def test_samples_are_those_of_the_diffusers_pipeline(model, transformer):
    wanted = conditions(model, 2, 0, prompts=PROMPTS)
    true_guidance = {"true_cfg_scale": 2.0, "negative_prompt": [" ", " "]}
    guidance = true_guidance if model.spec.name == "qwen_image" else {"guidance_scale": 2.0}
    with torch.no_grad():
        ours = model.adapter.sample(model.pipe, transformer, wanted, SAMPLER)
        theirs = model.pipe(
            prompt=[prompt.text for prompt in wanted.prompts],
            num_inference_steps=2,
            generator=[torch.Generator().manual_seed(seed) for seed in wanted.seeds],
            output_type="pt",
            return_dict=False,
            **guidance,
            **GENERIC_SIZES[model.spec.name],
        )[0]
    torch.testing.assert_close((ours.pixels + 1) / 2, theirs.float(), rtol=0, atol=1e-4)


def test_two_denoising_networks_that_share_the_steps_are_one_model_of_two_experts(tmp_path):
    wan_of_two_experts().save_pretrained(tmp_path)
    model = load_model(ModelSpec("wan2.2", "generic", source=str(tmp_path)))
    assert {name.partition(".")[0] for name in model.target().layers} == {"transformer", "transformer_2"}


def test_videos_smaller_than_a_tile_of_their_vae_are_refused(tmp_path):
    GENERIC["allegro"]().save_pretrained(tmp_path)
    size = {"height": 64, "width": 128, "num_frames": 24}
    with pytest.raises(
        UserError, match="24 frames of 128×128; model.size has height=64, of which it would decode nothing"
    ):
        load_model(ModelSpec("allegro", "generic", source=str(tmp_path), size=size))


def test_any_second_denoising_network_is_refused_whatever_it_is_called():
    parts = {
        "transformer": nn.Linear(1, 1),
        "unconditional_transformer": nn.Linear(1, 1),
        "text_encoder": nn.Linear(1, 1),
    }
    with pytest.raises(UserError, match="two denoising networks, transformer and unconditional_transformer"):
        check_only_one_denoises(SimpleNamespace(components=parts))
    check_only_one_denoises(SimpleNamespace(components=parts | {"unconditional_transformer": None}))


def test_one_sample_is_one_row_of_a_call_without_guidance(model):
    """What is measured and counted; Z-Image guides at every scale above 0."""
    dims = row_dims(model.step_inputs(2), model.step_inputs(3), model.adapter.ROWS)
    assert [count_rows(model.step_inputs(batch), dims) for batch in (1, 4)] == [1, 4]


@pytest.mark.skipif(not PAGE.exists(), reason="not a source checkout")
def test_the_page_of_models_says_that_all_of_these_run():
    rows = [line.split("|") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    runs = [re.sub(r"\W", "", row[1]).lower() for row in rows if row[2].strip() == "runs"]
    assert len(runs) == len(GENERIC)
    assert all(any(found.startswith(name.replace("_", "")) for found in runs) for name in GENERIC)


def test_a_pipeline_without_a_guidance_argument_is_told_so():
    class Unguided:
        def __call__(self, prompt):
            """Nothing to guide with."""

    with pytest.raises(
        UserError, match="a Unguided takes its guidance neither as guidance_scale nor as true_cfg_scale"
    ):
        FAMILY.settings(Unguided(), 2.0, 1)
    assert FAMILY.settings(Unguided(), 1.0, 1) == {}
