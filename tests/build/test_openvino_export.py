"""An OpenVINO export says a recipe in operators that OpenVINO has, computes what `simulate` computes, and refuses the rest."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL

from ditbench.harness.build.build import build
from ditbench.harness.build.flat_calls import leaves, output_of, relative_error, with_leaves
from ditbench.harness.build.layer import QuantLinear
from ditbench.harness.build.openvino_export import converted, expressible, save_openvino, why_not, without_activations
from ditbench.harness.build.openvino_run import ROUNDS_BY_ITSELF, OpenVINOTransformer, Runner, load_openvino
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.extras import installed
from ditbench.harness.fitting import registry
from ditbench.harness.fitting.conformance import DYNAMIC, SMALL_DIT, STATIC
from ditbench.harness.models.base import ModelSpec
from ditbench.harness.models.loading import load_model
from ditbench.harness.quant.effective import EffectiveLinear
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight
from ditbench.harness.quant.recipe import AttentionRecipe, LayerRecipe, ModelRecipe
from ditbench.harness.quant.spec import Bits, QuantSpec, bits_of
from ditbench.harness.quant.steps import StepClock, StepTable

needs_openvino = pytest.mark.skipif(not installed("openvino"), reason="the extra ditbench[openvino] is not installed")
STATIC_8 = STATIC.with_widths(8, 8)
ASYMMETRIC = Bits(QuantSpec(8, "per_channel", symmetric=False), QuantSpec(8, "per_tensor", symmetric=False))
FOUR_IN_GROUPS = Bits(QuantSpec(4, "per_group", symmetric=False, group_size=16), None)
FOUR = Bits(QuantSpec(4, "per_channel"), None)
CASES = [
    ("rtn", STATIC_8, "blocks"),
    ("rtn", STATIC_8, "all"),
    ("rtn", ASYMMETRIC, "blocks"),
    ("rtn", FOUR, "blocks"),
    ("gptq", FOUR_IN_GROUPS, "blocks"),
    ("smoothquant", STATIC_8, "blocks"),
    ("quarot", ASYMMETRIC, "blocks"),
    ("svdquant", STATIC_8, "blocks"),
]
every_case = pytest.mark.parametrize(
    ("method", "bits", "scope"), CASES, ids=[f"{m}-{b.label}-{s}-{i}" for i, (m, b, s) in enumerate(CASES)]
)


@pytest.fixture
def made(small_model, small_calibration):
    """made(method, bits, scope) → (target, recipe)."""

    def make(method, bits, scope="blocks"):
        module, target = registry.method(method), small_model.target(scope)
        state = module.fit(target, small_calibration, bits, module.Params())
        return target, module.apply(target, state, bits, module.Params())

    return make


@pytest.fixture
def examples(small_model):
    return small_model.step_inputs(2), small_model.step_inputs(3)


@every_case
@torch.no_grad()
def test_what_openvino_is_given_computes_what_simulate_computes(made, examples, method, bits, scope):
    target, recipe = made(method, bits, scope)
    assert why_not(recipe) is None
    expected = build(target, recipe, dtype=torch.float32, backend="simulate")(**examples[0])
    model = build(target, recipe, dtype=torch.float32, backend="simulate")
    expressible(model)
    float_model = build(target, ModelRecipe(layers={}), dtype=torch.float32)
    off = relative_error(output_of(model(**examples[0])), output_of(expected))
    rounding = relative_error(output_of(float_model(**examples[0])), output_of(expected))
    assert off < max(1e-5, 0.3 * rounding), "more than codes that fall the other way"
    if bits.act is None:
        assert off < 1e-5


@needs_openvino
@every_case
def test_an_export_loads_and_agrees_with_simulate(tmp_path, made, examples, method, bits, scope):
    target, recipe = made(method, bits, scope)
    described = save_openvino(tmp_path / "out", target, recipe, examples, about={"method": method})
    run = Runner(tmp_path / "out" / "model.xml", precision="f32")
    simulated = build(target, recipe, dtype=torch.float32, backend="simulate")
    errors = [relative_error(run(each), output_of(simulated(**each))) for each in examples]
    assert max(errors) == pytest.approx(described["error_to_simulate"], rel=0.01)
    assert max(errors) < (2e-2 if bits.act else 1e-5)


@needs_openvino
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("act_bits", [3, 4, 8])
@torch.no_grad()
def test_activations_of_any_width_are_rounded_as_simulate_rounds_them(act_bits, symmetric, normal):
    """Of 15 levels OpenVINO made others. Here no value lies on an edge between two codes."""
    spec, scale = QuantSpec(act_bits, "per_tensor", symmetric), 1 / 16
    zero_point = None if symmetric else StepTable.constant(torch.tensor(1.0))
    act = ActQuant(spec, StepTable.constant(torch.tensor(scale)), zero_point)
    weight_OC = normal(24, 32).float()
    recipe = LayerRecipe(weight=quantize_weight(weight_OC, QuantSpec(8, "per_channel")), act=act)
    settings = {"folded": False, "clock": StepClock(None), "dtype": torch.float32, "device": torch.device("cpu")}
    layer = QuantLinear(recipe, EffectiveLinear(weight_OC, None), **settings, backend="simulate")
    x = ((2**act_bits * normal(3, 5, 32, seed=1)).round() + 0.25).float() * scale  # codes and what is beyond them
    model = converted(torch.nn.Sequential(OrderedDict(input=layer)), ({"input": x[:2]}, {"input": x}))
    run = Runner(model, precision="f32", options={ROUNDS_BY_ITSELF: 0})
    assert relative_error(run({"input": x}), layer(x)) < 1e-5


@needs_openvino
def test_layers_with_static_activations_run_as_int8_products(tmp_path, made, examples):
    target, recipe = made("rtn", STATIC_8)
    save_openvino(tmp_path / "out", target, recipe, examples, about={})
    compiled = Runner(tmp_path / "out" / "model.xml", precision="f32").compiled
    kinds = [
        node.get_rt_info()["runtimePrecision"].astype(str)
        for node in compiled.get_runtime_model().get_ops()
        if node.get_rt_info()["layerType"].astype(str) == "FullyConnected"
    ]
    assert kinds.count("i8") + kinds.count("u8") == len([name for name in recipe.layers if recipe.layers[name].weight])


@needs_openvino
def test_a_pipeline_draws_with_the_exported_transformer(tmp_path, made, examples):
    target, recipe = made("rtn", STATIC_8)
    save_openvino(tmp_path / "out", target, recipe, examples, about={})
    pipe = load_model(ModelSpec("another", "dit", random=SMALL_DIT, seed=1)).pipe
    model = load_openvino(tmp_path / "out", pipe, precision="f32")
    assert pipe.transformer is model and isinstance(model, OpenVINOTransformer)
    simulated = build(target, recipe, dtype=torch.float32, backend="simulate")
    example = dict(leaves(examples[1]))
    assert relative_error(model(**example).sample, output_of(simulated(**example))) < 2e-2
    assert relative_error(model(*example.values(), return_dict=False)[0], output_of(simulated(**example))) < 2e-2
    pipe.register_modules(
        vae=AutoencoderKL(
            latent_channels=pipe.transformer.config.in_channels,
            sample_size=8,
            norm_num_groups=2,
            block_out_channels=(4,),
        )
    )
    image = pipe(class_labels=[1], num_inference_steps=2, guidance_scale=1.0, output_type="np").images[0]
    assert image.shape[-1] == 3


@needs_openvino
def test_weights_alone_leave_the_rounding_of_activations_to_openvino_which_rounds_none_of_a_whole_export(
    tmp_path, made, examples
):
    target, recipe = made("rtn", DYNAMIC.with_widths(8, 8))
    alone = save_openvino(tmp_path / "alone", target, recipe, examples, about={}, weights_only=True)
    assert alone["error_to_simulate"] < 1e-5 and alone["activations"] == "float"
    save_openvino(tmp_path / "whole", target, without_activations(recipe), examples, about={})
    assert ROUNDS_BY_ITSELF in (tmp_path / "whole" / "model.xml").read_text()
    assert ROUNDS_BY_ITSELF not in (tmp_path / "alone" / "model.xml").read_text()


@needs_openvino
def test_four_bit_codes_take_half_a_byte(tmp_path, made, examples):
    sizes = {}
    for bits in (FOUR, Bits(QuantSpec(8, "per_channel"), None)):
        target, recipe = made("rtn", bits)
        described = save_openvino(tmp_path / bits.label, target, recipe, examples, about={})
        sizes[bits.label] = described["files"]["model.bin"]["bytes"]
    codes = sum(layer.weight.codes_OC.numel() for layer in recipe.layers.values())
    assert sizes["W8A16"] - sizes["W4A16"] == pytest.approx(codes / 2, rel=0.02)


@needs_openvino
def test_a_damaged_export_and_one_of_another_model_are_refused(tmp_path, made, examples, small_model):
    target, recipe = made("rtn", FOUR)
    save_openvino(tmp_path / "out", target, recipe, examples, about={})
    wider = SMALL_DIT | {"num_attention_heads": 2 * SMALL_DIT["num_attention_heads"]}
    with pytest.raises(UserError, match="another DiTTransformer2DModel"):
        load_openvino(tmp_path / "out", load_model(ModelSpec("wider", "dit", random=wider)).pipe)
    with (tmp_path / "out" / "model.bin").open("r+b") as file:
        file.write(b"\xff")
    with pytest.raises(UserError, match="SHA-256"):
        load_openvino(tmp_path / "out", load_model(ModelSpec("another", "dit", random=SMALL_DIT)).pipe)
    with pytest.raises(UserError, match="no OpenVINO export"):
        load_openvino(tmp_path, small_model.pipe)


@needs_openvino
def test_a_model_that_computes_something_else_is_not_kept(tmp_path, made, examples, monkeypatch):
    target, recipe = made("rtn", FOUR)
    monkeypatch.setattr(Runner, "__call__", lambda self, arguments: torch.ones(2, 2, 8, 8))
    with pytest.raises(UserError, match="so it was not kept"):
        save_openvino(tmp_path / "out", target, recipe, examples, about={})
    assert not (tmp_path / "out").exists()


def refused(recipe: LayerRecipe) -> str:
    why = why_not(ModelRecipe(layers={"block.fc": recipe}))
    assert why is not None and why.startswith("block.fc: ")
    return why


def test_what_openvino_has_no_form_for_is_refused_with_the_reason(made):
    assert "find their range in each call" in refused(LayerRecipe(act=ActQuant(DYNAMIC.act)))
    assert "bits.act.dynamic=false" in refused(LayerRecipe(act=ActQuant(DYNAMIC.act)))
    assert "a range per_token" in refused(LayerRecipe(act=ActQuant(QuantSpec(8, "per_token"))))
    assert "e4m3" in refused(made("rtn", bits_of("fp8"))[1].layers["transformer_blocks.0.attn1.to_q"])
    looked_up = made("lrq_dit", DYNAMIC)[1]
    assert "looked up in a table" in (why_not(looked_up) or "")
    plain = ModelRecipe(layers={})
    assert "tables by denoising step" in (why_not(replace(plain, num_steps=4)) or "")
    assert "quantizes the operands of attention" in (
        why_not(replace(plain, attention={"attn": AttentionRecipe()})) or ""
    )
    assert "range of denoising steps" in (why_not(replace(plain, variants={"a": (LayerRecipe(),)})) or "")


def test_weights_alone_are_refused_for_their_own_sake_only(made):
    _, recipe = made("rtn", DYNAMIC.with_widths(8, 8))
    assert why_not(recipe) is not None and why_not(recipe, weights_only=True) is None
    assert "e4m3" in (why_not(made("rtn", bits_of("fp8"))[1], weights_only=True) or "")
    assert "blocks" in (why_not(made("rtn", bits_of("int4_g64"))[1], weights_only=True) or "")
    assert all(layer.act is None and layer.weight for layer in without_activations(recipe).layers.values())


def test_a_missing_openvino_is_said_with_what_to_install(tmp_path, made, examples, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr("ditbench.harness.common.extras.importlib.import_module", missing)
    target, recipe = made("rtn", FOUR)
    with pytest.raises(UserError, match=r"openvino is not installed; pip install 'ditbench\[openvino\]'"):
        save_openvino(tmp_path / "out", target, recipe, examples, about={})


def test_nested_arguments_have_names_and_come_back_where_they_were():
    a, b, c = torch.zeros(2), torch.ones(3), torch.ones(4)
    arguments = {"x": a, "more": {"y": b, "list": [c, None]}, "guidance": 2.0}
    named = dict(leaves(arguments))
    assert list(named) == ["x", "more.y", "more.list.0"]
    back = with_leaves(arguments, {name: each + 1 for name, each in named.items()})
    assert back["guidance"] == 2.0 and back["more"]["list"][1] is None
    assert torch.equal(back["more"]["y"], b + 1) and torch.equal(back["x"], a + 1)


def test_the_relative_error_sees_a_scale_and_a_shape():
    y = torch.tensor([3.0, 4.0])
    assert relative_error(1.1 * y, y) == pytest.approx(0.1)
    assert relative_error(y[:1], y) == float("inf")


def test_a_transformer_that_returns_a_list_is_refused():
    with pytest.raises(UserError, match="a list of them"):
        output_of(([torch.zeros(1)],))


def test_about_is_in_the_recipe_and_nothing_is_overwritten(tmp_path, made, examples):
    (tmp_path / "out").mkdir()
    target, recipe = made("rtn", FOUR)
    with pytest.raises(UserError, match="overwrites nothing"):
        save_openvino(tmp_path / "out", target, recipe, examples, about={})
    if installed("openvino"):
        save_openvino(tmp_path / "new", target, recipe, examples, about={"run_id": "abc"})
        assert json.loads((tmp_path / "new" / "recipe.json").read_text())["run_id"] == "abc"
