"""Norms with their codes, gates, positions and activations in Triton: on a CUDA device where there is one, else in the interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

ON_DEVICE = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_DEVICE else "cpu")
pytest.importorskip("triton", reason="the kernels need triton")

from ditbench.harness.backends import between as kernels  # noqa: E402
from ditbench.harness.backends import cuda_fp8, cuda_int8, cuda_w4a8, cuda_w4a16  # noqa: E402
from ditbench.harness.backends.activations import GELU_ERF, GELU_TANH, NUMBERS, SILU  # noqa: E402
from ditbench.harness.backends.triton_kernels import between, launch  # noqa: E402
from ditbench.harness.build.layer import QuantLinear  # noqa: E402
from ditbench.harness.build.pending import Norm  # noqa: E402
from ditbench.harness.quant.effective import EffectiveLinear  # noqa: E402
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight, static_quant  # noqa: E402
from ditbench.harness.quant.recipe import LayerRecipe, LowRank  # noqa: E402
from ditbench.harness.quant.spec import QuantSpec  # noqa: E402
from ditbench.harness.quant.steps import StepClock, StepTable  # noqa: E402

pytestmark = pytest.mark.gpu if ON_DEVICE else []
ONE_ROUNDING = {"rtol": 2**-8 + 1e-5, "atol": 1e-6}  # of bf16, to nearest
EXACT = {GELU_TANH: lambda x: F.gelu(x, approximate="tanh"), SILU: F.silu, GELU_ERF: F.gelu}
TOKEN = QuantSpec(8, "per_token", dynamic=True)
ACTS = {
    "dynamic": ActQuant(TOKEN),
    "asymmetric": ActQuant(QuantSpec(8, "per_token", symmetric=False, dynamic=True), clip=0.9),
    "six bits": ActQuant(QuantSpec(6, "per_token", symmetric=False, dynamic=True)),
    "static": static_quant(
        StepTable.constant(torch.tensor(-3.0)),
        StepTable.constant(torch.tensor(2.0)),
        QuantSpec(8, "per_tensor", symmetric=False),
    ),
    "e4m3": ActQuant(QuantSpec(8, "per_token", dynamic=True, number="e4m3")),
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.cpu().double(), expected, **ONE_ROUNDING)


def on_device(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if each is None else each.to(DEVICE) for each in tensors]


@pytest.mark.parametrize("centred", [True, False], ids=["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("width", [33, 72, 128, 1152, 3072, 4608, 12288])
def test_a_norm_is_exact_to_one_rounding(width, centred):
    """With a weight, a modulation by sample whose rows lie apart, and neither; an odd number of rows, of two samples."""
    x = drawn(2, 3, width) * 3 + 1
    shift, factor = drawn(2, 2 * width, seed=2).chunk(2, dim=1)
    exact = (F.layer_norm if centred else F.rms_norm)(x.double(), (width,), eps=1e-6)
    weight = drawn(1, width, seed=1).float()
    for by, plus in ((None, None), (weight, None), (factor, shift), (weight, shift)):
        expected = exact if by is None else exact * by.double()[:, None]
        expected = expected if plus is None else expected + plus.double()[:, None]
        near(torch.ops.ditbench.normed(*on_device(x, by, plus), 1e-6, centred), expected)


@pytest.mark.parametrize("act", list(ACTS))
@pytest.mark.parametrize("width", [48, 33, 1152])
def test_codes_that_come_with_a_norm_are_those_of_the_floats_beside_them(width, act):
    """Bit for bit: `simulate` reads those floats."""
    weight = quantize_weight(drawn(16, 64).float(), QuantSpec(8, "per_channel"))
    kernel = cuda_int8.make_kernel(LayerRecipe(weight=weight, act=ACTS[act]), torch.empty(0)).to(DEVICE)
    x, factor, shift = on_device(drawn(2, 5, width), drawn(2, width, seed=1), drawn(2, width, seed=2).float())
    y, rows = kernel.normed(x, Norm(1e-6, centred=True), factor, shift, None, keep=True)
    assert torch.equal(y, torch.ops.ditbench.normed(x, factor, shift, 1e-6, True))
    nothing, again = kernel.normed(x, Norm(1e-6, centred=True), factor, shift, None, keep=False)
    assert nothing is None
    expected = kernel.rows(y, None, None, keep=False)
    for found in (rows, again):
        assert torch.equal(found.codes_MC.view(torch.int8), expected.codes_MC.view(torch.int8))
        assert torch.equal(found.scale_M, expected.scale_M) and torch.equal(found.zero_M, expected.zero_M)
    assert len(rows.codes_MC.float().unique()) > 20


def test_a_token_with_nan_has_a_scale_of_nan_and_its_neighbours_their_own():
    x = drawn(1, 3, 40)
    x[0, 1, 7] = torch.nan
    how = (None, None, 1e-6, True, None, None, 1.0, -127, 127, False, False)
    _, codes, scale, _ = torch.ops.ditbench.normed_rows(x.to(DEVICE), *how)
    assert scale.isnan().tolist() == [False, True, False]
    assert codes[[0, 2]].abs().amax(1).tolist() == [127, 127]


def test_what_no_row_can_be_rounded_by_itself_is_left_to_the_layer():
    weight = quantize_weight(drawn(16, 64).float(), QuantSpec(4, "per_channel"))
    of_a_sample = ActQuant(QuantSpec(8, "per_tensor", dynamic=True))
    for backend, act in ((cuda_w4a8, of_a_sample), (cuda_w4a16, None)):
        kernel = backend.make_kernel(LayerRecipe(weight=weight, act=act), torch.empty(0))
        assert kernel.normed(drawn(1, 2, 64), Norm(1e-6, centred=True), None, None, None, keep=False) is None


@pytest.mark.parametrize("width", [33, 1152, 12288])
def test_a_gate_is_exact_to_one_rounding(width):
    x, y, gate = drawn(2, 3, width), drawn(2, 3, width, seed=1), drawn(2, 2 * width, seed=2).chunk(2, dim=1)[1]
    for rows in (gate, gate.float(), gate[:1]):
        found = torch.ops.ditbench.gated(*on_device(x, rows, y))
        near(found, x.double() + rows.double()[:, None] * y.double())


@pytest.mark.parametrize(("heads", "width"), [(3, 128), (24, 72), (1, 10)])
def test_rotary_positions_are_diffusers_own(heads, width):
    from diffusers.models.embeddings import apply_rotary_emb

    x, tables = drawn(2, 5, heads, width), [drawn(5, width, seed=seed).float() for seed in (1, 2)]
    near(torch.ops.ditbench.rotary(*on_device(x, *tables)), apply_rotary_emb(x.double(), tables, sequence_dim=1))


@pytest.mark.parametrize("name", EXACT)
def test_an_activation_is_the_function_to_five_digits(name):
    x = torch.cat([torch.linspace(-12, 12, 4_001), torch.tensor([-1e4, -300.0, 0.0, 300.0, 1e4, 1e20])])
    found = torch.ops.ditbench.activate(x.to(DEVICE), NUMBERS[name], torch.float32)
    torch.testing.assert_close(found.cpu().double(), EXACT[name](x.double()), rtol=2e-5, atol=4e-7)
    half = torch.ops.ditbench.activate(x.bfloat16().to(DEVICE), NUMBERS[name], torch.bfloat16)
    near(half, EXACT[name](x.bfloat16().double()))
    assert torch.ops.ditbench.activate(torch.tensor([torch.nan]).to(DEVICE), NUMBERS[name], torch.float32).isnan()


WEIGHTS = {
    "int8": (cuda_int8, QuantSpec(8, "per_channel"), ActQuant(TOKEN)),
    "packed": (cuda_w4a8, QuantSpec(4, "per_channel", symmetric=False), ActQuant(TOKEN)),
    "bf16": (cuda_w4a16, QuantSpec(4, "per_channel"), None),
    "e4m3": (cuda_fp8, QuantSpec(8, "per_channel", number="e4m3"), ACTS["e4m3"]),
}


@pytest.fixture
def in_triton(monkeypatch):
    """What stands between layers, in Triton on any device."""
    monkeypatch.setitem(kernels.found, DEVICE.type, kernels.InTriton())


@pytest.mark.usefixtures("in_triton", "e4m3_rows")
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_layer_that_ends_in_an_activation_gives_what_a_simulated_one_gives(kind, name, rank):
    """The same bits where nothing but scales and a bias follows sums of whole numbers."""
    backend, spec, act = WEIGHTS[kind]
    weight_OC = drawn(48, 64, seed=1).float()
    low_rank = None if rank is None else LowRank(drawn(rank, 64, seed=2).float(), drawn(48, rank, seed=3).float())
    recipe = LayerRecipe(weight=quantize_weight(weight_OC, spec), act=act, low_rank=low_rank)
    effective = EffectiveLinear(weight_OC, StepTable.constant(drawn(48, seed=4).float()))
    settings = {"folded": False, "clock": StepClock(None), "dtype": torch.bfloat16, "device": torch.device("cpu")}
    real, simulated = (QuantLinear(recipe, effective, **settings, backend="simulate") for _ in range(2))
    real.kernel = backend.make_kernel(recipe, weight_OC)
    assert name in real.kernel.activations
    x = drawn(2, 9, 64).to(DEVICE)
    found, expected = real.to(DEVICE)(x, name), simulated.to(DEVICE)(x, name)
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape
    if rank is None and kind in ("int8", "packed") and not ON_DEVICE:
        assert torch.equal(found, expected)
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert error < (2**-7 if rank or kind == "e4m3" else 2**-9)
    plain = EXACT[name](simulated(x.float()))
    assert (found - plain).norm() < 2**-6 * plain.norm()


@pytest.mark.parametrize("operator", ["normed", "normed_rows", "gated", "rotary", "activate"])
def test_an_operator_says_of_its_outputs_what_they_are(operator):
    x, row = on_device(drawn(2, 3, 8), drawn(2, 8, seed=1))
    arguments = {
        "normed": (x, row, None, 1e-6, True),
        "normed_rows": (x, row, row, 1e-6, False, None, None, 1.0, -448, 448, True, True),
        "gated": (x, row, x),
        "rotary": (x.view(2, 3, 2, 4), torch.ones(3, 4, device=DEVICE), torch.ones(3, 4, device=DEVICE)),
        "activate": (x, NUMBERS[SILU], torch.float32),
    }
    operators = getattr(between, operator)
    torch.library.opcheck(operators, arguments[operator], test_utils=("test_schema", "test_faketensor"))


def test_no_token_launches_nothing(monkeypatch):
    monkeypatch.setattr(launch, "_on", None)
    x, row = on_device(drawn(2, 0, 8), drawn(2, 8))
    assert torch.ops.ditbench.normed(x, row, None, 1e-6, True).shape == torch.ops.ditbench.gated(x, row, x).shape
    assert torch.ops.ditbench.normed_rows(x, row, None, 1e-6, True, None, None, 1.0, -127, 127, False, False)[
        1
    ].shape == (
        0,
        8,
    )
