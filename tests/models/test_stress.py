"""Injected outliers: a model with two streams and one with adaLN-single compute what they did, with channels that stand out."""

from __future__ import annotations

import copy

import pytest
import torch
from small_pipelines import SIZES, SMALL

from ditbench.harness.build.build import float_copy
from ditbench.harness.calibration.channel_statistics import channel_stats
from ditbench.harness.calibration.recording import Calibration, calibrate
from ditbench.harness.models.base import LoadedModel, ModelSpec, Sampler
from ditbench.harness.models.loading import load_model
from ditbench.harness.quant.target import TableRows, Target
from ditbench.harness.samples.samples import Prompt

STRESS = {"channels": 3, "log2_factor": 6, "seed": 0}


@pytest.fixture(scope="module", params=["sd3", "pixart"])
def model(request, tmp_path_factory) -> LoadedModel:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    SMALL[request.param]().save_pretrained(folder)
    return load_model(ModelSpec(request.param, request.param, source=str(folder), size=SIZES.get(request.param)))


@pytest.fixture(scope="module")
def stressed(model) -> LoadedModel:
    """A copy: `model` stays as it is."""
    pipe = type(model.pipe)(**model.pipe.components | {"transformer": copy.deepcopy(model.transformer)})
    changed = LoadedModel(model.spec, pipe, model.adapter)
    changed.inject_outliers(**STRESS)
    return changed


@pytest.fixture(scope="module")
def calibration(model) -> Calibration:
    sampler = Sampler(model.adapter.SAMPLERS[0], 2, 2.0)
    return calibrate(model, sampler, n=2, seed=0, prompts=(Prompt("a red circle"), Prompt("two blue squares")))


def changed_sites(target: Target) -> list:
    """Rows of adaLN-single stay: their embedding is shared by all blocks."""
    return [s for s in target.sites if s.foldable and not any(isinstance(p, TableRows) for p in s.producers)]


def test_the_function_is_preserved(model, stressed, calibration):
    plain, changed = (float_copy(each.target(), dtype=torch.float64) for each in (model, stressed))
    for step in range(2):
        expected, found = (calibration.call(m, step, calibration.per_step[step])[0] for m in (plain, changed))
        assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), changed.parameters(), strict=True))


def test_the_chosen_channels_of_every_site_stand_out_and_no_others(model, stressed, calibration):
    before, after = (channel_stats(each.target(), calibration) for each in (model, stressed))
    sites = changed_sites(model.target())
    assert {site.name.rsplit(".", 1)[-1] for site in sites} == (
        {"attn_in", "text_attn_in", "attn_out", "ff_in", "text_ff_in", "attn2_in", "attn2_out"}
        if model.spec.family == "sd3"
        else {"attn_out", "cross_out"}
    )
    for site in sites:
        name = site.consumers[0]
        ratio_C = after[name].absmax_C / before[name].absmax_C
        grown = ratio_C > 1.5
        assert int(grown.sum()) == STRESS["channels"], site.name
        assert torch.allclose(ratio_C[~grown], torch.ones(()), rtol=1e-3)
        assert set(ratio_C[grown].log2().round().int().tolist()) <= {4, 5, 6}
