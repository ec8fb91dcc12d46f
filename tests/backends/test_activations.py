from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ditbench.harness.backends import simulate, vnni
from ditbench.harness.backends.activations import GELU_ERF, GELU_TANH, SILU, activate
from ditbench.harness.build.layer import QuantLinear
from ditbench.harness.quant.effective import EffectiveLinear
from ditbench.harness.quant.lowrank import LowRank
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight
from ditbench.harness.quant.recipe import LayerRecipe
from ditbench.harness.quant.spec import QuantSpec
from ditbench.harness.quant.steps import StepClock, StepTable

pytestmark = pytest.mark.skipif(vnni.cpu_lacks() is not None, reason=str(vnni.cpu_lacks()))
EXACT = {GELU_TANH: lambda x: F.gelu(x, approximate="tanh"), SILU: F.silu, GELU_ERF: F.gelu}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", EXACT)
def test_it_is_the_function_to_five_digits(name):
    x = torch.cat([torch.linspace(-12, 12, 40_001), torch.tensor([-1e4, -300.0, 300.0, 1e4])])
    expected = EXACT[name](x.double())
    torch.testing.assert_close(activate(x, name).double(), expected, rtol=2e-5, atol=4e-7 if name == GELU_ERF else 1e-7)


@pytest.mark.parametrize("name", EXACT)
def test_nan_stays_nan_and_zero_zero(name):
    y = activate(torch.tensor([torch.nan, 0.0, 1.0]), name)
    assert y.isnan().tolist() == [True, False, False]
    assert y[1] == 0


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("count", [1, 15, 16, 17, 50_003])
def test_every_value_is_reached_in_any_shape(name, count):
    x = drawn(count)
    whole = activate(x, name)
    assert torch.equal(whole[-20:], torch.stack([activate(value, name) for value in x[-20:]]))
    assert torch.equal(activate(x.expand(3, count), name), whole.expand(3, count))
    torch.testing.assert_close(whole, EXACT[name](x), rtol=2e-5, atol=1e-6)


def layer(backend: str, rank: int | None) -> QuantLinear:
    weight_OC = drawn(33, 24, seed=1)
    low_rank = None if rank is None else LowRank(drawn(rank, 24, seed=2), drawn(33, rank, seed=3))
    return QuantLinear(
        LayerRecipe(
            weight=quantize_weight(weight_OC, QuantSpec(8, "per_channel")),
            act=ActQuant(QuantSpec(8, "per_token", dynamic=True)),
            low_rank=low_rank,
        ),
        EffectiveLinear(weight_OC, StepTable.constant(drawn(33, seed=4))),
        folded=False,
        clock=StepClock(None),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        backend=backend,
    )


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("rank", [None, 2])
def test_a_real_layer_that_ends_in_it_gives_the_bits_of_a_simulated_one(name, rank):
    x = drawn(2, 19, 24).bfloat16()
    real, simulated = (layer(backend, rank)(x, name) for backend in (vnni.NAME, simulate.NAME))
    assert real.dtype == torch.bfloat16
    assert torch.equal(real, simulated)
    plain = layer(vnni.NAME, rank)(x.float())
    torch.testing.assert_close(real.float(), EXACT[name](plain), rtol=2**-8, atol=1e-6)


def test_a_kernel_that_has_no_such_end_gets_it_behind(monkeypatch):
    x, ends = drawn(5, 24).bfloat16(), layer(vnni.NAME, None)
    expected = activate(ends(x).float(), SILU).bfloat16()
    monkeypatch.setattr(type(ends.kernel), "activations", frozenset())
    assert torch.equal(ends(x, SILU), expected)
