"""gemlite without a device: it is imported with stand-ins for what it asks of one, its own code packs our codes, and what its kernels
would be handed is multiplied by the algebra that they have. Marked gpu, the kernels themselves.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ditbench.harness.backends import gemlite_kernels, simulate
from ditbench.harness.backends.base import choose
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.conformance import relative_error
from ditbench.harness.measurement.latency import resident_bytes
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.spec import QuantSpec, bits_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WEIGHT, ACT = QuantSpec(8, "per_channel", True), QuantSpec(8, "per_token", True, True)
IN_GROUPS = QuantSpec(4, "per_group", True, group_size=32)
OF_FOUR = (
    IN_GROUPS,
    QuantSpec(4, "per_group", False, group_size=64),
    QuantSpec(4, "per_channel", True),
    QuantSpec(4, "per_channel", False),
)
four_bits = pytest.mark.parametrize("spec", OF_FOUR, ids=lambda spec: f"{spec.granularity} {spec.symmetric}")


def recipe_of(normal, weight=WEIGHT, act=ACT, width: int = 128, outputs: int = 48, clip: float = 1.0) -> LayerRecipe:
    its_act = None if act is None else ActQuant(act, clip=clip)
    return LayerRecipe(weight=quantize_weight(normal(outputs, width, seed=1).float() + 0.2, weight), act=its_act)


@pytest.fixture(scope="module")
def gemlite():
    """gemlite.core, imported where no device is: what it asks of one is answered for it. Its kernels cannot run."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            triton = pytest.importorskip("triton", reason="gemlite needs triton")
            from triton.backends.compiler import GPUTarget

            driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
            patch.setattr(triton.runtime.driver, "_active", driver)
            patch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
            its_properties = SimpleNamespace(name="none", multi_processor_count=1)
            patch.setattr(torch.cuda, "get_device_properties", lambda *device: its_properties)
        try:
            from gemlite import core
        except ModuleNotFoundError:
            pytest.skip("pip install gemlite")
    return core


def unpacked(tensors: list[Tensor], settings: list[int]) -> Tensor:
    """Its codes (C, O), as its kernels read them: those of a word from the lowest bits up, along the channels."""
    bits, mask, of_a_word = settings[1], settings[3], settings[4]
    if of_a_word == 1:
        return tensors[0]
    words = [(tensors[0].to(torch.int64) >> (bits * place)) & mask for place in range(of_a_word)]
    return torch.stack(words, 1).flatten(0, 1)


def by_its_algebra(core, x: Tensor, tensors: list[Tensor], settings: list[int]) -> Tensor:
    """What `forward_functional` is to give, as its kernels are written (quant_utils.py, triton_kernels/gemm_kernels.py, utils.py)."""
    scaled, bits, size, _, _, reads, gives, _, _, channel_mode, group_mode, _ = settings
    dtypes = {core.DType.INT8.value: torch.int8, core.DType.BF16.value: torch.bfloat16, core.DType.FP32.value: None}
    scale_x = None
    if scaled:
        scale_x = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-6)
        x = ((x / scale_x).abs() + 0.5).floor() * x.sign()
    _, scales, zeros, _ = tensors
    weight = unpacked(tensors, settings)
    of_group = (lambda each: each.repeat_interleave(size, 0)) if channel_mode == 0 else (lambda each: each)
    if group_mode == 1:
        weight = weight.float() - zeros
    elif group_mode == 3:
        weight = (weight.float() - (zeros if zeros.ndim == 0 else of_group(zeros))) * of_group(scales)
    else:
        assert group_mode == 0
    product = x.flatten(0, -2).double() @ weight.to(dtypes[reads]).double()
    assert channel_mode in (0, 1, 3)
    product = product * (scales if channel_mode else 1.0) * (scale_x.reshape(-1, 1) if channel_mode == 3 else 1.0)
    return product.reshape(*x.shape[:-1], -1).to(dtypes[gives] or torch.float32)


@pytest.fixture
def handed(gemlite, monkeypatch):
    """Its kernels by their algebra."""
    monkeypatch.setattr(
        gemlite, "forward_functional", lambda x, _, tensors, settings: by_its_algebra(gemlite, x, tensors, settings)
    )


def both(recipe: LayerRecipe, x: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(each.make_kernel(recipe, torch.empty(0))(x, None) for each in (gemlite_kernels, simulate))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, width, outputs", [(1, 32, 7), (33, 96, 40)])
def test_w8a8_is_simulated_execution_but_for_the_order_of_its_scales(handed, normal, tokens, width, outputs, dtype):
    theirs, ours = both(recipe_of(normal, width=width, outputs=outputs), normal(2, tokens, width, seed=2).to(dtype))
    assert theirs.shape == ours.shape and theirs.dtype == torch.float32
    assert (theirs - ours).abs().max() <= 1e-6 * ours.abs().max()


@four_bits
def test_w4a16_is_simulated_execution_in_sixteen_bits(handed, normal, spec):
    theirs, ours = both(recipe_of(normal, spec, None), normal(2, 9, 128, seed=2).bfloat16())
    assert theirs.shape == ours.shape and theirs.dtype == torch.bfloat16
    assert relative_error(theirs, ours.double()) < 2**-8


@four_bits
def test_its_words_hold_our_codes_and_no_others(gemlite, normal, spec):
    recipe = recipe_of(normal, spec, None)
    kernel = gemlite_kernels.make_kernel(recipe, torch.empty(0))
    found = unpacked([kernel.packed], kernel.settings).t()
    assert torch.equal(found - (8 if spec.symmetric else 0), recipe.weight.codes_OC.long())
    assert torch.equal(kernel.scales_GO.t(), recipe.weight.scale_OG)
    expected = torch.tensor(8) if spec.symmetric else recipe.weight.zero_point_OG.t()
    assert torch.equal(kernel.zeros.float(), expected.float())


@pytest.mark.parametrize(
    ("weight", "act", "size"), [(WEIGHT, ACT, 48 * (128 + 4)), (IN_GROUPS, None, 48 * (128 // 2 + 4 * 4) + 4)]
)
def test_codes_and_scales_are_what_is_held_and_move_with_it(handed, normal, weight, act, size):
    kernel = gemlite_kernels.make_kernel(recipe_of(normal, weight, act), torch.empty(0))
    assert resident_bytes(kernel) == size + 4  # and a scale of NVFP4's that other formats have, too
    other, x = copy.deepcopy(kernel), normal(3, 128).float()
    other.load_state_dict(kernel.state_dict())
    assert torch.equal(other(x, None), kernel(x, None))


@pytest.mark.parametrize(("weight", "act"), [(WEIGHT, ACT), (IN_GROUPS, None)])
def test_its_own_shape_function_gives_what_we_promise(gemlite, normal, weight, act):
    kernel = gemlite_kernels.make_kernel(recipe_of(normal, weight, act), torch.empty(0)).to("meta")
    for dtype in (torch.float32, torch.bfloat16):
        found = kernel(torch.empty(2, 5, 128, dtype=dtype, device="meta"), None)
        assert found.shape == (2, 5, 48) and found.dtype == (dtype if act is None else torch.float32)


@pytest.mark.parametrize(("weight", "act"), [(WEIGHT, ACT), (IN_GROUPS, None)])
def test_it_is_never_chosen_by_itself(normal, weight, act):
    assert choose(recipe_of(normal, weight, act), CPU).NAME != gemlite_kernels.NAME


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight": QuantSpec(4, "per_channel", True)}, "gemlite takes W8A8, symmetric, weights per channel"),
        ({"act": QuantSpec(8, "per_tensor", True, True)}, "gemlite takes W8A8"),
        ({"clip": 0.9}, "gemlite quantizes tokens by their largest value; this layer keeps 0.9 of it"),
        ({"width": 48}, "gemlite takes input channels in multiples of 32, these are 48"),
        ({"weight": WEIGHT, "act": None}, "gemlite takes W4A16, weights per group or channel"),
        (
            {"weight": QuantSpec(4, "per_tensor", True), "act": None},
            "gemlite takes W4A16, weights per group or channel",
        ),
        ({"weight": QuantSpec(4, "per_group", True, group_size=16), "act": None}, "groups of 32, 64, 128, … channels"),
        ({"weight": QuantSpec(4, "per_group", True, group_size=96), "act": None, "width": 192}, "these have 96"),
        ({"weight": bits_of("nvfp4").weight, "act": None}, "gemlite takes integers; these codes are e2m1"),
        ({}, "gemlite runs on CUDA devices, the device is cpu"),
        ({"weight": IN_GROUPS, "act": None}, "gemlite runs on CUDA devices, the device is cpu"),
    ],
)
def test_what_it_does_not_run_it_refuses_in_a_line(normal, settings, words):
    with pytest.raises(UserError, match=words) as refused:
        choose(recipe_of(normal, **settings), CPU, "gemlite")
    assert len(str(refused.value).splitlines()) == 1


def test_where_it_is_not_installed_that_is_said(normal, monkeypatch):
    monkeypatch.setattr("ditbench.harness.backends.others.find_spec", lambda name: None)
    gemlite_kernels.lacks.cache_clear()
    assert "gemlite needs gemlite, which is not installed: pip install gemlite" in gemlite_kernels.unsupported(
        recipe_of(normal), CUDA
    )
    gemlite_kernels.lacks.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize(("weight", "act"), [(WEIGHT, ACT), *((spec, None) for spec in OF_FOUR)])
@pytest.mark.parametrize("tokens", [1, 3, 20, 300])
def test_on_a_device_its_kernels_are_simulated_execution(normal, weight, act, tokens):
    recipe = recipe_of(normal, weight, act)
    if not torch.cuda.is_available() or (reason := gemlite_kernels.unsupported(recipe, CUDA)) is not None:
        pytest.skip("needs a CUDA device" if not torch.cuda.is_available() else reason)
    x = normal(tokens, 128, seed=2).bfloat16().to(CUDA)
    theirs, ours = (each.make_kernel(recipe, torch.empty(0)).to(CUDA)(x, None) for each in (gemlite_kernels, simulate))
    assert relative_error(theirs, ours.double()) < (2**-8 if act is None else 1e-3)
