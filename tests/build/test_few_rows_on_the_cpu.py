from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ditbench.harness.backends.attention import lacks
from ditbench.harness.backends.few_rows import SteadyLinear
from ditbench.harness.build import fusion
from ditbench.harness.build.build import build, float_copy
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.spec import QuantSpec

pytestmark = pytest.mark.skipif(lacks() is not None, reason=str(lacks()))


def linear(width: int, outputs: int, biased: bool = True) -> SteadyLinear:
    torch.manual_seed(0)
    layer = SteadyLinear(width, outputs, bias=biased).bfloat16().requires_grad_(False)
    fusion.fuse_few_rows(layer)
    assert type(layer) is fusion.FewRowsLinear
    return layer


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("rows", "width", "outputs"), [(1, 1, 1), (2, 256, 1152), (5, 33, 7), (9, 1152, 130), (3, 31, 4)]
)
def test_it_is_the_product_rounded_once(rows, width, outputs, biased):
    layer, x = linear(width, outputs, biased), drawn(rows, width)
    exact = x.double() @ layer.weight.double().T + (layer.bias.double() if biased else 0)
    y = layer(x)
    assert (y.shape, y.dtype) == ((rows, outputs), torch.bfloat16)
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=2e-6 * width**0.5)


def test_a_row_is_the_same_alone_and_among_others():
    layer, x = linear(1152, 130), drawn(40, 1152)
    whole = layer(x)
    for rows in (1, 2, 3, 5, 8, 17):
        assert torch.equal(layer(x[:rows]), whole[:rows])
        assert torch.equal(layer(x[-rows:]), whole[-rows:])


@pytest.mark.parametrize("what", ["tokens", "float32", "gradient"])
def test_what_is_not_one_row_a_sample_in_bfloat16_is_torchs(what, monkeypatch):
    layer, x = linear(24, 8), drawn(2, 24)
    if what == "tokens":
        x = x[:, None].expand(2, 3, 24)
    if what == "float32":
        layer, x = layer.float(), x.float()
    if what == "gradient":
        x.requires_grad_()
    expected = SteadyLinear.forward(layer, x)
    y = layer(x)
    assert torch.equal(y, expected)
    assert y.requires_grad == (what == "gradient")


def test_float_layers_of_a_quantized_model_are_such_and_those_of_the_float_model_are_not(small_model):
    target, act = small_model.target(), ActQuant(QuantSpec(8, "per_token", dynamic=True))
    spec = QuantSpec(8, "per_channel")
    layers = {n: LayerRecipe(weight=quantize_weight(target.weight(n), spec), act=act) for n in target.layers}
    adaln = build(target, ModelRecipe(layers)).transformer_blocks[0].norm1.linear
    assert type(adaln) is fusion.FewRowsLinear
    assert type(float_copy(target, dtype=torch.bfloat16).transformer_blocks[0].norm1.linear) is SteadyLinear


def test_it_compiles_without_a_graph_break():
    layer, x = linear(40, 12), drawn(2, 40)
    run = torch.compile(lambda x: layer(x), backend="aot_eager", fullgraph=True)
    assert torch.equal(run(x), layer(x))
