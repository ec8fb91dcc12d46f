"""Two transformers that share the steps of a sampler (Wan 2.2 A14B): one model of two experts, each quantized behind the other."""

from __future__ import annotations

import json
from types import SimpleNamespace

import diffusers
import pytest
import torch
from small_pipelines import SIZES, wan_of_two_experts

from ditbench.harness.build.attention import Sage
from ditbench.harness.build.build import build, clock_of, float_copy
from ditbench.harness.build.export import load_quantized, read_recipe, save_quantized
from ditbench.harness.calibration import recording as recordings
from ditbench.harness.calibration.recording import calibrate
from ditbench.harness.cli import main
from ditbench.harness.common.errors import UserError
from ditbench.harness.generation.generate import conditions
from ditbench.harness.models.base import LoadedModel, ModelSpec, Sampler
from ditbench.harness.models.loading import load_model
from ditbench.harness.models.schedule import schedule_of
from ditbench.harness.models.skeleton import skeleton
from ditbench.harness.quant.experts import FIRST, SECOND, Experts, placed, side_by_side, within
from ditbench.harness.quant.quantizers import ActQuant
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.smoothing import place
from ditbench.harness.quant.spec import QuantSpec
from ditbench.harness.quant.steps import StepTable
from ditbench.harness.quant.target import Target
from ditbench.harness.quant.transforms import Transform
from ditbench.harness.samples.samples import Prompt
from ditbench.harness.stages.experts import by_steps, steps_of

STEPS = 4  # of which the first two are of high noise
SAMPLER = Sampler("pipeline", STEPS, 3.0, guidance_2=2.0)
PROMPTS = (Prompt("a red circle"), Prompt("two blue squares"))
RUN = [
    "model=wan2.2-t2v-a14b", "model.name=small-wan2.2", "model.revision=null", f"protocol.steps={STEPS}", "protocol.n=2",
    "protocol.prompts=shapes", "calibration.n=2", "calibration.batch_size=2", "calibration.prompts=shapes-calibration",
    "generate.batch_size=2", "generate.noise_floor_seeds=0", "metrics.names=[psnr,sqnr]", "metrics.resamples=5",
    "measure.samples=1", "measure.repeats=1", "measure.warmup=0", "tracker=none",
    "model.size={" + ",".join(f"{name}:{pixels}" for name, pixels in SIZES["wan"].items()) + "}",
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wan2.2") / "checkpoint"
    wan_of_two_experts().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def spec(checkpoint) -> ModelSpec:
    return ModelSpec("small-wan2.2", "wan", source=str(checkpoint), size=SIZES["wan"])


@pytest.fixture(scope="module")
def model(spec) -> LoadedModel:
    return load_model(spec)


@pytest.fixture(scope="module")
def recording(model):
    return calibrate(model, SAMPLER, n=2, seed=0, prompts=PROMPTS)


@pytest.fixture(scope="module")
def run(checkpoint):
    def once(*arguments: str) -> SimpleNamespace:
        code = main(["run", *RUN, f"model.source={checkpoint}", f"results_dir={checkpoint.parent}", *arguments])
        name = arguments[0].removeprefix("name=")
        *_, path = sorted(checkpoint.parent.glob(f"runs/{name}/*/record.json"), key=lambda path: path.stat().st_mtime)
        return SimpleNamespace(code=code, record=json.loads(path.read_text()), folder=path.parent)

    return once


def test_both_experts_are_one_model_with_the_layers_sites_and_blocks_of_each(model):
    target = model.target()
    assert isinstance(model.transformer, Experts) and model.pipe.transformer_2 is None
    assert target.blocks == tuple(f"{name}.blocks.{index}" for name in (FIRST, SECOND) for index in (0, 1))
    known = {name for site in target.sites for name in site.consumers}
    for name in (FIRST, SECOND):
        own = [layer for layer in target.layers if layer.startswith(f"{name}.")]
        assert len(own) == len(target.layers) / 2 and known.issuperset(own)
    read = "condition_embedder.time_embedder"
    assert not any(read in layer for layer in model.target(scope="all").layers), "the model takes its dtype from these"


def test_samples_are_those_of_the_diffusers_pipeline_with_both_guidance_scales(model, checkpoint):
    wanted = conditions(model, 2, 0, prompts=PROMPTS)
    ours = model.adapter.sample(model.pipe, float_copy(model.target(), dtype=torch.float32), wanted, SAMPLER)
    pipe = diffusers.WanPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)

    def theirs(second: float):
        return pipe(
            prompt=[prompt.text for prompt in PROMPTS], num_inference_steps=STEPS, guidance_scale=3.0, guidance_scale_2=second,
            generator=[torch.Generator().manual_seed(seed) for seed in wanted.seeds], output_type="pt", **SIZES["wan"],
            max_sequence_length=min(512, pipe.tokenizer.model_max_length),
        ).frames  # fmt: skip

    torch.testing.assert_close((ours.pixels + 1) / 2, theirs(2.0).float(), rtol=0, atol=1e-4)
    assert float(((ours.pixels + 1) / 2 - theirs(3.0)).abs().max()) > 1e-3, "the second scale is seen"


def test_a_second_guidance_scale_needs_a_second_transformer(model, spec):
    alone = float_copy(within(model.target(), FIRST), dtype=torch.float32)
    with pytest.raises(UserError, match="guidance_2 is of a second transformer"):
        model.adapter.sample(model.pipe, alone, conditions(model, 1, 0, prompts=PROMPTS), SAMPLER)


def test_the_steps_of_each_expert_are_those_at_which_the_pipeline_calls_it(model, recording):
    called = []
    transformer = float_copy(model.target(), dtype=torch.float32)
    for name in (FIRST, SECOND):
        transformer.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad():
        for step in range(STEPS):
            recording.call(transformer, step, recording.rows(step, 1))
    expected = steps_of(model, SAMPLER)
    assert [name for name in (FIRST, SECOND) for _ in expected[name]] == called == [FIRST, FIRST, SECOND, SECOND]
    assert schedule_of(model, SAMPLER).timesteps == pytest.approx(model.adapter.timesteps(model.pipe, SAMPLER))


def test_rows_of_both_sides_in_one_call_are_refused(model):
    with pytest.raises(ValueError, match="both sides of 850"):
        model.transformer.chosen(torch.tensor([950.0, 100.0]))


def recipe_of(part: Target, steps: range) -> ModelRecipe:
    """Folds and online transforms, with shifts that differ from step to step, and static ranges."""
    generator = torch.Generator().manual_seed(1)
    by_site = {}
    for site in part.linear_sites():
        width = part.module(site.consumers[0]).weight.shape[1]
        rows = torch.randn(len(steps), width, generator=generator)
        shift = StepTable(rows, torch.arange(len(steps))) if site.foldable else None
        by_site[site.name] = Transform(scale_C=torch.rand(width, generator=generator) + 0.5, shift=shift)
    transforms, folded = place(part, by_site)
    return ModelRecipe({name: LayerRecipe(t) for name, t in transforms.items()}, folded, num_steps=len(steps))


def test_folds_of_each_expert_keep_the_float_output_in_float64_at_every_step(model, recording):
    target = model.target()
    parts = [
        placed(recipe_of(within(target, name), steps), name, steps, STEPS)
        for name, steps in steps_of(model, SAMPLER).items()
    ]
    recipe = side_by_side(parts)
    assert len(recipe.folded) == 2 * len(parts[0].folded) and recipe.num_steps == STEPS
    plain, changed = float_copy(target, dtype=torch.float64), build(target, recipe, dtype=torch.float64)
    with torch.no_grad():
        for step in range(STEPS):
            expected, found = (recording.call(each, step, recording.rows(step, 4))[0] for each in (plain, changed))
            assert float((found - expected).norm() / expected.norm()) < 1e-6


def test_tables_of_an_expert_have_their_own_rows_at_its_own_steps():
    table = StepTable(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]))
    spec = QuantSpec(bits=8, granularity="per_tensor", dynamic=False)
    recipe = ModelRecipe({"a": LayerRecipe(act=ActQuant(spec, scale=table))}, num_steps=2)
    found = placed(recipe, SECOND, range(2, 4), 4).layers[f"{SECOND}.a"].act.scale
    assert [float(found.at(torch.tensor(step))) for step in (2, 3)] == [1.0, 2.0] and found.num_steps == 4


def test_multiply_accumulates_and_bytes_of_both_are_counted_each_by_its_steps(model):
    macs = model.macs
    layer = "blocks.0.ffn.net.0.proj"
    assert macs[f"{FIRST}.{layer}"] == macs[f"{SECOND}.{layer}"] > 0
    assert macs[""] == 2 * macs[FIRST] == 2 * macs[SECOND]
    three_of_four = SimpleNamespace(
        transformer=model.transformer, pipe=None, adapter=SimpleNamespace(timesteps=lambda *_: [999, 950, 900, 100])
    )
    weighted = by_steps(macs, three_of_four, SAMPLER)
    assert weighted[f"{FIRST}.{layer}"] == 3 * weighted[f"{SECOND}.{layer}"]
    assert weighted[""] == 4 * macs[FIRST]


def test_the_second_expert_is_calibrated_behind_the_quantized_first(run, monkeypatch):
    """What it is recorded on is not the float model's, and its own steps only; the first one's are the float model's."""
    seen = []

    def spied(*args, **kwargs):
        found = original(*args, **kwargs)
        seen.append((kwargs.get("behind"), found))
        return found

    original = recordings.calibrate
    monkeypatch.setattr(recordings, "calibrate", spied)
    done = run("name=w4", "method=smoothquant", "bits=w4a4")
    assert done.code == 0 and done.record["status"] == "ok", done.record["error"]
    (nothing, first), (behind, second) = seen
    assert nothing is None and behind is not None and first.key != second.key
    assert torch.equal(*(each.steps[0][0]["hidden_states"] for each in (first, second))), "the same noise"
    assert not torch.equal(*(each.steps[-1][0]["hidden_states"] for each in (first, second)))
    built = behind.build()
    layers = {name for name, module in built.named_modules() if type(module).__name__ == "QuantLinear"}
    assert layers and all(name.startswith(f"{FIRST}.") for name in layers)
    bits = done.record["bits"]
    assert all(any(name.startswith(f"{each}.") for name in done.record["layers"]) for each in (FIRST, SECOND))
    assert all(entry["sqnr_db"] > 0 for entry in done.record["layers"].values())
    assert 0.5 < bits["mac_share_quantized"] < 1 and bits["weight_bits_effective"] < 16


def test_the_second_expert_is_calibrated_behind_the_first_ones_attention_too(run, monkeypatch):
    seen, original = [], recordings.calibrate
    monkeypatch.setattr(
        recordings, "calibrate", lambda *args, **more: seen.append(more.get("behind")) or original(*args, **more)
    )
    done = run("name=attention", "method=smoothquant", "bits=w8a8", "protocol.attention=int8")
    assert done.code == 0 and done.record["status"] == "ok", done.record["error"]
    given = {
        name for name, module in seen[1].build().named_modules() if isinstance(getattr(module, "attend", None), Sage)
    }
    every = set(done.record["bits"]["attention_operands_quantized"])
    assert given == {name for name in every if name.startswith(f"{FIRST}.")} and len(every) == 2 * len(given) > 0


@pytest.mark.parametrize(("method", "bits"), [("gptq", "w4a8"), ("ptq4dm", "w8a8"), ("fp", "w16a16")])
def test_methods_that_walk_blocks_or_choose_their_rows_see_one_expert_at_a_time(method, bits, run):
    done = run(f"name={method}", f"method={method}", f"bits={bits}")
    assert done.code == 0 and done.record["status"] == "ok", done.record["error"]


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (("method=ptqd", "bits=w8a8"), "corrects the sampler for one transformer"),
        (("method=rtn", "bits=mixed", "bits.budget.bytes=1000000"), "shares one budget"),
    ],
)
def test_what_knows_one_transformer_is_refused_with_the_reason(changed, why, run):
    done = run(f"name={changed[0].removeprefix('method=')}-refused", *changed)
    assert done.code == 3 and why in done.record["error"]


def test_who_asks_for_no_data_has_nothing_recorded_behind_the_first_expert(run, monkeypatch):
    recorded, original = [], recordings.calibrate
    monkeypatch.setattr(recordings, "calibrate", lambda *args, **more: recorded.append(1) or original(*args, **more))
    done = run("name=rtn", "method=rtn", "bits=w8a8")
    assert done.code == 0 and len(recorded) == 1


def test_half_precision_leaves_in_float32_what_the_class_of_the_experts_says(model):
    half = float_copy(model.target(), dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    kept = {name for name, tensor in half.named_parameters() if tensor.dtype == torch.float32}
    assert {f"{name}.condition_embedder.time_embedder.linear_1.weight" for name in (FIRST, SECOND)} <= kept


def test_a_skeleton_has_both_experts_without_their_weights(spec, model):
    bare = skeleton(spec)
    assert isinstance(bare.transformer, Experts) and bare.fingerprint == model.fingerprint
    assert all(parameter.is_meta for parameter in bare.transformer.parameters())


def test_an_export_goes_back_into_the_pipeline_of_two_transformers(model, checkpoint, tmp_path):
    target = model.target()
    parts = [
        placed(recipe_of(within(target, name), steps), name, steps, STEPS)
        for name, steps in steps_of(model, SAMPLER).items()
    ]
    save_quantized(
        tmp_path / "export", target, side_by_side(parts), dtype=torch.float32, about={}, schedule=schedule_of(model, SAMPLER)
    )  # fmt: skip
    pipe = diffusers.WanPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)

    def drawn():
        return pipe(
            prompt="a red circle", num_inference_steps=STEPS, guidance_scale=3.0, guidance_scale_2=2.0, output_type="latent",
            generator=torch.Generator().manual_seed(0), **SIZES["wan"], max_sequence_length=12,
        ).frames  # fmt: skip

    expected = drawn()
    loaded = load_quantized(tmp_path / "export", pipe)
    assert pipe.transformer is loaded and pipe.transformer_2 is loaded and clock_of(loaded).num_steps == STEPS
    torch.testing.assert_close(drawn(), expected, rtol=1e-3, atol=1e-4)


def test_an_export_of_a_run_has_the_attention_of_both(run, tmp_path):
    """It is the protocol's, and no part of what the method learned."""
    done = run("name=attention-exported", "method=rtn", "bits=w8a8", "protocol.attention=int8")
    assert done.code == 0 and main(["export", str(done.folder), "--out", str(tmp_path / "export")]) == 0
    described = read_recipe(tmp_path / "export")
    assert {name.split(".")[0] for name in described["attention"]} == {FIRST, SECOND}
    assert len(described["attention"]) == 8, "two blocks of each, with self- and cross-attention"
