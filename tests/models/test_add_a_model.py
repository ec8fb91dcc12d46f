"""The example of docs/add-a-model.md is a family: found by its file, exact when folded, sampled as diffusers does."""

from __future__ import annotations

import re

import pytest
import torch
import yaml
from small_pipelines import SMALL

from ditbench.harness.build.build import build, float_copy
from ditbench.harness.calibration.recording import calibrate
from ditbench.harness.common.paths import CONF
from ditbench.harness.generation.generate import conditions
from ditbench.harness.models import families
from ditbench.harness.models.base import LoadedModel, ModelSpec, Sampler
from ditbench.harness.models.loading import load_model
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.smoothing import place
from ditbench.harness.quant.steps import StepTable
from ditbench.harness.quant.transforms import Transform
from ditbench.harness.samples.samples import Prompt

PAGE = CONF.parent / "docs" / "add-a-model.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="not a source checkout")
PROMPTS = (Prompt("a red circle"), Prompt("two blue squares"))
SAMPLER = Sampler("pipeline", 2, 2.0)


def example(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return found


@pytest.fixture
def family(tmp_path, monkeypatch):
    """family(source, name) → a small PixArt pipeline loaded by it."""
    torch.manual_seed(0)
    SMALL["pixart"]().save_pretrained(tmp_path / "checkpoint")

    def load(source: str, name: str) -> LoadedModel:
        (tmp_path / f"{name}.py").write_text(source)
        return load_model(ModelSpec("small", name, source=str(tmp_path / "checkpoint")))

    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    return load


def error_of_folding(model: LoadedModel) -> float:
    """Relative error in float64 after a shift and a scale of every site, folded where the family says so."""
    target = model.target()
    generator = torch.Generator().manual_seed(1)
    by_site = {}
    for site in target.linear_sites():
        width = target.module(site.consumers[0]).weight.shape[1]
        shift = StepTable.constant(torch.randn(width, generator=generator)) if site.foldable else None
        by_site[site.name] = Transform(scale_C=torch.rand(width, generator=generator) + 0.5, shift=shift)
    transforms, folded = place(target, by_site)
    assert len(folded) == 2 * 3, "two modulated inputs and one of attention in each of two blocks"
    recipe = ModelRecipe({name: LayerRecipe(transform) for name, transform in transforms.items()}, folded)
    calibration = calibrate(model, SAMPLER, n=2, seed=0, prompts=PROMPTS)
    models = (float_copy(target, dtype=torch.float64), build(target, recipe, dtype=torch.float64))
    with torch.no_grad():
        expected, found = (calibration.call(each, 0, calibration.per_step[0])[0] for each in models)
    return float((found - expected).norm() / expected.norm())


def test_the_example_is_found_folds_exactly_and_samples_as_diffusers_does(family):
    model = family(example("python"), "miniart")
    assert error_of_folding(model) < 1e-8
    wanted = conditions(model, 2, 0, prompts=PROMPTS)
    with torch.no_grad():
        ours = model.adapter.sample(model.pipe, float_copy(model.target(), dtype=torch.float32), wanted, SAMPLER)
        theirs = model.pipe(
            prompt=[prompt.text for prompt in PROMPTS],
            num_inference_steps=2,
            guidance_scale=2.0,
            generator=[torch.Generator().manual_seed(seed) for seed in wanted.seeds],
            output_type="pt",
            return_dict=False,
            **model.adapter.call(model.pipe),
        )[0]
    torch.testing.assert_close((ours.pixels + 1) / 2, theirs, rtol=0, atol=1e-4)


def test_rows_named_the_wrong_way_round_would_be_seen(family):
    swapped = example("python").replace('"timestep", 0, 1', '"timestep", 1, 0')
    assert swapped != example("python")
    assert error_of_folding(family(swapped, "miniart_swapped")) > 1e-3


def test_the_examples_yaml_says_what_the_shipped_ones_say():
    ours = yaml.safe_load(example("yaml"))
    theirs = yaml.safe_load((CONF / "model" / "sana-1600m-1024.yaml").read_text())
    assert set(ours) == set(theirs) and set(ours["usual"]) == set(theirs["usual"])
    assert ours["family"] == "miniart" and ours["defaults"] == theirs["defaults"]


def test_every_file_the_page_sends_you_to_is_there():
    paths = re.findall(r"`((?:harness|tests)/[\w/]+\.py)`", PAGE.read_text())
    assert len(paths) >= 2 and all((PAGE.parents[1] / path).exists() for path in paths)
