"""The error atlas: SQNR per layer and block over the denoising steps."""

import numpy as np
import pytest
import torch

from ditbench.harness.build.build import build, quant_layers
from ditbench.harness.fitting import registry
from ditbench.harness.measurement.layer_errors import ErrorAtlas, error_atlas, layer_table
from ditbench.harness.quant.quantizers import fake_quantize_activation, static_quant
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.spec import Bits, QuantSpec
from ditbench.harness.quant.steps import StepTable

W8A8 = Bits(QuantSpec(8, "per_channel"), QuantSpec(8, "per_token", dynamic=True))
W4A4 = W8A8.with_widths(4, 4)


def atlas_of(target, calibration, name, bits):
    method = registry.method(name)
    recipe = method.apply(target, method.fit(target, calibration, bits, method.Params()), bits, method.Params())
    model = build(target, recipe, dtype=torch.float32, backend="simulate")
    return error_atlas(target, recipe, model, calibration), model, recipe


def test_a_layers_sqnr_is_that_of_its_own_rounding_on_float_inputs(small_target, small_calibration):
    atlas, model, recipe = atlas_of(small_target, small_calibration, "rtn", W4A4)
    name, step = small_target.layers[-1], 1
    seen = {}
    handle = small_target.module(name).register_forward_hook(
        lambda _, inputs, output: seen.update(x=inputs[0], y=output)
    )
    with torch.no_grad():
        small_target.transformer(**small_calibration.per_step[step])
    handle.remove()
    rounded = fake_quantize_activation(seen["x"], recipe.layers[name].act) @ recipe.layers[name].weight.dequantize().T
    error = rounded + small_target.module(name).bias - seen["y"]
    expected = 10 * torch.log10(seen["y"].square().sum() / error.square().sum())
    found = atlas.sqnr_db_LS[atlas.names.index(name), atlas.steps.index(step)]
    assert found == pytest.approx(float(expected), abs=0.01)


def test_a_layer_is_judged_at_the_step_that_its_input_is_of(small_target, small_calibration):
    """The static range of one step clips almost everything, those of the others nothing."""
    name, by_step = small_target.layers[-1], torch.tensor([0, 1, 1, 1])
    ends = StepTable(torch.tensor([1e-3, 10.0]), by_step)
    act = static_quant(ends.map(torch.neg), ends, QuantSpec(8, "per_tensor"))
    recipe = ModelRecipe({name: LayerRecipe(act=act)}, num_steps=4)
    model = build(small_target, recipe, dtype=torch.float32, backend="simulate")
    found = error_atlas(small_target, recipe, model, small_calibration).sqnr_db_LS[0]
    assert found[0] < 1 and all(found[1:] > 10), found


def test_layers_whose_rows_take_a_fold_are_judged_against_the_folded_float_layer(small_target, small_calibration):
    atlas, model, _ = atlas_of(small_target, small_calibration, "ptq4dit", W8A8)
    values = [name for name in small_target.layers if name.endswith("to_v")]
    assert values and all(atlas.pooled_db(name) > 30 for name in values)


def test_blocks_carry_the_rounding_of_all_blocks_before_them(small_target, small_calibration):
    atlas, model, _ = atlas_of(small_target, small_calibration, "rtn", W4A4)
    first, last = small_target.blocks[0], small_target.blocks[-1]
    assert atlas.pooled_db(last) < atlas.pooled_db(first)


def test_a_table_row_stands_for_each_rounded_layer(small_target, small_calibration):
    atlas, model, _ = atlas_of(small_target, small_calibration, "rtn", W4A4)
    table = layer_table(model, atlas)
    assert set(table) == set(small_target.layers) == set(quant_layers(model))
    assert all(row["weight_bits"] == 4 and row["act_bits"] == 4 for row in table.values())
    assert {row["label"] for row in table.values()} == {"W4A4"}


def test_a_model_without_rounding_has_no_atlas(small_target, small_calibration):
    model = build(small_target, ModelRecipe(layers={}), dtype=torch.float32)
    assert error_atlas(small_target, ModelRecipe(layers={}), model, small_calibration) is None
    assert layer_table(model, None) == {}


def test_a_saved_atlas_holds_names_steps_and_decibels(small_target, small_calibration, tmp_path):
    atlas, _, _ = atlas_of(small_target, small_calibration, "rtn", W4A4)
    atlas.save(tmp_path / "layer_errors.npz")
    with np.load(tmp_path / "layer_errors.npz") as saved:
        assert saved["names"].tolist() == list(atlas.names) and saved["steps"].tolist() == list(atlas.steps)
        np.testing.assert_allclose(saved["sqnr_db"], atlas.sqnr_db_LS, rtol=1e-5)


def test_an_atlas_is_read_as_it_was_saved(small_target, small_calibration, tmp_path):
    atlas, _, _ = atlas_of(small_target, small_calibration, "rtn", W4A4)
    atlas.save(tmp_path / "layer_errors.npz")
    again = ErrorAtlas.load(tmp_path / "layer_errors.npz")
    assert (again.names, again.steps) == (atlas.names, atlas.steps)
    assert np.array_equal(again.signal_LS, atlas.signal_LS) and np.array_equal(again.noise_LS, atlas.noise_LS)
