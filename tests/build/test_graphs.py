"""A recorded call gives what the model gives, whatever of it has changed since."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_pipelines import SIZES, SMALL
from torch import nn

from ditbench.harness.build.build import build, clock_of
from ditbench.harness.build.flat_calls import output_of
from ditbench.harness.build.graphs import Graphed
from ditbench.harness.models.base import LoadedModel, ModelSpec
from ditbench.harness.models.calls import placed
from ditbench.harness.models.known_families import family
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight, static_quant
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.spec import QuantSpec
from ditbench.harness.quant.steps import StepTable

WEIGHT, DYNAMIC = QuantSpec(8, "per_channel"), ActQuant(QuantSpec(8, "per_token", dynamic=True))


def loaded(name: str) -> LoadedModel:
    torch.manual_seed(0)
    pipe, adapter = SMALL[name](), family(name)
    adapter.prepare(pipe)
    pipe.transformer.eval().requires_grad_(False)
    return LoadedModel(ModelSpec(name, name), pipe, replace(adapter, size=SIZES.get(name, {})))


def w8a8(model: LoadedModel, act: ActQuant = DYNAMIC, num_steps: int | None = None) -> nn.Module:
    target = model.target()
    layers = {n: LayerRecipe(weight=quantize_weight(target.weight(n), WEIGHT), act=act) for n in target.layers}
    return build(target, ModelRecipe(layers, num_steps=num_steps), dtype=torch.bfloat16)


def inputs_of(model: LoadedModel, rows: int = 2) -> dict[str, Any]:
    return placed(model.step_inputs(rows), torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux", "wan"])
@torch.no_grad()
def test_a_recorded_call_gives_the_same_bits_for_other_values_of_its_tensors(name, small_model):
    model = small_model if name == "dit" else loaded(name)
    eager = w8a8(model)
    graph, inputs = Graphed(eager), inputs_of(model)
    graph(**inputs)
    other = {key: x * 0.5 if torch.is_tensor(x) and x.is_floating_point() else x for key, x in inputs.items()}
    assert torch.equal(graph(**other), output_of(eager(**other)))
    assert not torch.equal(graph(**other), graph(**inputs)) and len(graph._recordings) == 1


@torch.no_grad()
def test_the_step_is_looked_up_at_every_call(small_model):
    high = StepTable(torch.tensor([1.0, 4.0]), torch.arange(2))
    model = w8a8(small_model, static_quant(high.map(torch.neg), high, QuantSpec(8, "per_tensor")), num_steps=2)
    graph, inputs, outputs = Graphed(model), inputs_of(small_model), []
    for step in (0, 1):
        clock_of(model).set(step, 2)
        outputs.append(graph(**inputs))
        assert torch.equal(outputs[step], output_of(model(**inputs)))
    assert not torch.equal(*outputs) and len(graph._recordings) == 1


@torch.no_grad()
def test_each_range_of_steps_is_recorded(small_model):
    """Layers may be others in each range (DVD-Quant's bits, plans by step)."""
    target = small_model.target()
    first, second = (
        {
            n: LayerRecipe(weight=quantize_weight(target.weight(n), QuantSpec(bits, "per_channel")))
            for n in target.layers
        }
        for bits in (8, 3)
    )
    variants = {n: (first[n], second[n]) for n in target.layers}
    model = build(target, ModelRecipe(first, num_steps=2, variants=variants, starts=(0, 1)), dtype=torch.bfloat16)
    graph, inputs, outputs = Graphed(model), inputs_of(small_model), []
    for step in (0, 1, 0):
        clock_of(model).set(step, 2)
        outputs.append(graph(**inputs))
        assert torch.equal(outputs[-1], output_of(model(**inputs)))
    assert not torch.equal(*outputs[:2]) and len(graph._recordings) == 2


@torch.no_grad()
def test_weights_that_change_in_place_are_read_again(small_model):
    model = w8a8(small_model)
    graph, inputs = Graphed(model), inputs_of(small_model)
    before = graph(**inputs)
    model.proj_out_2.bias += 1
    assert torch.equal(graph(**inputs), output_of(model(**inputs)))
    assert not torch.equal(graph(**inputs), before)


@torch.no_grad()
def test_other_shapes_are_recorded_anew(small_model):
    model = w8a8(small_model)
    graph = Graphed(model)
    for rows in (2, 3, 2):
        inputs = inputs_of(small_model, rows)
        assert torch.equal(graph(**inputs), output_of(model(**inputs)))
    assert len(graph._recordings) == 2


@torch.no_grad()
def test_other_dtypes_are_recorded_anew(small_model):
    model = w8a8(small_model)
    graph, inputs = Graphed(model), inputs_of(small_model)
    for dtype in (torch.long, torch.float32, torch.long):
        graph(**inputs | {"timestep": inputs["timestep"].to(dtype)})
    assert len(graph._recordings) == 2


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor, by: float) -> tuple[torch.Tensor]:
        return (x * by,)


@torch.no_grad()
def test_what_is_no_tensor_is_part_of_a_recording():
    graph, x = Graphed(Scaled()), torch.ones(3)
    assert [float(graph(x=x, by=by)[0]) for by in (2.0, 5.0, 2.0)] == [2.0, 5.0, 2.0]
    assert len(graph._recordings) == 2
