"""Block-scaled products without a device: what `scaled_mm` is handed is read back by its documented layout, and multiplied in float64.

Marked gpu, the real product on a device that has it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if not hasattr(F, "scaled_mm"):
    pytest.skip("this torch has no scaled_mm", allow_module_level=True)

from ditbench.harness.backends import cuda_blocks, simulate  # noqa: E402
from ditbench.harness.backends.base import choose  # noqa: E402
from ditbench.harness.backends.block_layouts import of_square_blocks, rows_first, swizzled  # noqa: E402
from ditbench.harness.fitting.conformance import relative_error  # noqa: E402
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight  # noqa: E402
from ditbench.harness.quant.recipe import LayerRecipe  # noqa: E402
from ditbench.harness.quant.spec import bits_of  # noqa: E402

FORMATS = ("nvfp4", "mxfp8", "fp8_block")
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
CUDA = torch.device("cuda")


def recipe_of(label: str, outputs: int, channels: int) -> LayerRecipe:
    random = torch.Generator().manual_seed(outputs)
    weight_OC = torch.randn(outputs, channels, generator=random) * torch.randn(outputs, 1, generator=random).exp()
    weight_OC[:, :16] = 0
    bits = bits_of(label)
    return LayerRecipe(weight=quantize_weight(weight_OC, bits.weight), act=ActQuant(bits.act))


def at(scales: Tensor, row: int, block: int, blocks: int) -> float:
    """One scale of a row by cuBLAS's formula for its place."""
    tile = (row // 128) * -(-blocks // 4) + block // 4
    return float(scales[512 * tile + (row % 32) * 16 + (row % 128) // 32 * 4 + block % 4].float())


def read_back(codes: Tensor, scales: Tensor, recipe: F.ScalingType) -> Tensor:
    """(R, C) float64 of one operand as `scaled_mm` is handed it."""
    if codes.dtype == torch.float4_e2m1fn_x2:
        halves = codes.view(torch.uint8)
        values = torch.tensor(E2M1)[torch.stack([halves & 15, halves >> 4], -1).flatten(1).long()]
    else:
        values = codes.float()
    rows, width = values.shape
    size = {"BlockWise1x16": 16, "BlockWise1x32": 32}.get(recipe.name, 128)
    blocks = width // size
    if recipe.name == "BlockWise1x128":
        assert scales.shape == (rows, blocks) and scales.stride(0) == 1
        assert scales.stride(1) == rows or (blocks == 1 and scales.stride(1) == 1)  # as torch asks
        wide = scales
    elif recipe.name == "BlockWise128x128":
        filled = -(-blocks // 4) * 4
        assert scales.shape == (filled, -(-rows // 128)) and scales.stride() == (1, filled)
        wide = scales.t()[:, :blocks].repeat_interleave(128, 0)[:rows]
    else:
        assert scales.is_contiguous() and scales.numel() == -(-rows // 128) * 128 * -(-blocks // 4) * 4
        wide = torch.tensor([[at(scales, row, block, blocks) for block in range(blocks)] for row in range(rows)])
    return values.double() * wide.double().repeat_interleave(size, 1)


@pytest.fixture
def handed(monkeypatch):
    """`F.scaled_mm` by the documented layouts, in float64; what it was handed."""
    seen = []

    def scaled_mm(a, b, scale_a, recipe_a, scale_b, recipe_b, *, swizzle_a, swizzle_b, output_dtype):
        usual = "NO_SWIZZLE" if scale_a.dtype == torch.float32 else "SWIZZLE_32_4_4"
        assert swizzle_a.name == swizzle_b.name == usual and output_dtype == torch.float32
        assert a.is_contiguous() and b.t().is_contiguous() and a.shape[0] % 16 == 0
        assert {a.dtype, b.dtype} in ({torch.float8_e4m3fn}, {torch.float4_e2m1fn_x2})
        seen.append((a, b))
        rows = read_back(a, scale_a, recipe_a), read_back(b.t(), scale_b, recipe_b)
        return (rows[0] @ rows[1].T).float()

    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    return seen


@pytest.mark.parametrize("shape", [(2, 5), (1, 16), (3, 50)], ids=str)
@pytest.mark.parametrize(("outputs", "channels"), [(128, 128), (256, 384), (384, 640)])
@pytest.mark.parametrize("label", FORMATS)
def test_what_the_product_is_handed_is_what_simulate_multiplies(label, outputs, channels, shape, handed, normal):
    recipe = recipe_of(label, outputs, channels)
    x = normal(*shape, channels).float() * normal(*shape, 1, seed=1).exp().float()
    x[0, 0] = 0
    kernel = cuda_blocks.make_kernel(recipe, torch.empty(0))
    expected = simulate.make_kernel(recipe, torch.empty(0))(x, None)
    found = kernel(x, None)
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert relative_error(found, expected.double()) < 1e-6
    assert (
        relative_error(kernel(x.bfloat16(), None), simulate.make_kernel(recipe, torch.empty(0))(x.bfloat16(), None))
        < 1e-6
    )
    assert len(handed) == 2


@pytest.mark.parametrize("label", FORMATS)
def test_torchs_own_shape_function_takes_what_it_is_handed(label, monkeypatch, normal):
    """On tensors without values: it checks dtypes, widths and what kind of scales go together."""
    real, shapes = F.scaled_mm, []

    def without_values(*given, **settings):
        empty = [
            torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device="meta")
            if isinstance(each, Tensor)
            else each
            for each in given
        ]
        found = real(*empty, **settings)
        shapes.append((tuple(found.shape), found.dtype))
        return torch.zeros(found.shape, dtype=found.dtype)

    monkeypatch.setattr(F, "scaled_mm", without_values)
    kernel = cuda_blocks.make_kernel(recipe_of(label, 256, 384), torch.empty(0))
    assert kernel(normal(2, 5, 384).float(), None).shape == (2, 5, 256)
    assert shapes == [((16, 256), torch.float32)]


@pytest.mark.parametrize("label", FORMATS)
def test_it_stores_what_the_record_counts(label):
    recipe = recipe_of(label, 128, 256)
    kernels = [backend.make_kernel(recipe, torch.empty(0)) for backend in (cuda_blocks, simulate)]
    sizes = [sum(each.numel() * each.itemsize for each in kernel.state_dict().values()) for kernel in kernels]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (130, 5), (128, 4), (257, 9)])
def test_a_swizzle_puts_each_scale_in_its_place_and_zeros_elsewhere(rows, blocks):
    scales = torch.randint(1, 120, (rows, blocks)).to(torch.uint8).view(torch.float8_e4m3fn)
    laid_out = swizzled(scales)
    assert laid_out.dtype == scales.dtype
    places = [[at(laid_out, row, block, blocks) for block in range(blocks)] for row in range(rows)]
    assert torch.equal(torch.tensor(places), scales.float())
    assert int((laid_out.view(torch.uint8) != 0).sum()) == rows * blocks


def test_a_swizzle_is_that_of_other_libraries():
    blocked = pytest.importorskip("torchao.prototype.mx_formats.utils", exc_type=ImportError).to_blocked
    scales = torch.randint(1, 120, (200, 7)).to(torch.uint8)
    assert torch.equal(swizzled(scales), blocked(scales).flatten())


def test_scales_of_hoppers_products_have_the_strides_that_it_asks_for():
    of_rows, of_weights = rows_first(torch.rand(6, 3)), of_square_blocks(torch.rand(5, 3))
    assert (of_rows.shape, of_rows.stride()) == ((6, 3), (1, 6))
    assert (of_weights.shape, of_weights.stride()) == ((4, 5), (1, 4)) and not of_weights[3].any()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (recipe_of("mxfp4", 128, 128), "knows NVFP4, MXFP8, FP8_BLOCK"),
        (recipe_of("int4_g64", 128, 128), "knows NVFP4"),
        (recipe_of("fp8", 128, 128), "both sides in one format in blocks; these are FP8 and FP8"),
        (recipe_of("wnvfp4_amxfp8", 128, 128), "these are NVFP4 and MXFP8"),
        (recipe_of("wnvfp4_a8", 128, 128), "these are NVFP4 and 8"),
        (recipe_of("nvfp4", 128, 48), "NVFP4 of 32s to 16s channels, this layer is 48 → 128"),
        (recipe_of("mxfp8", 40, 64), "this layer is 64 → 40"),
        (recipe_of("fp8_block", 96, 128), "FP8_BLOCK of 128s to 128s"),
        (replace(recipe_of("nvfp4", 128, 128), act=None), "weights and activations in blocks"),
        (recipe_of("nvfp4", 128, 128), "runs on CUDA devices, the device is cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_does_not_run_it_refuses_with_the_reason(recipe, words):
    assert words in cuda_blocks.unsupported(recipe, torch.device("cpu"))


@pytest.mark.parametrize(
    ("label", "capability", "runs"),
    [
        ("nvfp4", (10, 0), True),
        ("nvfp4", (12, 0), True),
        ("nvfp4", (9, 0), False),
        ("mxfp8", (10, 3), True),
        ("mxfp8", (8, 9), False),
        ("fp8_block", (9, 0), True),
        ("fp8_block", (10, 0), False),
        ("fp8_block", (8, 9), False),
    ],
)
def test_a_format_is_for_the_chips_that_have_its_product(label, capability, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    recipe = recipe_of(label, 128, 128)
    reason = cuda_blocks.unsupported(recipe, CUDA)
    assert (reason is None) == runs and (runs or f"this device has {capability[0]}.x" in reason)
    assert ("cuda_blocks" if runs else "simulate") == choose(recipe, CUDA).NAME


def test_an_integer_model_of_float64_is_refused():
    with pytest.raises(TypeError, match="computes in float32"):
        cuda_blocks.make_kernel(recipe_of("nvfp4", 128, 128), torch.empty(0))(torch.zeros(2, 128).double(), None)


@pytest.mark.gpu
@pytest.mark.parametrize("label", FORMATS)
def test_on_a_device_the_product_is_what_simulate_gives(label, normal):
    recipe = recipe_of(label, 256, 384)
    if not torch.cuda.is_available() or (reason := cuda_blocks.unsupported(recipe, CUDA)) is not None:
        pytest.skip("needs a CUDA device that has this product" if not torch.cuda.is_available() else reason)
    x = normal(3, 50, 384).float().to(CUDA)
    found, expected = (
        backend.make_kernel(recipe, torch.empty(0)).to(CUDA)(x, None) for backend in (cuda_blocks, simulate)
    )
    assert relative_error(found, expected.double()) < 1e-5
