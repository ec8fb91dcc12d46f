"""FP8 against the simulated path: on a device of capability 8.9 where there is one, else rows in Triton's interpreter and
torch's product on the CPU."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

ON_DEVICE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
DEVICE = torch.device("cuda" if ON_DEVICE else "cpu")
pytest.importorskip("triton", reason="the rows are rounded by a Triton kernel")
if not ON_DEVICE and os.environ.get("TRITON_INTERPRET") != "1":  # tests/conftest.py asks for it where there is no GPU
    pytest.skip("this GPU has no FP8", allow_module_level=True)

from ditbench.harness.backends import cuda_fp8, cuda_int8, cuda_lookup, cuda_w4a16, simulate, weight_only  # noqa: E402
from ditbench.harness.backends.base import choose, known_backends  # noqa: E402
from ditbench.harness.backends.triton_kernels import launch  # noqa: E402
from ditbench.harness.build.layer import QuantLinear  # noqa: E402
from ditbench.harness.common.paths import CONF  # noqa: E402
from ditbench.harness.measurement.latency import resident_bytes  # noqa: E402
from ditbench.harness.quant import tlq  # noqa: E402
from ditbench.harness.quant.effective import EffectiveLinear  # noqa: E402
from ditbench.harness.quant.quantizers import (  # noqa: E402
    ActQuant,
    activation_affine,
    quantize_weight,
    static_quant,
    to_codes,
)
from ditbench.harness.quant.recipe import LayerRecipe, LowRank  # noqa: E402
from ditbench.harness.quant.spec import QuantSpec  # noqa: E402
from ditbench.harness.quant.steps import StepClock, StepTable  # noqa: E402
from ditbench.harness.quant.transforms import Transform  # noqa: E402

pytestmark = pytest.mark.gpu if ON_DEVICE else []
# A device keeps fewer digits while it sums; on the CPU the product computes what the simulation computes.
ERROR = 1e-3 if ON_DEVICE else 1e-6
WEIGHT = QuantSpec(8, "per_channel", number="e4m3")
TOKEN = QuantSpec(8, "per_token", dynamic=True, number="e4m3")
NOTHING = torch.empty(0)
CUDA = torch.device("cuda")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(outputs: int, width: int, spec: QuantSpec = WEIGHT, seed: int = 1):
    return quantize_weight(normal(outputs, width, seed=seed), spec)


def recipe_of(outputs: int, width: int, **more) -> LayerRecipe:
    return LayerRecipe(**({"weight": weight(outputs, width), "act": ActQuant(TOKEN)} | more))


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.cpu().double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("clip", [1.0, 0.4])
def test_codes_of_the_rows_are_those_of_the_quantizer(clip):
    """Subnormals, values at ties and beyond the ends among them."""
    x = normal(13, 64) * torch.logspace(-6, 1, 64)
    x[3] = 0
    x[5, 7] = torch.nan
    x[7] = torch.linspace(-448, 448, 64).round()
    quant = ActQuant(TOKEN, clip=clip)
    scale, _ = activation_affine(x, quant, None)
    found = launch.quantize_rows(x.to(DEVICE), *[None] * 3, [], None, None, clip, -448, 448, True, False)
    codes_MC, scale_M, _, _ = (tensor.cpu() for tensor in found)
    finite = torch.arange(13) != 5
    assert codes_MC.dtype == torch.float8_e4m3fn and scale_M[5].isnan()
    torch.testing.assert_close(scale_M[finite], scale[finite, 0], rtol=1e-6, atol=0)
    codes, expected = codes_MC.float()[finite], to_codes(x, scale, None, TOKEN)[finite]
    off = (codes != expected).float().mean()
    assert off < 0.01 if ON_DEVICE else off == 0  # there a scale may differ in its last bit, and so a tie
    assert ((codes != 0) & (codes.abs() < 2**-6)).any() and (codes.abs() == 448).sum() > 12 / clip


@pytest.mark.usefixtures("e4m3_rows")
@pytest.mark.parametrize(("outputs", "width"), [(48, 64), (16, 16), (144, 256)])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_a_layer_computes_what_its_simulation_computes(outputs, width, rows):
    recipe = recipe_of(outputs, width)
    x = (normal(rows, width) * normal(rows, 1, seed=3).exp()).index_fill(1, torch.tensor([5]), 100.0)
    kernel, simulated = (backend.make_kernel(recipe, NOTHING) for backend in (cuda_fp8, simulate))
    y, expected = kernel.to(DEVICE)(x.to(DEVICE), None), simulated(x, None)
    assert y.shape == expected.shape and y.dtype == torch.float32
    half, expected_half = kernel.layer(x.bfloat16().to(DEVICE), None, None, None, None), simulated(x.bfloat16(), None)
    assert half.shape == expected.shape and half.dtype == torch.bfloat16
    if rows:
        assert relative_error(y, expected) < ERROR
        assert relative_error(half, expected_half.bfloat16()) < (2**-8 if ON_DEVICE else 2**-10)


@pytest.mark.usefixtures("e4m3_rows")
@pytest.mark.parametrize("branch", [True, False], ids=["branch", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_ends_as_the_layer_in_pieces_does(branch, dtype):
    """Balanced, static by step; branch and bias as large as the output. In bf16 sums are rounded before a branch is added."""
    groups = torch.tensor([0, 1])
    ranges = StepTable(torch.tensor([-3.0, -9.0]), groups), StepTable(torch.tensor([3.0, 2.0]), groups)
    recipe = recipe_of(
        32,
        96,
        transform=Transform(scale_C=normal(96, seed=4).exp()),  # a rotation moves codes that lie near a tie
        act=static_quant(*ranges, QuantSpec(8, "per_tensor", number="e4m3")),
        low_rank=LowRank(normal(5, 96, seed=6), normal(32, 5, seed=7)) if branch else None,
    )
    bias = StepTable(10 * normal(2, 32, seed=8), groups)
    clock = StepClock(2)
    clock.set(1, 2)
    effective = EffectiveLinear(recipe.weight.dequantize(), bias)
    shared = {"folded": False, "clock": clock, "dtype": dtype, "device": torch.device("cpu"), "backend": "simulate"}
    pieces, fused = (QuantLinear(recipe, effective, **shared) for _ in range(2))
    fused.kernel = cuda_fp8.make_kernel(recipe, NOTHING)
    x = normal(2, 7, 96).to(dtype)
    expected = pieces(x)
    clock.to(DEVICE)
    y = fused.to(DEVICE)(x.to(DEVICE))
    assert y.dtype == dtype and y.shape == expected.shape
    assert relative_error(y, expected) < (ERROR if dtype == torch.float32 else 2**-7)  # the interpreter cuts x' to bf16
    if dtype == torch.bfloat16 and not branch and not ON_DEVICE:
        assert relative_error(y, expected) < 2**-11  # rounded once, as in pieces


def test_ranges_of_a_whole_sample_reach_its_rows():
    recipe = recipe_of(16, 32, act=ActQuant(replace(TOKEN, granularity="per_tensor")))
    x = normal(3, 5, 32) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    kernel, simulated = (backend.make_kernel(recipe, NOTHING) for backend in (cuda_fp8, simulate))
    y, expected = kernel.to(DEVICE)(x.to(DEVICE), None), simulated(x, None)
    assert all(relative_error(y[sample], expected[sample]) < ERROR for sample in range(3))


def test_codes_are_held_once_and_survive_copies_pickles_and_state_dicts():
    recipe, x = recipe_of(48, 64), normal(5, 64).to(DEVICE)
    kernel = cuda_fp8.make_kernel(recipe, NOTHING).to(DEVICE)
    assert resident_bytes(kernel) == 48 * 64 + 48 * 4 + 4  # and the scale 1 of float32 products
    reloaded = cuda_fp8.make_kernel(recipe_of(48, 64, weight=weight(48, 64, seed=9)), NOTHING).to(DEVICE)
    assert not torch.equal(reloaded(x, None), kernel(x, None))
    reloaded.load_state_dict(kernel.state_dict())
    for again in (reloaded, copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        assert torch.equal(again.stored.cpu(), recipe.weight.codes_OC.view(torch.uint8))
        assert torch.equal(again(x, None), kernel(x, None))


@pytest.mark.usefixtures("e4m3_rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_layer_is_one_graph(dtype):
    kernel = cuda_fp8.make_kernel(recipe_of(16, 32), NOTHING).to(DEVICE)
    x, bias = normal(3, 32).to(DEVICE, dtype), StepTable.constant(normal(16).to(dtype)).to(DEVICE)

    def layer(x: Tensor) -> Tensor:
        return torch.relu(kernel.layer(x, None, None, None, bias))

    compiled = torch.compile(layer, backend="inductor" if ON_DEVICE else "aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (recipe_of(24, 32), "multiples of 16, this layer is 32 → 24"),
        (recipe_of(16, 24), "multiples of 16, this layer is 24 → 16"),
        (
            recipe_of(16, 32, act=ActQuant(replace(TOKEN, granularity="per_group", group_size=16))),
            "these are per_group",
        ),
        (
            recipe_of(16, 32, weight=weight(16, 32, replace(WEIGHT, granularity="per_group", group_size=16))),
            "per_group",
        ),
        (recipe_of(16, 32, act=None), "takes e4m3 weights and activations"),
        (recipe_of(16, 32, weight=None), "takes e4m3 weights and activations"),
        (recipe_of(16, 32, weight=tlq.twin_log(normal(16, 32), QuantSpec(4, "per_channel"))), "takes e4m3 weights"),
        (recipe_of(16, 32, weight=weight(16, 32, QuantSpec(8, "per_channel"))), "these are int and e4m3"),
        (recipe_of(16, 32, act=ActQuant(QuantSpec(8, "per_token", dynamic=True))), "these are e4m3 and int"),
    ],
)
def test_what_torch_cannot_multiply_is_refused_with_its_reason(recipe, words, hopper):
    reason = cuda_fp8.unsupported(recipe, CUDA)
    assert reason.startswith("cuda_fp8") and words in reason


def test_it_needs_ada_and_the_cpu_simulates(monkeypatch, hopper):
    assert cuda_fp8.unsupported(recipe_of(16, 32), CUDA) is None
    assert choose(recipe_of(16, 32), CUDA).NAME == "cuda_fp8"
    assert choose(recipe_of(16, 32), torch.device("cpu")).NAME == "simulate"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    assert "compute capability 8.9, this device has 8.6" in cuda_fp8.unsupported(recipe_of(16, 32), CUDA)


@pytest.mark.parametrize("act", [ActQuant(TOKEN), None], ids=["both sides", "weights alone"])
def test_no_kernel_of_integers_takes_e4m3_codes(act, hopper):
    """Wherever it runs: the device is not what they are refused for."""
    for name, backend in known_backends().items():
        if name not in ("simulate", "cuda_fp8"):
            reason = backend.unsupported(
                recipe_of(16, 32, act=act), CUDA if name.startswith("cuda_") else torch.device("cpu")
            )
            assert reason.startswith(name) and "runs on" not in reason
    assert "e4m3" in cuda_int8.unsupported(recipe_of(16, 32), CUDA)
    lookup = recipe_of(16, 32, weight=tlq.twin_log(normal(16, 32), QuantSpec(4, "per_channel")))
    assert "e4m3" in cuda_lookup.unsupported(lookup, CUDA)
    assert "e4m3" in weight_only.unsupported(recipe_of(16, 32, act=None), torch.device("cpu"))
    assert "e4m3" in cuda_w4a16.unsupported(recipe_of(16, 32, act=None), CUDA)


def test_ada_and_hopper_are_given_their_own_conversion():
    """Compiled here, with no device. On Ada from float16 up to Triton 3.8 and from float32 after it; rounded we have already."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = [sys.executable, "-c", COMPILE_ROWS]
    found = subprocess.run(run, env=environment, capture_output=True, text=True, cwd=CONF.parent)
    assert found.returncode == 0, found.stderr
    ada, hopper = found.stdout.split(".target sm_")[1:]
    assert ada.startswith("89") and "cvt.rn.satfinite.e4m3x2.f" in ada
    assert hopper.startswith("90") and "cvt.rn.satfinite.e4m3x2.f32" in hopper


COMPILE_ROWS = """
import triton
from triton.backends.compiler import GPUTarget
from ditbench.harness.backends.triton_kernels.activations import quantize_rows_kernel as kernel

pointers = dict(x_ptr="*bf16", codes_ptr="*fp8e4nv", scale_ptr="*fp32", zero_ptr="*i32", norm="fp32", clip="fp32")
constants = dict(QUANT_MIN=-448.0, QUANT_MAX=448.0, SYMMETRIC=True, STORED_LESS=0.0, FLOAT8=True, BF16=True)
constants |= dict(A=1, B=4096, ROWS=1)
constants |= {name: None for name in kernel.arg_names if name.endswith("_ptr") and name not in pointers}
signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
source = triton.compiler.ASTSource(kernel, signature, constexprs=places)
for capability in (89, 90):
    print(triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"])
"""
