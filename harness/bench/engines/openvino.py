"""OpenVINO on the CPU: its bf16; int8 products of the same layers, with static ranges; int8 weights alone.

The int8 models are what `ditbench export --format openvino` and `--format openvino-weights` write. Static ranges are those of the
call that is timed, least to most (`Ranges`), so their error is that of ranges that fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ditbench.harness.bench.engines.base import GRAPH, Rival, Work, lacks, not_on_the_cpu
from ditbench.harness.bench.engines.openvino_nodes import COUNTS, Profiler
from ditbench.harness.bench.profiles import Profile
from ditbench.harness.build.build import build, float_copy
from ditbench.harness.build.openvino_export import converted, without_activations
from ditbench.harness.build.openvino_run import ROUNDS_BY_ITSELF, Runner
from ditbench.harness.common.extras import needed
from ditbench.harness.models.calls import placed
from ditbench.harness.quant.quantizers import quantize_weight, static_quant
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.spec import QuantSpec
from ditbench.harness.quant.steps import StepTable

NAME = "openvino"
WEIGHT, ACT = QuantSpec(8, "per_channel"), QuantSpec(8, "per_tensor", symmetric=False)
GROUP = 128  # channels that share a scale where OpenVINO rounds activations by itself


def unavailable(device: torch.device) -> str | None:
    return not_on_the_cpu(device) or lacks(("openvino",), "'ditbench[openvino]'")


def rivals(work: Work) -> Iterator[Rival]:
    precision = best_precision()
    name = {"bf16": "bf16", "f32": "float32"}[precision]
    int8 = static_int8(work)
    models: tuple[tuple[str, ModelRecipe, dict[str, Any]], ...] = (
        (f"OpenVINO {name}", ModelRecipe(layers={}), {}),
        (f"OpenVINO INT8, rest {name}", int8, {ROUNDS_BY_ITSELF: 0}),
        (f"OpenVINO weights INT8, rounds by {GROUP}", without_activations(int8), {ROUNDS_BY_ITSELF: GROUP}),
    )
    for label, recipe, options in models:
        built = build(work.target, recipe, dtype=torch.float32, backend="simulate")
        model = converted(built, work.examples)
        run = Runner(model, precision=precision, threads=work.threads, options=options)
        counting = partial(profiler, model, work, recipe, precision, options)
        yield Rival(label, GRAPH, run, profile=Once(counting))


def profiler(model: Any, work: Work, recipe: ModelRecipe, precision: str, options: dict[str, Any]) -> Profiler:
    run = Runner(model, precision=precision, threads=work.threads, options=options | COUNTS)
    return Profiler(run, tuple(recipe.layers))


class Once:
    """A profiler that is made when it is called first, which is when all that is timed has been."""

    def __init__(self, make: Callable[[], Profiler]) -> None:
        self.make = cache(make)

    def __call__(self, arguments: dict[str, Any]) -> Profile:
        return self.make()(arguments)


def best_precision() -> str:
    core = needed("openvino", "openvino", "--others openvino").Core()
    return "bf16" if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"


@torch.no_grad()
def static_int8(work: Work) -> ModelRecipe:
    """Symmetric weights per channel to nearest, asymmetric activations per tensor."""
    model = float_copy(work.target, dtype=torch.float32)
    layers = {name: model.get_submodule(name) for name in work.layers}
    ranges = {name: Ranges(layer) for name, layer in layers.items()}
    model(**placed(work.examples[1], torch.float32, "cpu"))
    return ModelRecipe(
        layers={
            name: LayerRecipe(
                weight=quantize_weight(work.target.weight(name), WEIGHT),
                act=static_quant(StepTable.constant(seen.low), StepTable.constant(seen.high), ACT),
            )
            for name, seen in ranges.items()
        }
    )


class Ranges:
    """The ends of what comes into a layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.low = self.high = torch.zeros(())
        layer.register_forward_pre_hook(self.see)

    def see(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        low, high = args[0].aminmax()
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
