"""In every family: what layers share because they read one tensor is what each of them would have found alone."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import combinations

import pytest
import torch
from small_pipelines import SIZES, SMALL
from torch import Tensor

from ditbench.harness.build.build import float_copy
from ditbench.harness.calibration.channel_statistics import (
    channel_stats,
    inputs_observed,
    of_site,
    run_calibration,
    token_sample,
    tokens_of_site,
)
from ditbench.harness.calibration.recording import Calibration, calibrate
from ditbench.harness.fitting.blockwise import round_blockwise
from ditbench.harness.fitting.registry import method
from ditbench.harness.models.base import LoadedModel, ModelSpec, Sampler
from ditbench.harness.models.loading import load_model
from ditbench.harness.quant.blocks import NotInLine
from ditbench.harness.quant.quantizers import quantize_weight
from ditbench.harness.quant.spec import Bits, QuantSpec
from ditbench.harness.quant.target import Site, Target
from ditbench.harness.samples.samples import Prompt

PROMPTS = (Prompt("a red circle"), Prompt("two blue squares above a green one"))
APART = {
    "flux": 2,
    "sd3": 2,
    "hunyuan_video": 1,
    "generic": 0,
}  # blocks whose attention has an output for image and for text
STATIC = Bits(QuantSpec(8, "per_channel"), QuantSpec(8, "per_tensor", symmetric=False))


@pytest.fixture(scope="module", params=sorted(SMALL))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family, tmp_path_factory) -> LoadedModel:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(family)
    SMALL[family]().save_pretrained(folder)
    return load_model(ModelSpec(f"small-{family}", family, source=str(folder), size=SIZES.get(family)))


@pytest.fixture(scope="module")
def target(model) -> Target:
    return model.target()


@pytest.fixture(scope="module")
def calibration(model) -> Calibration:
    return calibrate(model, Sampler(model.adapter.SAMPLERS[0], 2, 2.0), n=2, seed=0, prompts=PROMPTS)


@pytest.fixture(scope="module")
def entered(target, calibration) -> dict[str, list[Tensor]]:
    """Every input of every consumer of a linear site."""
    found: dict[str, list[Tensor]] = {name: [] for site in target.linear_sites() for name in site.consumers}
    model = float_copy(target, dtype=torch.float32)
    with inputs_observed(model, {name: name for name in found}, lambda name, _, x: found[name].append(x)) as set_step:
        run_calibration(model, calibration, set_step, "test")
    return found


def alone(target: Target) -> Target:
    """With a site for every layer."""
    return replace(target, sites=tuple(Site(name, (name,)) for site in target.sites for name in site.consumers))


def test_layers_of_a_group_read_one_tensor_and_those_of_others_another(family, target, entered):
    apart = [site for site in target.linear_sites() if len(site.groups) > 1]
    assert len(apart) == APART.get(family, 0)
    for site in target.linear_sites():
        for name in site.consumers:
            first = entered[site.group_of(name)[0]]
            assert all(torch.equal(x, own) for x, own in zip(first, entered[name], strict=True)), name
        firsts = [entered[name] for name in site.first_readers]
        for one, other in combinations(firsts, 2):
            assert not any(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_the_statistics_of_each_layer_are_those_of_its_own_input(target, calibration, entered):
    shared, own = channel_stats(target, calibration), channel_stats(alone(target), calibration)
    assert shared.keys() <= own.keys()
    for name, stats in shared.items():
        assert all(torch.equal(getattr(stats, f.name), getattr(own[name], f.name)) for f in fields(stats)), name
        assert float(stats.max_SC.max()) == max(float(x.max()) for x in entered[name])


def test_those_of_a_site_are_of_all_that_its_layers_read(target, calibration, entered):
    stats = channel_stats(target, calibration)
    for site in target.linear_sites():
        rows = torch.cat([x.flatten(0, -2) for name in site.first_readers for x in entered[name]])
        found = of_site(stats, site)
        assert torch.equal(found.min_SC.amin(0), rows.amin(0)) and torch.equal(found.max_SC.amax(0), rows.amax(0))
        torch.testing.assert_close(found.sumsq_SC.sum(0), rows.square().sum(0))
        assert int(found.count_S.sum()) == len(rows)


def test_the_tokens_sampled_for_each_layer_are_of_its_own_input(target, calibration, entered):
    sites = target.linear_sites()
    shared = token_sample(target, calibration, sites, 16)
    own = token_sample(alone(target), calibration, alone(target).sites, 16)
    for site in sites:
        assert all(torch.equal(shared[name], own[name]) for name in site.consumers)
        assert len(tokens_of_site(shared, site)) == sum(len(own[name]) for name in site.first_readers)


def test_the_hessian_that_layers_share_is_the_one_of_each(target, calibration):
    if isinstance(target.block_call, NotInLine):
        pytest.skip("no method can go block by block")

    def hessians(of: Target) -> dict[str, Tensor]:
        found = {}

        def round_weight(name, weight, hessian):
            found[name] = hessian.clone()
            return quantize_weight(weight, QuantSpec(8, "per_channel"))

        round_blockwise(of, calibration, round_weight)
        return found

    shared, own = hessians(target), hessians(alone(target))
    assert shared.keys() == own.keys() == set(target.layers)
    assert [name for name in shared if not torch.equal(shared[name], own[name])] == []


def test_the_static_range_of_each_layer_is_that_of_its_own_input(target, calibration, entered):
    rtn = method("rtn")
    state = rtn.fit(target, calibration, STATIC, rtn.Params())
    for name in set(entered) & set(target.layers):
        ends = min(float(x.min()) for x in entered[name]), max(float(x.max()) for x in entered[name])
        assert (float(state[f"{name}/act_low"]), float(state[f"{name}/act_high"])) == pytest.approx(ends, rel=1e-5)
