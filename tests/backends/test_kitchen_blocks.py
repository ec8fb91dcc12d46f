"""comfy-kitchen's block-scaled products without a device: what they are handed is read back by comfy-kitchen's own functions.

Marked gpu, the real products on a device that has them.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if not hasattr(F, "scaled_mm"):
    pytest.skip("this torch has no scaled_mm", allow_module_level=True)

from ditbench.harness.backends import kitchen_blocks, simulate  # noqa: E402
from ditbench.harness.backends.base import choose  # noqa: E402
from ditbench.harness.common.errors import UserError  # noqa: E402
from ditbench.harness.fitting.conformance import relative_error  # noqa: E402
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight  # noqa: E402
from ditbench.harness.quant.recipe import LayerRecipe  # noqa: E402
from ditbench.harness.quant.spec import bits_of  # noqa: E402

FORMATS = ("nvfp4", "mxfp8")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def recipe_of(normal, label: str, outputs: int = 144, channels: int = 192) -> LayerRecipe:
    bits = bits_of(label)
    weight_OC = normal(outputs, channels, seed=1).float() * normal(outputs, 1, seed=2).exp().float()
    return LayerRecipe(weight=quantize_weight(weight_OC, bits.weight), act=ActQuant(bits.act))


@pytest.fixture
def handed(monkeypatch):
    """Its products, as multiplications of what its own functions read in the operands: rows filled up to 16s, scales to 128s. What its
    CUDA product asserts of them is asserted."""
    kitchen = pytest.importorskip("comfy_kitchen", reason="pip install comfy-kitchen")
    seen = []

    def checked(a, b, scale_a, scale_b, size):
        for operand, scales in ((a, scale_a), (b, scale_b)):
            rows, blocks = len(operand), operand.shape[1] * (2 if size == 16 else 1) // size
            assert scales.shape == (-(-rows // 128) * 128, -(-blocks // 4) * 4)
        assert a.shape[0] % 16 == 0 and b.shape[0] % 8 == 0 and a.shape[1] % 16 == 0
        seen.append(a)

    def nvfp4(a, b, tensor_a, tensor_b, scale_a, scale_b, out_dtype):
        assert a.dtype == b.dtype == torch.uint8 and out_dtype == torch.bfloat16
        assert tensor_a.dtype == tensor_b.dtype == torch.float32
        checked(a, b, scale_a, scale_b, 16)
        rows = [
            kitchen.dequantize_nvfp4(each, scale, blocks, torch.float32, hi_first=False)
            for each, scale, blocks in ((a, tensor_a, scale_a), (b, tensor_b, scale_b))
        ]
        return (rows[0].double() @ rows[1].double().T).to(out_dtype)

    def mxfp8(a, b, scale_a, scale_b, out_dtype):
        assert a.dtype == b.dtype == torch.float8_e4m3fn and scale_a.dtype == torch.float8_e8m0fnu
        checked(a, b, scale_a, scale_b, 32)
        rows = [kitchen.dequantize_mxfp8(*each, torch.float32) for each in ((a, scale_a), (b, scale_b))]
        return (rows[0].double() @ rows[1].double().T).to(out_dtype)

    monkeypatch.setattr(kitchen_blocks, "_products", lambda: (nvfp4, mxfp8))
    return seen


@pytest.mark.parametrize("label", FORMATS)
@pytest.mark.parametrize("shape", [(2, 5), (1, 16), (3, 50)], ids=str)
def test_what_its_products_are_handed_is_what_simulate_multiplies(label, shape, handed, normal):
    recipe = recipe_of(normal, label)
    x = normal(*shape, 192).float() * normal(*shape, 1, seed=1).exp().float()
    x[0, 0] = 0
    found, expected = (each.make_kernel(recipe, torch.empty(0))(x, None) for each in (kitchen_blocks, simulate))
    assert found.shape == expected.shape and found.dtype == torch.float32 and len(handed) == 1
    assert relative_error(found, expected.double()) < (2**-8 if label == "nvfp4" else 1e-6)


@pytest.mark.parametrize("label", FORMATS)
def test_its_own_checks_take_what_it_is_handed(label, monkeypatch, normal):
    """On the CPU it is torch's product that is missing: comfy-kitchen looks at the operands and gets that far."""
    pytest.importorskip("comfy_kitchen", reason="pip install comfy-kitchen")
    asked = []

    def scaled_mm(a: Tensor, b: Tensor, *, output_dtype, **rest) -> Tensor:
        asked.append((a.dtype, rest["scale_recipe_a"], rest["swizzle_b"]))
        return torch.zeros(len(a), b.shape[1], dtype=output_dtype)

    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    kernel = kitchen_blocks.make_kernel(recipe_of(normal, label), torch.empty(0))
    assert kernel(normal(2, 5, 192).float(), None).shape == (2, 5, 144)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("fp8_block", "kitchen_blocks knows NVFP4, MXFP8 in their usual blocks"),
        ("mxfp4", "kitchen_blocks knows NVFP4, MXFP8"),
        ("wnvfp4_amxfp8", "kitchen_blocks takes both sides in one format in blocks; these are NVFP4 and MXFP8"),
        ("nvfp4", "kitchen_blocks runs on CUDA devices, the device is cpu"),
    ],
)
def test_what_it_does_not_run_it_refuses_in_a_line(normal, label, words):
    with pytest.raises(UserError, match=words):
        choose(recipe_of(normal, label), CPU, "kitchen_blocks")


def test_it_is_for_chips_that_have_the_product_and_never_chosen_by_itself(normal, monkeypatch):
    monkeypatch.setattr(kitchen_blocks, "lacks", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    recipe = recipe_of(normal, "nvfp4")
    assert "kitchen_blocks runs NVFP4 on compute capability 10.0 or newer" in kitchen_blocks.unsupported(recipe, CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert kitchen_blocks.unsupported(recipe, CUDA) is None and choose(recipe, CUDA).NAME == "cuda_blocks"


def test_where_it_is_not_installed_that_is_said(normal, monkeypatch):
    monkeypatch.setattr("ditbench.harness.backends.others.find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    kitchen_blocks.lacks.cache_clear()
    assert "which is not installed: pip install comfy-kitchen" in kitchen_blocks.unsupported(
        recipe_of(normal, "mxfp8"), CUDA
    )
    kitchen_blocks.lacks.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("label", FORMATS)
def test_on_a_device_its_product_is_what_simulate_gives(label, normal):
    recipe = recipe_of(normal, label)
    if not torch.cuda.is_available() or (reason := kitchen_blocks.unsupported(recipe, CUDA)) is not None:
        pytest.skip("needs a CUDA device that has this product" if not torch.cuda.is_available() else reason)
    x = normal(3, 50, 192).float().to(CUDA)
    found, expected = (
        each.make_kernel(recipe, torch.empty(0)).to(CUDA)(x, None) for each in (kitchen_blocks, simulate)
    )
    assert relative_error(found, expected.double()) < 2**-8
