"""An export is the quantized transformer: reloaded into a fresh float model it draws the same images, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from ditbench.harness.build.build import quant_layers
from ditbench.harness.build.export import TENSORS, load_quantized, save_quantized
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.conformance import DYNAMIC, SMALL_DIT, STATIC
from ditbench.harness.models.base import ModelSpec, Sampler
from ditbench.harness.models.calls import placed
from ditbench.harness.models.loading import load_model
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.spec import Bits, QuantSpec, bits_of
from ditbench.harness.quant.transforms import Rotation, Transform

GROUPS = Bits(
    QuantSpec(3, "per_group", symmetric=False, group_size=16), QuantSpec(8, "per_group", dynamic=True, group_size=16)
)
STATIC_5 = STATIC.with_widths(5, 8)  # codes that cross bytes
FP8 = bits_of("fp8")
CASES = [
    ("rtn", DYNAMIC, "blocks", {}),
    ("rtn", DYNAMIC.with_widths(8, 8), "blocks", {}),  # integer kernels, where the machine has them
    ("rtn", DYNAMIC.with_widths(4, 8), "blocks", {"dtype": "float32"}),
    ("rtn", STATIC_5, "all", {}),
    ("gptq", FP8, "blocks", {}),
    ("svdquant", FP8, "all", {}),
    ("rtn", bits_of("wmxfp6_afp8"), "blocks", {}),
    ("rtn", bits_of("wfp8_block_amxfp8"), "all", {}),
    ("gptq", bits_of("nvfp4"), "blocks", {}),
    ("htg", replace(bits_of("nvfp4"), act=replace(bits_of("nvfp4").act, dynamic=False)), "blocks", {"groups": 2}),
    ("svdquant", bits_of("nvfp4"), "blocks", {}),
    ("svdquant", bits_of("int4_g64"), "blocks", {}),
    ("gptq", GROUPS, "blocks", {}),
    ("smoothquant", DYNAMIC, "blocks", {}),
    ("smoothquant", STATIC, "all", {}),
    ("quarot", DYNAMIC, "blocks", {}),
    ("duquant", DYNAMIC, "blocks", {}),
    ("svdquant", DYNAMIC, "blocks", {}),
    ("htg", STATIC, "blocks", {"groups": 2}),
    ("htg", STATIC, "all", {"groups": 3}),
    ("htg", STATIC, "blocks", {"groups": 4, "sampler": Sampler("ddim", 4, 1.5)}),  # finds its steps itself
    ("lrq_dit", DYNAMIC, "blocks", {}),
    ("lrq_dit", DYNAMIC, "blocks", {"tlq": "code"}),
    ("ptq4dit", STATIC, "all", {"iterations": 20}),
    ("q_dit", GROUPS, "blocks", {}),
    ("repq", STATIC, "blocks", {}),
    ("vidit_q", DYNAMIC, "blocks", {}),
]
HEADER = 8  # bytes of the header's length, which comes before it
every_case = pytest.mark.parametrize(
    ("method", "bits", "scope", "params"), CASES, ids=[f"{c[0]}-{c[1].label}-{c[2]}-{'-'.join(c[3])}" for c in CASES]
)


@pytest.fixture
def another():
    """The same architecture with other weights, none of which may be left."""
    return load_model(ModelSpec("another", "dit", random=SMALL_DIT, seed=1)).transformer


@every_case
def test_a_reloaded_export_draws_the_same_images_bit_for_bit(
    written, drawn, small_model, another, method, bits, scope, params
):
    export = written(method, bits, scope, **params)
    before = drawn(small_model, export.built())
    after = drawn(small_model, load_quantized(export.folder, another))
    assert torch.equal(before.latents, after.latents)
    assert torch.equal(before.pixels, after.pixels)


@every_case
def test_the_file_holds_what_the_record_counts(written, method, bits, scope, params):
    export = written(method, bits, scope, **params)
    tensors, path = export.described["tensors"], export.folder / TENSORS
    header = int.from_bytes(path.read_bytes()[:HEADER], "little")
    assert tensors["file_bytes"] == path.stat().st_size == tensors["bytes"] + header + HEADER
    if export.dtype == torch.bfloat16:  # the record counts floats at 16 bits
        assert tensors["bytes"] == export.size["model_bytes"]


def test_class_conditional_exports_find_their_step_as_well(written, drawn, small_model, small_sampler, another):
    """Integers, one a row; the clock is set by nobody else."""
    loaded = load_quantized(written("htg", STATIC, groups=4, sampler=small_sampler).folder, another)
    steps = []
    loaded.register_forward_hook(lambda module, args, output: steps.append(int(module.clock.step)))
    inputs = small_model.step_inputs(2)
    for timestep in (500, 0, 750, 250):
        loaded(**placed(inputs | {"timestep": torch.full((2,), timestep)}, torch.bfloat16, "cpu"))
    assert steps == [1, 3, 0, 2]
    with pytest.raises(ValueError, match="was called at 499"):
        loaded(**placed(inputs | {"timestep": torch.full((2,), 499)}, torch.bfloat16, "cpu"))


def test_an_export_runs_on_any_backend(written, drawn, small_model, another):
    export = written("rtn", DYNAMIC.with_widths(8, 8))
    simulated = load_quantized(export.folder, another, backend="simulate")
    assert {layer.backend for layer in quant_layers(simulated).values()} == {"simulate"}
    before = drawn(small_model, export.built("simulate"))
    assert torch.equal(before.latents, drawn(small_model, simulated).latents)


def test_e4m3_codes_lie_in_the_file_as_what_they_are(written):
    export = written("gptq", FP8)
    tensors = load_file(export.folder / TENSORS)
    for name, layer in export.recipe.layers.items():
        (stored,) = (tensors[key] for key in tensors if key.startswith(f"layers/{name}/") and key.endswith("/codes_OC"))
        assert stored.dtype == torch.float8_e4m3fn
        assert torch.equal(stored.view(torch.uint8), layer.weight.codes_OC.view(torch.uint8))


def test_the_model_that_it_is_loaded_into_is_left_alone(written, another):
    before = {name: tensor.clone() for name, tensor in another.state_dict().items()}
    load_quantized(written("smoothquant", DYNAMIC).folder, another)
    assert not hasattr(another, "clock")
    for name, tensor in another.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_an_export_overwrites_nothing(written):
    export = written("rtn", DYNAMIC)
    with pytest.raises(UserError, match="export exists; an export overwrites nothing"):
        save_quantized(export.folder, export.target, export.recipe, dtype=torch.bfloat16, about={})


class Flip(Rotation):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x):
        return x.flip(-1)


def test_a_plugins_own_rotation_is_refused_by_name_and_leaves_nothing(small_target, tmp_path):
    name = small_target.layers[0]
    recipe = ModelRecipe({name: LayerRecipe(Transform(rotations=(Flip(small_target.module(name).in_features),)))})
    with pytest.raises(UserError, match=f"layers/{name}.*: a Flip cannot be written to a file; known: .*Hadamard"):
        save_quantized(tmp_path / "export", small_target, recipe, dtype=torch.bfloat16, about={})
    assert list(tmp_path.iterdir()) == []
