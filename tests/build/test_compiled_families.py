"""Blocks of quantized models of other families than DiT, compiled as `measure.compile=true` and a benchmark do it: without a graph break."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import small_model
from torch import nn
from torch._dynamo.utils import counters

from ditbench.harness.backends import vnni
from ditbench.harness.build.build import build
from ditbench.harness.build.compiled import compiled
from ditbench.harness.build.flat_calls import output_of, relative_error
from ditbench.harness.models.calls import placed
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.spec import QuantSpec

pytestmark = pytest.mark.skipif(vnni.cpu_lacks() is not None, reason=str(vnni.cpu_lacks()))
WEIGHT, ACT = QuantSpec(8, "per_channel"), ActQuant(QuantSpec(8, "per_token", dynamic=True))
KINDS = {  # of blocks, each of which is compiled once
    "flux": {"FluxTransformerBlock", "FluxSingleTransformerBlock"},
    "sd3": {"JointTransformerBlock"},
    "wan": {"WanTransformerBlock"},
    "qwen_image": {"QwenImageTransformerBlock"},
}


def made(name: str) -> tuple[nn.Module, tuple[str, ...], dict[str, Any]]:
    """A small model with quantized blocks, their names and a call."""
    torch._dynamo.reset()
    model = small_model(name)
    target = model.target()
    layers = {n: LayerRecipe(weight=quantize_weight(target.weight(n), WEIGHT), act=ACT) for n in target.layers}
    eager = build(target, ModelRecipe(layers), dtype=torch.bfloat16)
    return eager, target.blocks, placed(model.step_inputs(2), torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("name", list(KINDS))
@torch.no_grad()
def test_a_block_of_each_kind_compiles_without_a_graph_break_and_computes_the_same(name):
    eager, blocks, inputs = made(name)
    first = {type(eager.get_submodule(block)).__name__: block for block in reversed(blocks)}
    assert set(first) == KINDS[name]
    run = compiled(eager, list(first.values()), backend="aot_eager", fullgraph=True)
    expected = output_of(eager(**inputs))
    assert relative_error(output_of(run(**inputs)), expected) < 0.02  # torch's norms and gates round in between


@torch.no_grad()
def test_hidream_breaks_off_where_the_tokens_of_its_experts_are_counted_on_the_host_and_nowhere_else():
    """So docs/backends.md says; what it computes is the same."""
    eager, blocks, inputs = made("hidream")
    counters["graph_break"].clear()
    run = compiled(eager, blocks[:1], backend="aot_eager")
    found = output_of(run(**inputs))
    assert relative_error(found, output_of(eager(**inputs))) < 0.03
    (reason,) = counters["graph_break"]
    assert "aten.bincount" in reason
