from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from ditbench.harness.backends import simulate
from ditbench.harness.build.build import build
from ditbench.harness.fitting.rounding import nearest
from ditbench.harness.quant.accounting import _act_bits, _fold_bytes, account, stored_bytes
from ditbench.harness.quant.folds import _row_fold
from ditbench.harness.quant.layer_names import linear_names
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight, static_quant
from ditbench.harness.quant.recipe import AttentionRecipe, LayerRecipe, LowRank, ModelRecipe
from ditbench.harness.quant.sage import FORMS, SageRecipe
from ditbench.harness.quant.spec import INT, Bits, QuantSpec
from ditbench.harness.quant.steps import StepTable
from ditbench.harness.quant.target import Site, TableRows, Target
from ditbench.harness.quant.transforms import Hadamard, Permutation, Transform, random_signs
from ditbench.harness.quant.uneven import LeadingQuant

DYNAMIC = QuantSpec(8, "per_token", dynamic=True)
BY_STEP = static_quant(
    StepTable(-torch.ones(2), torch.tensor([0, 1, 1])),
    StepTable(torch.ones(2), torch.tensor([0, 1, 1])),
    QuantSpec(8, "per_tensor", symmetric=False),
)
ACTS = {"float": None, "dynamic": ActQuant(DYNAMIC), "static by step": BY_STEP}


class Toy(nn.Module):
    """Two layers, by hand: 8 → 4 with bias, 4 → 6 without; and a norm that is no layer to quantize."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 6, bias=False)


@pytest.fixture
def toy() -> Target:
    return Target(Toy().requires_grad_(False), ("first", "second"), (Site("a", ("first",)), Site("b", ("second",))))


MACS = {"first": 32 * 10, "second": 24 * 10, "": 700}  # ten tokens, and 140 in attention


def nbytes(module: nn.Module, without: str = "never") -> int:
    """Of all buffers, indices in 16 bits."""
    tensors = [tensor for name, tensor in module.state_dict().items() if without not in name]
    return sum(tensor.numel() * (2 if tensor.dtype == torch.int64 else tensor.itemsize) for tensor in tensors)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("width", [48, 60])
def test_a_layers_bytes_are_those_of_the_kernels_buffers(width, granularity, symmetric, act, normal):
    weight = normal(7, width)
    for bits in range(2, 9):
        spec = QuantSpec(bits, granularity, symmetric, group_size=12 if granularity == "per_group" else None)
        layer = LayerRecipe(weight=quantize_weight(weight, spec), act=ACTS[act])
        assert stored_bytes(layer, folded=False) == nbytes(simulate.make_kernel(layer, weight))


@pytest.mark.parametrize(
    "case", ["plain", "grouped", "rotated", "permuted scale", "folded", "low rank", "static", "float sides"]
)
def test_the_models_bytes_are_those_of_the_built_model(case, small_target, small_model):
    """Every tensor of the model in bf16, quantized or not, without what is folded away."""
    transforms: dict[str, Transform] = {}
    folded: frozenset[str] = frozenset()
    bits = Bits(QuantSpec(4, "per_channel"), DYNAMIC)
    scale = Transform(scale_C=torch.linspace(0.5, 2, 48))
    site = small_target.sites[0]
    if case == "grouped":
        bits = Bits(QuantSpec(3, "per_group", symmetric=False, group_size=12), DYNAMIC)
    elif case == "rotated":
        transforms = {
            n: Transform(rotations=(Hadamard(48, random_signs(48, torch.Generator())),)) for n in site.consumers
        }
    elif case == "permuted scale":
        transforms = dict.fromkeys(site.consumers, scale)
    elif case == "folded":
        transforms, folded = dict.fromkeys(site.consumers, scale), frozenset({site.name})
    elif case == "float sides":
        bits = Bits(None, DYNAMIC)
    recipe = nearest(small_target, bits, {}, transforms, folded)
    if case == "low rank":
        old = recipe.layers["transformer_blocks.1.ff.net.2"]
        branch = LowRank(torch.zeros(3, 192), torch.zeros(48, 3))
        recipe.layers["transformer_blocks.1.ff.net.2"] = LayerRecipe(weight=old.weight, act=old.act, low_rank=branch)
    elif case == "static":
        static = static_quant(StepTable(-torch.ones(1)), StepTable(torch.ones(1)), QuantSpec(8, "per_tensor"))
        for name, layer in recipe.layers.items():
            recipe.layers[name] = LayerRecipe(weight=layer.weight, act=static)
    _, size = account(small_target, recipe, small_model.macs, "W4A8")
    built = build(small_target, recipe, dtype=torch.bfloat16, backend="simulate" if bits.weight else "auto")
    parameters = {name for name, _ in small_target.transformer.named_parameters()}
    buffers = {n for n, _ in small_target.transformer.named_buffers()}
    stored = {n: t for n, t in built.state_dict().items() if ".upstream." not in n and n not in buffers - parameters}
    assert size["model_bytes"] == sum(tensor.nbytes for tensor in stored.values())
    assert size["compression"] == size["baseline_model_bytes"] / size["model_bytes"]


def test_effective_bits_are_those_of_a_sum_by_hand(toy, normal):
    """first: 4 × 8 codes of 4 bits = 16 bytes, 4 scales = 16 bytes; second stays in 16 bits = 48 bytes."""
    first = LayerRecipe(weight=quantize_weight(normal(4, 8), QuantSpec(4, "per_channel")), act=ActQuant(DYNAMIC))
    bits, size = account(toy, ModelRecipe({"first": first}), MACS, "W4A8")
    assert bits["label"] == "W4A8"
    assert bits["weight_bits_effective"] == pytest.approx(8 * (32 + 48) / (32 + 24))
    assert bits["weight_bits_quantized_layers"] == pytest.approx(8 * 32 / 32)
    assert bits["weight_bits_mac_weighted"] == pytest.approx((320 * 8 * 32 / 32 + 240 * 16) / 560)
    assert bits["act_bits_effective"] == pytest.approx((320 * 8 + 240 * 16) / 560)
    assert bits["mac_share_quantized"] == pytest.approx(320 / 700)
    assert bits["mac_share_weight_quantized"] == pytest.approx(320 / 700)
    assert bits["float_layers"] == ["second"]
    # parameters: 32 + 4 in first, 4 + 4 in the norm, 24 in second
    assert size["baseline_model_bytes"] == 2 * (36 + 8 + 24)
    assert size["model_bytes"] == (32 + 2 * 4) + 2 * 8 + 2 * 24
    assert size["compression_quantized_layers"] == pytest.approx(2 * 36 / (32 + 2 * 4))


def test_bits_that_change_with_the_step_count_by_the_steps_they_hold_for(toy):
    """Activations of 4 bits at one step of four, then of 8, then in float."""
    four, eight = (LayerRecipe(act=ActQuant(QuantSpec(bits, "per_token", dynamic=True))) for bits in (4, 8))
    shares = [(four, 0.25), (eight, 0.5), (LayerRecipe(), 0.25)]
    assert _act_bits(shares, 8) == pytest.approx(0.25 * 4 + 0.5 * 8 + 0.25 * 16)


def test_channels_that_a_quantizer_leaves_in_float_count_at_16_bits_and_their_macs_not_at_all(toy, normal):
    """6 of first's 8 channels at 4 bits."""
    first = LayerRecipe(
        weight=quantize_weight(normal(4, 8), QuantSpec(4, "per_channel")),
        act=LeadingQuant(QuantSpec(4, "per_token", dynamic=True), channels=6),
    )
    bits, _ = account(toy, ModelRecipe({"first": first}), MACS, "W4A4")
    assert bits["act_bits_effective"] == pytest.approx((320 * (6 * 4 + 2 * 16) / 8 + 240 * 16) / 560)
    assert bits["mac_share_quantized"] == pytest.approx(0.75 * 320 / 700)


@pytest.mark.parametrize(
    ("kept", "down", "share"),
    [
        ([1, 1, 1, 1, 1, 1, 0, 0], [6, 7], 6 / 8),  # two channels, and no code of theirs
        ([1, 1, 1, 1, 1, 1, 1, 0], [6, 7], 7 / 8),  # one of them has codes beside the branch
        ([1, 1, 1, 1, 1, 1, 0, 0], None, 1),  # a branch of all channels takes none of them over
    ],
)
def test_channels_whose_weights_a_branch_keeps_are_not_quantized(toy, normal, kept, down, share):
    rows = normal(2, 8) if down is None else torch.eye(8)[down]
    weight = quantize_weight(normal(4, 8) * torch.tensor(kept), QuantSpec(4, "per_channel"))
    bits, _ = account(
        toy, ModelRecipe({"first": LayerRecipe(weight=weight, low_rank=LowRank(rows, normal(4, 2)))}), MACS, ""
    )
    assert bits["mac_share_weight_quantized"] == pytest.approx(share * 320 / 700)


def test_weight_only_counts_no_mac_as_quantized_on_both_sides(toy, normal):
    first = LayerRecipe(weight=quantize_weight(normal(4, 8), QuantSpec(4, "per_channel")))
    bits, _ = account(toy, ModelRecipe({"first": first}), MACS, "W4A16")
    assert bits["mac_share_quantized"] == 0
    assert bits["mac_share_weight_quantized"] == pytest.approx(320 / 700)
    assert bits["act_bits_effective"] == 16


def test_the_float_model_is_its_own_baseline(toy):
    bits, size = account(toy, ModelRecipe({}), MACS, "fp")
    assert bits["weight_bits_effective"] == bits["act_bits_effective"] == 16
    assert bits["weight_bits_quantized_layers"] is None and size["compression_quantized_layers"] is None
    assert bits["float_layers"] == ["first", "second"]
    assert size["compression"] == 1


@pytest.mark.parametrize(
    ("transform", "added"),
    [
        (Transform(scale_C=torch.ones(8)), 4 * 8),
        (Transform(rotations=(Hadamard(8, torch.ones(8)),)), 8),
        (Transform(rotations=(Hadamard(8),)), 0),
        (Transform(rotations=(Permutation(torch.arange(8)),)), 2 * 8),
        (Transform(StepTable.constant(torch.ones(8))), 4 * 8),
    ],
    ids=["scale", "signed Hadamard", "plain Hadamard", "permutation", "shift"],
)
def test_what_runs_online_is_counted_and_constants_are_not(transform, added, normal):
    weight = quantize_weight(normal(4, 8), QuantSpec(4, "per_channel"))
    plain = stored_bytes(LayerRecipe(weight=weight), folded=False)
    assert stored_bytes(LayerRecipe(transform, weight), folded=False) == plain + added
    if not transform.rotations:
        assert stored_bytes(LayerRecipe(transform, weight), folded=True) == plain


def test_a_shift_by_step_costs_one_bias_per_group_in_producer_and_consumers(small_target, small_model):
    site = small_target.sites[0]
    macs = small_model.macs
    sizes = {}
    for groups in ([0, 0, 0, 0], [0, 0, 1, 2]):
        rows = torch.zeros(max(groups) + 1, 48)
        shared = Transform(StepTable(rows, torch.tensor(groups)))
        layers = {name: LayerRecipe(shared) for name in site.consumers}
        sizes[max(groups) + 1] = account(
            small_target, ModelRecipe(layers, frozenset({site.name}), num_steps=4), macs, ""
        )[1]
    extra = sizes[3]["model_bytes"] - sizes[1]["model_bytes"]
    assert extra == 2 * 2 * (6 * 48 + 3 * 48)  # two more rows of adaLN's bias and of q, k and v's, two bytes each


@pytest.mark.parametrize("shape", [(1152, 1152), (4608, 1152), (1152, 4608)], ids=str)
def test_four_bits_make_the_layers_of_a_dit_xl_at_least_three_and_a_half_times_smaller(shape):
    outputs, width = shape
    module = nn.Sequential(nn.Linear(width, outputs)).requires_grad_(False)
    target = Target(module, ("0",), (Site("0", ("0",)),))
    recipe = nearest(target, Bits(QuantSpec(4, "per_channel"), DYNAMIC), {})
    _, size = account(target, recipe, {"0": 1, "": 1}, "W4A8")
    assert 3.5 <= size["compression_quantized_layers"] < 4


def test_the_share_of_quantized_macs_leaves_attention_and_adaln_out(small_target, small_model):
    macs = small_model.macs
    bits, _ = account(small_target, nearest(small_target, Bits(QuantSpec(4, "per_channel"), DYNAMIC), {}), macs, "W4A8")
    quantized = 2 * 16 * (4 * 48 * 48 + 2 * 4 * 48 * 48)
    assert bits["mac_share_quantized"] == pytest.approx(quantized / macs[""])
    assert 0.8 < bits["mac_share_quantized"] < 1
    assert set(bits["float_layers"]) == set(linear_names(small_target.transformer)) - set(small_target.layers)


@pytest.mark.parametrize("blocks", [1, 2])
def test_products_of_attention_count_for_the_blocks_whose_operands_are_quantized(blocks, small_model):
    """A protocol may quantize the operands of some blocks only."""
    target, macs = small_model.target(attention=True), small_model.macs
    target = replace(target, attention=target.attention[:blocks])
    recipe = ModelRecipe({}, attention=dict.fromkeys(target.attention, AttentionRecipe()))
    bits, _ = account(target, recipe, macs, "")
    outside_linear = macs[""] - sum(macs[name] for name in linear_names(target.transformer))
    assert len(target.blocks) == 2 and outside_linear == 2 * macs[target.attention[0]] > 0
    assert bits["mac_share_quantized"] == pytest.approx(outside_linear * blocks / 2 / macs[""])
    assert bits["attention_bits_effective"] == 16  # no operand has a quantizer
    eight = AttentionRecipe(*[ActQuant(QuantSpec(8, "per_tensor", dynamic=True))] * 4)
    for each, expected in ((eight, 8), (FORMS["int8"], 8), (FORMS["nvfp4"], 4.5), (SageRecipe(INT, None), 12)):
        recipe = ModelRecipe({}, attention=dict.fromkeys(target.attention, each))
        found = account(target, recipe, macs, "")[0]["attention_bits_effective"]
        assert found == pytest.approx(16 - (16 - expected) * blocks / 2)


@pytest.mark.parametrize("groups", [None, [0, 0, 1, 2]], ids=["scale", "scale and shift by step"])
def test_a_fold_into_adaln_single_costs_what_it_keeps(groups):
    """Of two producers, 16-bit floats and indices: 1 / s, what γ is given, and what β is given in each group of steps."""
    shift = None if groups is None else StepTable(torch.ones(3, 8), torch.tensor(groups))
    transform = Transform(shift, torch.full((8,), 2.0))
    fold = _row_fold(TableRows("", "table", "temb", 0, 1), torch.zeros(6, 8), transform, torch.bfloat16)
    kept = [fold.inverse_C, fold.scale_add_C, fold.shift_add.rows]
    index_bytes = 0 if groups is None else 2 * len(groups)
    assert _fold_bytes(transform, 2) == 2 * (sum(part.nbytes for part in kept) + index_bytes)
    assert _fold_bytes(transform, 0) == 0
