"""Norms, modulations and gates of a quantized model's blocks, by our kernels."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from ditbench.harness.backends import simulate, vnni
from ditbench.harness.build import blocks
from ditbench.harness.build.build import build, float_copy
from ditbench.harness.build.layer import QuantLinear
from ditbench.harness.build.pending import Norm, settled
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight, static_quant
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.spec import QuantSpec
from ditbench.harness.quant.steps import StepTable
from ditbench.harness.quant.transforms import Transform

pytestmark = pytest.mark.skipif(vnni.cpu_lacks() is not None, reason=str(vnni.cpu_lacks()))
WEIGHT = QuantSpec(8, "per_channel")
WIDTH, TOKENS = 48, 16
ACTS = {
    "dynamic": ActQuant(QuantSpec(8, "per_token", dynamic=True)),
    "asymmetric": ActQuant(QuantSpec(6, "per_token", symmetric=False, dynamic=True), clip=0.9),
    "groups": ActQuant(QuantSpec(8, "per_group", dynamic=True, group_size=16)),
    "static": static_quant(
        StepTable.constant(torch.tensor(-3.0)), StepTable.constant(torch.tensor(2.0)), QuantSpec(8, "per_tensor")
    ),
    "of a sample": ActQuant(QuantSpec(8, "per_tensor", dynamic=True)),
}


def quantized(model, act: ActQuant = ACTS["dynamic"], backend: str = "auto", **settings: Any) -> nn.Module:
    target = model.target()
    layers = {n: LayerRecipe(weight=quantize_weight(target.weight(n), WEIGHT), act=act) for n in target.layers}
    return build(target, ModelRecipe(layers), backend=backend, **settings)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def called(block: nn.Module, x: Tensor) -> Tensor:
    return block(x, timestep=torch.tensor([3, 700]), class_labels=torch.tensor([1, 2]))


def block_of(model: nn.Module) -> Any:
    return model.transformer_blocks[0]


@pytest.fixture
def quantizings(monkeypatch) -> Callable[[], int]:
    """How many tensors have been quantized by a pass of their own."""
    calls: list[torch.Size] = []

    def noted(self, x: Tensor, step: Tensor | None):
        calls.append(x.shape)
        return original(self, x, step)

    original = vnni.VnniKernel.quantized
    monkeypatch.setattr(vnni.VnniKernel, "quantized", noted)
    return lambda: len(calls)


def exactly(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    x, scale, shift = x.double(), scale.double(), shift.double()
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


@pytest.mark.parametrize("width", [48, 33, 1152])
def test_norm_modulation_and_gate_are_exact_to_one_rounding(width):
    x, y = drawn(2, 5, width) * 3 + 1, drawn(2, 5, width, seed=1)
    shift, scale, gate = drawn(2, 3 * width, seed=2).chunk(3, dim=1)  # rows lie apart, as they do behind adaLN
    near = {"rtol": 2**-8, "atol": 1e-6}
    found = settled(blocks.modulated(x, 1 + scale.float(), shift, 1e-6))
    torch.testing.assert_close(found.double(), exactly(x, scale, shift), **near)
    found = blocks.gated(x, gate, y)
    torch.testing.assert_close(found.double(), x.double() + gate.double()[:, None] * y.double(), **near)


@pytest.mark.parametrize("act", ["dynamic", "asymmetric", "groups", "static"])
def test_codes_that_are_handed_over_are_those_of_the_floats_beside_them(act):
    weight = quantize_weight(drawn(8, WIDTH).float(), WEIGHT)
    kernel = vnni.VnniKernel(weight, ACTS[act])
    x, factor, shift = drawn(2, 5, WIDTH), drawn(2, WIDTH, seed=1).float(), drawn(2, WIDTH, seed=2).float()
    made = kernel.normed(x, Norm(1e-6, centred=True), factor, shift, None, keep=True)
    assert made is not None
    y, rows = made
    assert torch.equal(y, torch.ops.ditbench_vnni.normed(x, factor, shift, 1e-6, True))
    for found, expected in zip(rows.codes, kernel.quantized(y, None), strict=True):
        assert torch.equal(found, expected)


def test_what_reads_a_norm_quantizes_nothing_itself(small_model, quantizings):
    """Left are the attention's output and the GELU's."""
    with torch.no_grad():
        called(block_of(quantized(small_model)), drawn(2, TOKENS, WIDTH))
    assert quantizings() == 2


@pytest.mark.parametrize("act", list(ACTS))
def test_a_simulated_block_gives_the_same_bits(small_model, act):
    x = drawn(2, TOKENS, WIDTH)
    with torch.no_grad():
        real, simulated = (
            called(block_of(quantized(small_model, ACTS[act], backend)), x) for backend in (vnni.NAME, simulate.NAME)
        )
    assert torch.equal(real, simulated)


def test_a_block_computes_what_diffusers_does(small_model):
    """To what rounding to bfloat16 and int8 leaves open."""
    x = drawn(2, TOKENS, WIDTH)
    exact, ours = block_of(float_copy(small_model.target(), dtype=torch.float64)), block_of(quantized(small_model))
    with torch.no_grad():
        expected = called(exact, x.double())
        error = (called(ours, x) - expected).norm() / expected.norm()
    assert error < 0.004


def test_a_layer_that_transforms_its_input_quantizes_what_it_made_of_it(small_model, quantizings):
    target = small_model.target()
    scale = Transform(scale_C=torch.linspace(0.5, 2, WIDTH))
    layers = {
        name: LayerRecipe(
            weight=quantize_weight(target.weight(name), WEIGHT),
            act=ACTS["dynamic"],
            transform=scale if name.endswith("net.0.proj") else Transform(),
        )
        for name in target.layers
    }
    real, simulated = (build(target, ModelRecipe(layers), backend=name) for name in (vnni.NAME, simulate.NAME))
    x = drawn(2, TOKENS, WIDTH)
    with torch.no_grad():
        assert torch.equal(called(block_of(real), x), called(block_of(simulated), x))
    assert quantizings() == 3


def test_an_input_that_was_changed_by_a_hook_is_quantized_again(small_model):
    """Codes are of what the norm gave, and the layer reads something else."""
    x, outputs = drawn(2, TOKENS, WIDTH), []
    for backend in (vnni.NAME, simulate.NAME):
        block = block_of(quantized(small_model, backend=backend))
        block.ff.register_forward_pre_hook(lambda module, args: (args[0].mul_(0.5),))
        with torch.no_grad():
            outputs.append(called(block, x))
    assert torch.equal(*outputs)


def test_in_inference_mode_nothing_is_left_on_what_a_norm_gave_and_the_result_is_the_same(small_model, quantizings):
    """q gets its codes with the norm, k and v make their own."""
    block, x = block_of(quantized(small_model)), drawn(2, TOKENS, WIDTH)
    with torch.no_grad():
        expected = called(block, x)
    before = quantizings()
    with torch.inference_mode():
        assert torch.equal(called(block, x.clone()), expected)
    assert (before, quantizings() - before) == (2, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_of_other_dtypes_and_float_models_stay_diffusers(small_model, dtype):
    assert type(block_of(quantized(small_model, dtype=dtype))) is BasicTransformerBlock
    assert type(block_of(float_copy(small_model.target(), dtype=torch.bfloat16))) is BasicTransformerBlock


def test_a_block_that_is_compiled_or_learns_does_what_diffusers_does(small_model, monkeypatch):
    block, x = block_of(quantized(small_model)), drawn(2, TOKENS, WIDTH)
    theirs = copy.deepcopy(block)
    theirs.__class__ = BasicTransformerBlock
    run = torch.compile(block, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        ours = called(block, x)
        assert torch.equal(called(run, x), called(theirs, x))
        assert not torch.equal(ours, called(theirs, x))


def test_a_block_with_a_norm_of_its_own_scale_or_another_modulation_has_no_form_written_out():
    for norm in ({"norm_elementwise_affine": True, "norm_type": "ada_norm_single"}, {"norm_type": "layer_norm"}):
        assert not blocks.has_our_form(BasicTransformerBlock(16, 2, 8, **norm))


def test_a_copy_and_what_was_pickled_are_whole(small_model):
    block, x = block_of(quantized(small_model)), drawn(2, TOKENS, WIDTH)
    with torch.no_grad():
        expected = called(block, x)
        for again in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            assert torch.equal(called(again, x), expected)
            assert isinstance(again, BasicTransformerBlock) and isinstance(again.attn1.to_q, QuantLinear)


def test_a_block_with_adaln_single_and_text_computes_what_diffusers_does():
    settings = {"cross_attention_dim": 32, "activation_fn": "gelu-approximate", "attention_bias": True}
    torch.manual_seed(0)
    ours = BasicTransformerBlock(
        WIDTH, 2, 24, norm_type="ada_norm_single", norm_elementwise_affine=False, **settings
    ).bfloat16()
    exact = copy.deepcopy(ours).double()
    ours.__class__ = blocks.modulated_by_us(BasicTransformerBlock)
    x, text, rows = drawn(2, TOKENS, WIDTH), drawn(2, 7, 32, seed=1), drawn(2, 6 * WIDTH, seed=2)
    mask = torch.zeros(2, 1, 7).index_fill(2, torch.tensor([5, 6]), -1e4)
    given = {"encoder_hidden_states": text, "encoder_attention_mask": mask.bfloat16(), "timestep": rows}
    with torch.no_grad():
        found = ours(x, **given)
        expected = exact(x.double(), **{name: tensor.double() for name, tensor in given.items()})
    assert (found - expected).norm() < 0.004 * expected.norm()
