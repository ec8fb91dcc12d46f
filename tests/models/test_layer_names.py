"""Layers by the names that run: fused projections, one layer under several names, layers that nothing calls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from small_pipelines import SIZES, SMALL
from torch import nn

from ditbench.harness.build.build import build, float_copy, quant_layers
from ditbench.harness.build.export import TENSORS, load_quantized, save_quantized
from ditbench.harness.calibration.recording import Calibration, calibrate
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting import registry
from ditbench.harness.fitting.conformance import DYNAMIC
from ditbench.harness.models.base import LoadedModel, ModelSpec, Sampler
from ditbench.harness.models.families.hunyuan_dit import in_the_models_dtype
from ditbench.harness.models.known_families import family
from ditbench.harness.models.layers import fuse_qkv
from ditbench.harness.models.loading import load_model
from ditbench.harness.models.macs import count_macs
from ditbench.harness.quant.accounting import account
from ditbench.harness.quant.layer_names import aliases, fused_layers
from ditbench.harness.quant.recipe import ModelRecipe
from ditbench.harness.quant.target import Site, Target
from ditbench.harness.samples.samples import Prompt

PROMPTS = (Prompt("a red circle"), Prompt("two blue squares"))
FUSABLE = ("flux", "pixart", "wan", "cogvideox", "hunyuan_dit")
OLD = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def small(name: str) -> LoadedModel:
    torch.manual_seed(0)
    pipe = SMALL[name]()
    pipe.transformer.eval().requires_grad_(False)
    if name == "hunyuan_dit":
        pipe.transformer.time_extra_emb.register_forward_pre_hook(in_the_models_dtype, with_kwargs=True)
    return LoadedModel(ModelSpec(f"small-{name}", name), pipe, replace(family(name), size=SIZES.get(name, {})))


def recorded(model: LoadedModel) -> Calibration:
    return calibrate(model, Sampler("pipeline", 2, 1.0), n=2, seed=0, prompts=PROMPTS)


def quantized(target: Target, calibration: Calibration, method: str = "smoothquant") -> ModelRecipe:
    module = registry.method(method)
    return module.apply(target, module.fit(target, calibration, DYNAMIC, module.Params()), DYNAMIC, module.Params())


def called(model: nn.Module, calibration: Calibration) -> torch.Tensor:
    found = calibration.call(model, 0, calibration.per_step[0])
    return found[0] if isinstance(found, tuple) else found.sample


# fused projections


@pytest.fixture(scope="module", params=FUSABLE)
def plain(request) -> LoadedModel:
    return small(request.param)


@pytest.fixture(scope="module")
def fused(plain) -> LoadedModel:
    model = small(plain.spec.family)
    fuse_qkv(model.transformer)
    model.transformer.requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def recording(fused) -> Calibration:
    return recorded(fused)


def test_fused_projections_are_quantized_once_and_what_was_fused_is_not(plain, fused):
    before, after = set(plain.target().layers), set(fused.target().layers)
    old = set(fused_layers(fused.transformer))
    assert old and old == before - after and {name.rpartition(".")[2] for name in old} <= set(OLD)
    assert after - before == {whole for whole, _ in fused_layers(fused.transformer).values()}


def test_every_layer_of_a_fused_transformer_reads_one_site_and_is_called(fused, recording):
    target = fused.target()
    consumers = [name for site in target.sites for name in site.consumers]
    assert len(consumers) == len(set(consumers)) and set(target.layers) <= set(consumers)
    assert set(recording.unreached).isdisjoint(target.layers)
    assert set(fused_layers(fused.transformer)) <= set(recording.unreached)


def test_folds_into_fused_projections_keep_the_output(plain, fused, recording):
    """As many sites can be folded as before, and their producers' rows are found in the fused layer."""
    target = fused.target()
    assert [site.name for site in target.sites if site.foldable] == [s.name for s in plain.target().sites if s.foldable]
    recipe = quantized(target, recording).without_rounding()
    assert bool(recipe.folded) == any(site.foldable for site in target.sites)
    exact = called(build(target, recipe, dtype=torch.float64), recording)
    expected = called(float_copy(plain.target(), dtype=torch.float64), recording)
    torch.testing.assert_close(exact, expected, rtol=1e-5, atol=1e-5)  # timesteps are embedded in float32


def test_an_export_of_fused_projections_holds_them_once_and_comes_back(plain, fused, recording, tmp_path):
    target = fused.target()
    recipe = quantized(target, recording)
    about = save_quantized(tmp_path / "x", target, recipe, dtype=torch.bfloat16, about={})
    old = set(fused_layers(fused.transformer))
    names = {key.removeprefix("float/").rpartition(".")[0] for key in load_file(tmp_path / "x" / TENSORS)}
    assert old.isdisjoint(names) and old.isdisjoint(about["layers"])
    expected = called(build(target, recipe, dtype=torch.bfloat16), recording)
    assert torch.equal(called(load_quantized(tmp_path / "x", fused.transformer), recording), expected)
    with pytest.raises(UserError, match=r"call transformer.fuse_qkv_projections\(\) first"):
        load_quantized(tmp_path / "x", plain.transformer)


def test_bytes_of_fused_projections_are_those_of_the_layers_that_were_fused(plain, fused, recording):
    sizes = []
    for model in (plain, fused):
        target = model.target()
        recipe = quantized(target, recording, "rtn")
        sizes.append(account(target, recipe, count_macs(model.transformer, model.step_inputs(1)), "W4A4"))
    (bits, size), (fused_bits, fused_size) = sizes
    assert size == fused_size
    assert bits["weight_bits_effective"] == pytest.approx(fused_bits["weight_bits_effective"])
    assert bits["mac_share_quantized"] == pytest.approx(fused_bits["mac_share_quantized"])


def test_operands_of_fused_attention_are_quantized_behind_the_fused_layer():
    model = small("pixart")
    before = model.target(attention=True).attention
    fuse_qkv(model.transformer)
    assert model.target(attention=True).attention == before != ()


@pytest.mark.parametrize("name, words", [("sana", "fuses no projections"), ("sd3", "cannot run .*attn2")])
def test_what_diffusers_cannot_fuse_is_refused(name, words):
    with pytest.raises(UserError, match=f"{words}.*set model.fuse_qkv=false"):
        fuse_qkv(small(name).transformer)


def test_projections_that_are_fused_but_not_used_are_refused():
    model = small("ltx")
    fuse_qkv(model.transformer)
    with pytest.raises(UserError, match="to_qkv is fused, but diffusers runs .*to_q as before"):
        recorded(model)


def test_a_model_is_fused_when_its_specification_says_so(tmp_path):
    small("flux").pipe.save_pretrained(tmp_path)
    model = load_model(ModelSpec("x", "flux", source=str(tmp_path), fuse_qkv=True))
    assert any(name.endswith("to_qkv") for name in model.target().layers)
    assert not any(parameter.requires_grad for parameter in model.transformer.parameters())


# one layer under several names


SHARED = {"transformer_blocks.1.ff.net.0.proj": "transformer_blocks.0.ff.net.0.proj"}
SHARED |= {name.replace("0.proj", "2"): first.replace("0.proj", "2") for name, first in SHARED.items()}
TIED = {"transformer_blocks.1.attn1.to_out.0": "transformer_blocks.0.attn1.to_out.0"}


@pytest.fixture
def shared(own_model) -> LoadedModel:
    """The blocks have one feed-forward, a module, and one output projection, two modules on the same parameters."""
    one, other = own_model.transformer.transformer_blocks
    other.ff = one.ff
    other.attn1.to_out[0].weight, other.attn1.to_out[0].bias = one.attn1.to_out[0].weight, one.attn1.to_out[0].bias
    return own_model


@pytest.fixture
def shared_recording(shared, small_sampler) -> Calibration:
    return calibrate(shared, small_sampler, n=3, seed=0)


def test_a_layer_under_two_names_is_one_layer(shared):
    assert aliases(shared.transformer) == SHARED | TIED
    target = shared.target()
    assert set(target.layers).isdisjoint(SHARED | TIED) and set((SHARED | TIED).values()) <= set(target.layers)
    consumers = [name for site in target.sites for name in site.consumers]
    assert len(consumers) == len(set(consumers)) and set(consumers).isdisjoint(SHARED | TIED)


def test_a_layer_that_reads_two_sites_is_folded_into_the_producers_of_both(shared):
    site = shared.target().site_of("transformer_blocks.0.ff.net.0.proj")
    assert [producer.linear for producer in site.producers] == [f"transformer_blocks.{i}.norm1.linear" for i in (0, 1)]


def test_a_layer_that_reads_two_tensors_is_no_group_with_those_that_read_one(own_model):
    one, other = own_model.transformer.transformer_blocks
    other.attn1.to_q = one.attn1.to_q
    first, second = ("transformer_blocks.0.attn1.", "transformer_blocks.1.attn1.")
    site = own_model.target().site_of(f"{first}to_q")
    assert set(map(frozenset, site.groups)) == {
        frozenset({f"{first}to_q"}),
        frozenset({f"{first}to_k", f"{first}to_v"}),
        frozenset({f"{second}to_k", f"{second}to_v"}),
    }
    smaller = own_model.target().without({f"{first}to_q", f"{first}to_k"}).site_of(f"{first}to_v")
    assert smaller.groups == ((f"{first}to_v",), (f"{second}to_k", f"{second}to_v"))


def test_groups_that_are_not_the_consumers_are_refused():
    with pytest.raises(ValueError, match="in: groups must hold each of"):
        Site("in", ("q", "k"), groups=(("q",),))


@pytest.mark.parametrize("method", ["rtn", "smoothquant", "quarot", "gptq"])
def test_transforms_of_shared_layers_keep_the_output(method, shared, shared_recording):
    target = shared.target()
    recipe = quantized(target, shared_recording, method).without_rounding()
    exact, expected = (
        called(model, shared_recording)
        for model in (build(target, recipe, dtype=torch.float64), float_copy(target, dtype=torch.float64))
    )
    torch.testing.assert_close(exact, expected, rtol=1e-5, atol=1e-6)


def test_a_shared_layer_is_quantized_once_and_still_shared_after_build_export_and_reload(
    shared, shared_recording, tmp_path
):
    target = shared.target()
    recipe = quantized(target, shared_recording)
    built = build(target, recipe, dtype=torch.float32)
    about = save_quantized(tmp_path / "x", target, recipe, dtype=torch.float32, about={})
    loaded = load_quantized(tmp_path / "x", shared.transformer)
    for model in (built, loaded):
        for other, name in (SHARED | TIED).items():
            assert model.get_submodule(other) is model.get_submodule(name)
        assert set(quant_layers(model)) >= set(target.layers) and set(quant_layers(model)).isdisjoint(SHARED | TIED)
    assert set(about["layers"]).isdisjoint(SHARED | TIED)
    assert torch.equal(called(loaded, shared_recording), called(built, shared_recording))


def test_a_shared_layer_counts_once(shared, shared_recording, own_model, tmp_path):
    """Its bytes once, its multiplications as often as it is called."""
    target = shared.target()
    recipe = quantized(target, shared_recording, "rtn")
    macs = count_macs(shared.transformer, shared.step_inputs(1))
    bits, size = account(target, recipe, macs, "W4A4")
    stored = save_quantized(tmp_path / "x", target, recipe, dtype=torch.bfloat16, about={})["tensors"]["bytes"]
    assert size["model_bytes"] == stored
    assert bits["mac_share_quantized"] == pytest.approx(sum(macs[n] for n in (*target.layers, *TIED)) / macs[""])


# layers that nothing calls


def test_a_layer_that_nothing_calls_is_neither_quantized_nor_observed(own_model, small_sampler):
    own_model.transformer.transformer_blocks[0].ff.spare = nn.Linear(8, 8)
    name = "transformer_blocks.0.ff.spare"
    recording = calibrate(own_model, small_sampler, n=2, seed=0)
    assert name in own_model.target().layers and recording.unreached == (name,)
    target = own_model.target().without(recording.unreached)
    assert name not in target.layers and all(name not in site.consumers for site in target.sites)
    assert name not in quant_layers(build(target, quantized(target, recording)))


def test_which_layers_are_not_called_is_known_from_the_cache_too(own_model, small_sampler, tmp_path):
    own_model.transformer.transformer_blocks[0].ff.spare = nn.Linear(8, 8)
    first, cached = (calibrate(own_model, small_sampler, n=2, seed=0, cache=tmp_path) for _ in range(2))
    assert cached.saved_s and cached.unreached == first.unreached == ("transformer_blocks.0.ff.spare",)
