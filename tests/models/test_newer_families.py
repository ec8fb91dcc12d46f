"""The families of 2025 and 2026: small random pipelines of their real classes, folded, walked block by block, run to the record."""

from __future__ import annotations

import json

import pytest
import torch
from newer_pipelines import CONFIGURATIONS, DRAWN, NEWER, NEWER_SIZES, family_of
from torch import Tensor

from ditbench.harness.build.build import build, float_copy
from ditbench.harness.calibration.block_stream import BlockStream
from ditbench.harness.calibration.recording import Calibration, calibrate
from ditbench.harness.cli import main
from ditbench.harness.common.errors import UserError
from ditbench.harness.generation.generate import conditions, generate
from ditbench.harness.models import known_families
from ditbench.harness.models.base import LoadedModel, ModelSpec, Sampler
from ditbench.harness.models.counts import counted
from ditbench.harness.models.loading import load_model
from ditbench.harness.models.skeleton import skeleton
from ditbench.harness.quant.blocks import NotInLine
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.smoothing import place
from ditbench.harness.quant.steps import StepTable
from ditbench.harness.quant.target import Target
from ditbench.harness.quant.transforms import Transform
from ditbench.harness.records.drawn_samples import samples_of
from ditbench.harness.records.record import read
from ditbench.harness.samples.samples import Prompt

PROMPTS = (Prompt("a red circle"), Prompt("two blue squares left of a green cross"), Prompt("a cross"))
STEPS = 2
FOLDED = {  # of a family with a block of each kind: how many sites fold, of how many
    "flux2": (2 * 5 + 2, 2 * 7 + 2 * 2), "qwen_image": (10, 14), "z_image": (2, 8), "hunyuan_video15": (10, 14), "chroma": (2 * 5 + 2, 2 * 7 + 2 * 2), "sana_video": (4, 10),
    "kandinsky5": (10, 14), "kandinsky5_t2i": (10, 14), "ltx2": (2 * 14, 2 * 20), "hidream": (4 + 2, 15 + 12),
}  # fmt: skip

IN_FLOAT32 = ("kandinsky5", "kandinsky5_t2i")  # norms and modulation whatever the model's dtype
LEAST_SHARE = {  # its text's embedder is 2,048 wide, however small the model is; attention over 768 tokens of 16 channels
    "hunyuan_video15": 0.005,
    "ltx2": 0.05,
}


@pytest.fixture(scope="module", params=sorted(NEWER))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(family, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(family) / "checkpoint"
    NEWER[family]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(family, checkpoint) -> LoadedModel:
    return load_model(ModelSpec(f"small-{family}", family_of(family), source=str(checkpoint), size=NEWER_SIZES[family]))


@pytest.fixture(scope="module")
def sampler(model) -> Sampler:
    return Sampler("pipeline", STEPS, 2.0)


@pytest.fixture(scope="module")
def calibration(model, sampler) -> Calibration:
    return calibrate(model, sampler, n=2, seed=0, prompts=PROMPTS)


def outputs(transformer, dtype: torch.dtype, calibration: Calibration, step: int) -> Tensor:
    with torch.no_grad():
        found = [calibration.call(transformer, step, call) for call in calibration.rows(step, 4)]
    parts = [each[0] for each in found]
    return torch.cat([torch.stack(part) if isinstance(part, list) else part for part in parts]).to(dtype)


def test_every_layer_of_the_blocks_reads_a_known_site_once(model):
    target = model.target()
    names = [name for site in target.sites for name in site.consumers]
    assert set(target.layers) <= set(names) and len(names) == len(set(names))
    in_blocks = [site for site in target.sites if site.name.startswith(target.blocks)]
    assert all(len(site.consumers) > 1 or site.name not in site.consumers for site in in_blocks), "a site by its words"


def test_samples_are_those_of_the_diffusers_pipeline_and_do_not_depend_on_their_batch(model, sampler):
    wanted = conditions(model, 3, 0, prompts=PROMPTS)
    transformer = float_copy(model.target(), dtype=torch.float32)
    with torch.no_grad():
        ours = model.adapter.sample(model.pipe, transformer, wanted, sampler)
        model.pipe.register_modules(**model.adapter.parts(model.pipe, 2.0))
        theirs = [
            model.pipe(
                prompt=[prompt.text], num_inference_steps=STEPS, output_type="pt", return_dict=False,
                generator=torch.Generator().manual_seed(seed), **model.adapter.settings(model.pipe, 2.0, 1),
            )[0]
            for prompt, seed in zip(PROMPTS, wanted.seeds, strict=True)
        ]  # fmt: skip
    torch.testing.assert_close((ours.pixels + 1) / 2, torch.cat(theirs).float(), rtol=0, atol=1e-4)
    alone = generate(model, transformer, wanted, sampler, batch_size=1)
    torch.testing.assert_close(alone.latents[:], ours.latents, rtol=1e-3, atol=1e-4)
    assert float(alone.pixels[:].float().std()) > 1


def folds(target: Target) -> tuple[dict[str, Transform], frozenset[str]]:
    generator = torch.Generator().manual_seed(1)
    by_site = {}
    for site in target.linear_sites():
        width = target.module(site.consumers[0]).weight.shape[1]
        scale = torch.rand(width, generator=generator) + 0.5
        shift = StepTable(torch.randn(2, width, generator=generator), torch.tensor([0, 1]))
        by_site[site.name] = Transform(scale_C=scale, shift=shift if site.foldable else None)
    return place(target, by_site)


def test_folds_keep_the_float_output_in_float64(family, model, calibration):
    target = model.target()
    transforms, folded = folds(target)
    assert (len(folded), len(target.linear_sites())) == FOLDED[family]
    recipe = ModelRecipe({name: LayerRecipe(t) for name, t in transforms.items()}, folded, num_steps=STEPS)
    plain, changed = float_copy(target, dtype=torch.float64), build(target, recipe, dtype=torch.float64)
    for step in range(STEPS):
        expected, found = (outputs(each, torch.float64, calibration, step) for each in (plain, changed))
        assert float((found - expected).norm() / expected.norm()) < (1e-6 if family in IN_FLOAT32 else 1e-8)


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
    with torch.no_grad():
        for step, call in calibration.batches():
            calibration.call(transformer, step, call)
    handle.remove()
    stream = BlockStream(transformer, target, calibration)
    for _ in stream:
        pass
    found = torch.cat([call.hidden_BTC.flatten() for call in stream.inputs])
    parts = [part for result in seen for part in (result if isinstance(result, tuple) else (result,))]
    expected = torch.cat([part.flatten() for part in parts if part is not None])
    torch.testing.assert_close(found.sort().values, expected.sort().values, rtol=1e-3, atol=1e-4)


def test_a_plan_counts_without_weights_what_the_model_computes(family, model, sampler):
    found = counted(skeleton(model.spec), sampler)
    assert found.call_macs == model.macs[""] > 0 and found.pixels is not None
    assert [
        what for what in found.unknown if "scatter" not in what or family != "flux2"
    ] == []  # it scatters its latents


def test_a_run_of_its_configuration_ends_well_in_bfloat16(family, model, checkpoint):
    size = ",".join(f"{name}:{pixels}" for name, pixels in NEWER_SIZES[family].items())
    code = main([
        "run", "name=whole", f"model={CONFIGURATIONS[family]}", f"model.name=small-{family}", f"model.source={checkpoint}",
        "model.revision=null", f"model.size={{{size}}}", "protocol.n=3", "protocol.steps=2", "protocol.prompts=shapes",
        "calibration.n=2", "calibration.batch_size=2", "calibration.prompts=shapes-calibration", "generate.batch_size=2",
        "generate.noise_floor_seeds=0", "metrics.names=[psnr,sqnr]", "metrics.resamples=5", "measure.samples=1",
        "measure.repeats=1", "measure.warmup=0", "tracker=none", f"results_dir={checkpoint.parent}", "method=smoothquant",
        "bits=w8a8",
    ])  # fmt: skip
    *_, path = checkpoint.parent.glob("runs/whole/*/record.json")
    record = json.loads(path.read_text())
    assert code == 0 and record["status"] == "ok", record["error"]
    assert record["config"]["model"]["dtype"] == "bfloat16" and record["config"]["model"]["family"] == family_of(family)
    assert set(record["layers"]) == set(model.target().layers)
    assert all(entry["sqnr_db"] > 0 for entry in record["layers"].values())
    assert LEAST_SHARE.get(family, 0.3) < record["bits"]["mac_share_quantized"] < 1
    assert samples_of(read(path)).pixels[:].shape == (3, *DRAWN[family], 3)


def test_kandinsky_keeps_one_resolution_however_often_it_is_asked_for_it():
    pipe = NEWER["kandinsky5_t2i"]()
    usual = list(pipe.resolutions)
    known_families.family("kandinsky5").prepare(pipe)
    for _ in range(3):
        pipe.check_inputs("a cross", None, 48, 64)
    assert pipe.resolutions == [*usual, (64, 48)]
