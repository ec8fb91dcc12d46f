"""Simulated products in bfloat16: the bits of float32, shown on an emulation of what tensor cores do."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from ditbench.harness.backends import exact_sums
from ditbench.harness.backends.exact_sums import EXACT, LARGEST, STEP, WholeWeight, largest_code, slice_width
from ditbench.harness.backends.simulate import SimulatedKernel
from ditbench.harness.quant.quantizers import (
    ActQuant,
    QuantizedWeight,
    fake_quantize_activation,
    quantize_weight,
    static_quant,
)
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.spec import E4M3, QuantSpec
from ditbench.harness.quant.steps import StepTable

CPU = torch.device("cpu")
ADDENDS = 8  # products that a tensor core adds at a time to what it has


def cut(values: Tensor, last_bit: Tensor) -> Tensor:
    return (values / last_bit).trunc() * last_bit


def last_bit_of(largest: Tensor) -> Tensor:
    """What the last of 24 bits is worth."""
    return 2.0 ** (largest.frexp().exponent - 24).double()


def on_tensor_cores(x_TC: Tensor, weight_CO: Tensor, *, order: str = "as it is", parts: int = 1) -> Tensor:
    """bfloat16 by bfloat16 → float32: eight products and the sum so far are aligned to the largest of them and cut off there,
    as the sum of them is; the parts of the columns are added in float32 (split-K).
    """
    assert x_TC.dtype == weight_CO.dtype == torch.bfloat16
    products_TOC = x_TC.double()[:, None] * weight_CO.T.double()
    if order == "largest first":
        products_TOC = products_TOC.sort(descending=True).values
    elif order == "shuffled":
        products_TOC = products_TOC[..., torch.randperm(len(weight_CO), generator=torch.Generator().manual_seed(1))]
    total = torch.zeros(products_TOC.shape[:2])
    for part in products_TOC.tensor_split(parts, -1):
        so_far = torch.zeros(products_TOC.shape[:2], dtype=torch.float64)
        for few in part.split(ADDENDS, -1):
            addends = torch.cat([few, so_far[..., None]], -1)
            added = cut(addends, last_bit_of(addends.abs().amax(-1, keepdim=True))).sum(-1)
            so_far = cut(added, last_bit_of(added.abs()))
        total += so_far.float()
    return total


MULTIPLY = {
    "as it is": on_tensor_cores,
    "largest first": partial(on_tensor_cores, order="largest first"),
    "shuffled": partial(on_tensor_cores, order="shuffled"),
    "split in 7": partial(on_tensor_cores, order="largest first", parts=7),
}


def whole(*shape: int, largest: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()


def extremes(*shape: int, largest: int, seed: int = 0) -> Tensor:
    """Random signs, all as large as can be, but for a row of one sign and a few ones, which a sum must not lose."""
    values = largest * whole(*shape, largest=1, seed=seed).sign()
    values[values == 0] = largest
    values[0] = largest
    values[:, :: shape[1] // 3] = 1
    return values


def test_every_whole_number_up_to_256_is_a_bfloat16_and_every_product_of_two_a_float32():
    numbers = torch.arange(-LARGEST, LARGEST + 1)
    assert torch.equal(numbers.bfloat16().long(), numbers)
    assert torch.tensor(LARGEST + 1).bfloat16().long() == LARGEST
    narrow = numbers.bfloat16().float()
    assert torch.equal((narrow[:, None] * narrow).long(), numbers[:, None] * numbers)


@pytest.mark.parametrize("multiply", MULTIPLY.values(), ids=MULTIPLY)
@pytest.mark.parametrize(("x_largest", "w_largest"), [(127, 127), (255, 127), (255, 255), (7, 7), (256, 256), (127, 7)])
def test_sums_are_exact_in_any_order_with_the_largest_codes_there_are(multiply, x_largest, w_largest, monkeypatch):
    monkeypatch.setattr(exact_sums, "multiply", multiply)
    for draw in (whole, extremes):
        x_TC, weight_OC = draw(5, 1152, largest=x_largest), draw(6, 1152, largest=w_largest, seed=1)
        weight = WholeWeight(weight_OC.bfloat16(), slice_width(weight_OC, x_largest))
        exact = x_TC.long() @ weight_OC.long().T
        found = weight.product(x_TC, slice(None))
        assert found.dtype == torch.float32
        # slices are added in float32, which rounds a result that it cannot hold, once for each
        if int(exact.abs().max()) < EXACT:
            assert torch.equal(found.long(), exact)
        else:
            torch.testing.assert_close(found.double(), exact.double(), rtol=1152 / STEP * 2**-24, atol=0)


@pytest.mark.parametrize("multiply", MULTIPLY.values(), ids=MULTIPLY)
def test_without_slices_the_emulated_device_would_lose_ones(multiply):
    """What the bound is for: the emulation can tell."""
    x_TC, weight_OC = extremes(2, 4608, largest=255), extremes(2, 4608, largest=127, seed=1)
    found = multiply(x_TC.bfloat16(), weight_OC.bfloat16().T)
    assert not torch.equal(found.long(), x_TC.long() @ weight_OC.long().T)


@pytest.mark.parametrize("draw", [whole, extremes])
@pytest.mark.parametrize("shape", [(3, 96), (4, 1152), (4, 4608), (2, 12288), (3, 50)], ids=str)
@pytest.mark.parametrize("largest", [7, 127, 255])
def test_slices_keep_the_bound_and_are_as_few_as_can_be(draw, shape, largest):
    weight_OC = draw(*shape, largest=127)
    width = slice_width(weight_OC, largest)

    def most(width: int) -> int:
        return max(int(part.abs().sum(1).amax()) for part in weight_OC.split(width, 1)) * largest

    slices = -(-shape[1] // width)
    assert width % STEP == 0 and most(width) < EXACT
    if slices > 1:
        steps = -(-shape[1] // STEP)
        assert most(-(-steps // (slices - 1)) * STEP) >= EXACT


def static(zero_points: list[float], bits: int = 8) -> ActQuant:
    spec = QuantSpec(bits, "per_tensor", symmetric=False)
    scale = StepTable(torch.full((len(zero_points),), 0.02), torch.arange(len(zero_points)))
    return ActQuant(spec, scale, StepTable(torch.tensor(zero_points), torch.arange(len(zero_points))))


def test_the_largest_activation_follows_from_its_format_and_tables():
    assert largest_code(ActQuant(QuantSpec(8, "per_token", dynamic=True))) == 127
    assert largest_code(ActQuant(QuantSpec(8, "per_token", symmetric=False, dynamic=True))) == 255
    assert largest_code(static([100.0, 140.0])) == 155
    assert largest_code(static([0.0, 5.0], bits=4)) == 15
    assert largest_code(static([100.5])) is None
    assert largest_code(static([300.0])) is None
    assert largest_code(static([-40.0])) is None
    assert largest_code(ActQuant(QuantSpec(8, "per_token", dynamic=True, number=E4M3))) is None


def kernel(act: ActQuant, weight_spec: QuantSpec, width: int = 1152) -> SimulatedKernel:
    weight_OC = torch.randn(24, width, generator=torch.Generator().manual_seed(0))
    return SimulatedKernel(LayerRecipe(weight=quantize_weight(weight_OC, weight_spec), act=act), weight_OC)


STATIC = static_quant(
    StepTable(torch.tensor([-1.0, -3.0]), torch.tensor([0, 1])),
    StepTable(torch.tensor([4.0, 2.0]), torch.tensor([0, 1])),
    QuantSpec(8, "per_tensor", symmetric=False),
)
IN_BFLOAT16 = {
    "W8A8": (ActQuant(QuantSpec(8, "per_token", dynamic=True)), QuantSpec(8, "per_channel")),
    "W4A4": (ActQuant(QuantSpec(4, "per_token", dynamic=True)), QuantSpec(4, "per_channel")),
    "asymmetric": (
        ActQuant(QuantSpec(8, "per_token", symmetric=False, dynamic=True)),
        QuantSpec(8, "per_channel", symmetric=False),
    ),
    "groups": (
        ActQuant(QuantSpec(8, "per_group", dynamic=True, group_size=128)),
        QuantSpec(4, "per_group", group_size=128),
    ),
    "groups of one side": (
        ActQuant(QuantSpec(8, "per_token", dynamic=True)),
        QuantSpec(4, "per_group", symmetric=False, group_size=96),
    ),
    "static by step": (STATIC, QuantSpec(8, "per_channel")),
}
IN_FLOAT32 = {
    "e4m3": (
        ActQuant(QuantSpec(8, "per_token", dynamic=True, number=E4M3)),
        QuantSpec(8, "per_channel", number=E4M3),
    ),
    "fractional zero point": (static([100.5]), QuantSpec(8, "per_channel")),
}


@pytest.fixture
def accelerator(monkeypatch) -> list[Tensor]:
    """The CPU passes for a device that has the product; what it was given."""
    given: list[Tensor] = []

    def multiply(x_TC: Tensor, weight_CO: Tensor) -> Tensor:
        given.append(x_TC)
        return on_tensor_cores(x_TC, weight_CO, order="largest first", parts=2)

    monkeypatch.setattr(exact_sums, "available", lambda device: True)
    monkeypatch.setattr(exact_sums, "multiply", multiply)
    return given


@pytest.mark.parametrize("case", [*IN_BFLOAT16, *IN_FLOAT32])
def test_a_layer_gives_the_same_bits_in_bfloat16_and_float32(case, request):
    act, weight_spec = (IN_BFLOAT16 | IN_FLOAT32)[case]
    x = 3 * torch.randn(2, 5, 1152, generator=torch.Generator().manual_seed(1))
    step = torch.tensor(0)
    exact = kernel(act, weight_spec)(x, step)
    given = request.getfixturevalue("accelerator")
    found = kernel(act, weight_spec)
    assert torch.equal(found(x, step), exact)
    assert bool(given) == (case in IN_BFLOAT16)
    assert (found._unpacked is None) == (case in IN_BFLOAT16), "one copy of the codes is held"


def test_weights_with_a_fractional_zero_point_are_multiplied_in_float32(accelerator):
    spec = QuantSpec(8, "per_channel", symmetric=False)
    codes = torch.randint(0, 256, (4, 96), dtype=torch.uint8)
    weight = QuantizedWeight(codes, torch.ones(4, 1), torch.full((4, 1), 3.5), spec)
    layer = SimulatedKernel(LayerRecipe(weight=weight, act=IN_BFLOAT16["W8A8"][0]), weight.dequantize())
    assert layer(torch.randn(3, 96), None).isfinite().all() and not accelerator


def test_gradients_and_float64_stay_where_they_were(accelerator):
    layer = kernel(*IN_BFLOAT16["W8A8"])
    x = torch.randn(3, 1152)
    assert layer(x.double(), None).dtype == torch.float64 and not accelerator
    layer(x.requires_grad_(), None).sum().backward()
    assert x.grad is not None and not accelerator


def test_one_token_and_empty_batches_keep_their_shape(accelerator):
    layer = kernel(*IN_BFLOAT16["W8A8"])
    assert layer(torch.randn(1152), None).shape == (24,)
    assert layer(torch.randn(1, 1, 1152), None).shape == (1, 1, 24)


def test_the_cpu_multiplies_in_float32():
    assert not exact_sums.available(CPU)
    layer = kernel(*IN_BFLOAT16["W8A8"])
    layer(torch.randn(3, 1152), None)
    assert layer._whole is None and layer._unpacked.dtype == torch.float32


@pytest.mark.parametrize(
    ("multiply", "exact"),
    [
        (lambda x, w: x.float() @ w.float(), True),
        (lambda x, w: (x @ w).float(), False),  # bfloat16 comes out
        (lambda x, w: sum(((a @ b).float() for a, b in zip(x.split(64, 1), w.split(64), strict=True))), False),
        (exact_sums.multiply, False),  # the CPU has no such operator
    ],
    ids=["float32 sums", "bfloat16 sums", "bfloat16 parts", "none"],
)
def test_a_device_is_believed_only_when_its_sums_are_exact(multiply, exact, monkeypatch):
    monkeypatch.setattr(exact_sums, "multiply", multiply)
    assert exact_sums.sums_exactly(CPU) == exact


def test_parts_of_sums_are_not_rounded_to_bfloat16_meanwhile(monkeypatch):
    matmul, seen = torch.backends.cuda.matmul, []

    def multiply(x_TC: Tensor, weight_CO: Tensor) -> Tensor:
        seen.append(matmul.allow_bf16_reduced_precision_reduction)
        return on_tensor_cores(x_TC, weight_CO)

    monkeypatch.setattr(exact_sums, "multiply", multiply)
    before = matmul.allow_bf16_reduced_precision_reduction
    WholeWeight(torch.ones(2, 64).bfloat16(), 64).product(torch.ones(3, 64), slice(None))
    assert seen == [False] and matmul.allow_bf16_reduced_precision_reduction == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", IN_BFLOAT16)
def test_a_gpu_gives_the_cpus_bits(case):
    x = 3 * torch.randn(64, 1152, generator=torch.Generator().manual_seed(1))
    layer, step = kernel(*IN_BFLOAT16[case]), torch.tensor(0)
    exact = layer(x, step)
    assert exact_sums.available(torch.device("cuda", torch.cuda.current_device()))
    assert torch.equal(layer.to("cuda")(x.to("cuda"), step.to("cuda")).cpu(), exact)


@pytest.mark.parametrize("of_weight, of_act", [(8, 24), (24, 8), (16, 24), (8, None), (None, 8)])
def test_groups_of_different_sizes_on_the_two_sides_each_have_their_own_scales(of_weight, of_act):
    random = torch.Generator().manual_seed(2)
    x_TC = torch.randn(5, 48, generator=random) * torch.logspace(-2, 1, 48)
    weight_OC = torch.randn(7, 48, generator=random) * torch.logspace(1, -2, 48)
    weight_spec = QuantSpec(4, "per_group", group_size=of_weight) if of_weight else QuantSpec(4, "per_channel")
    dynamic = {"symmetric": False, "dynamic": True}
    act_spec = (
        QuantSpec(4, "per_group", group_size=of_act, **dynamic) if of_act else QuantSpec(4, "per_token", **dynamic)
    )
    weight, act = quantize_weight(weight_OC, weight_spec), ActQuant(act_spec)
    kernel = SimulatedKernel(LayerRecipe(weight=weight, act=act), weight_OC)
    expected = fake_quantize_activation(x_TC, act) @ weight.dequantize().T
    torch.testing.assert_close(kernel(x_TC, None), expected, rtol=1e-5, atol=1e-5)
