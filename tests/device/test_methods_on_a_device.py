"""Every method on a device that is not the CPU: the CPU's codes, scales and outputs, and the arithmetic is done there."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from operations import REPOSITORY, Operations, counted
from second_device import NAME
from small_pipelines import SMALL
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ditbench.harness.backends import rotations
from ditbench.harness.build.build import build
from ditbench.harness.calibration.recording import Calibration, calibrate
from ditbench.harness.common import devices
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting import registry
from ditbench.harness.fitting.conformance import DYNAMIC, STATIC
from ditbench.harness.fitting.rounding import nearest, static_ranges
from ditbench.harness.measurement.layer_errors import error_atlas
from ditbench.harness.models.base import ModelSpec, Sampler
from ditbench.harness.models.loading import load_model
from ditbench.harness.quant.effective import effective_linear
from ditbench.harness.quant.quantizers import QuantizedWeight, quantize_weight
from ditbench.harness.quant.recipe import ModelRecipe, to_device
from ditbench.harness.quant.serialize import encode
from ditbench.harness.quant.spec import Bits
from ditbench.harness.quant.target import Target
from ditbench.harness.samples.samples import Prompt

LEARNING = ("flatquant", "ptq4dit", "ptq4dm", "q_diffusion")  # by gradients
METHODS = [name for name in registry.known_methods() if name != registry.FLOAT]
LEAST_SHARE = 0.99
# Nothing but a few maxima is fitted here, beside which the numbers of a timestep weigh that a call without weights works out on the CPU.
LEAST_OF_FEW = {"segquant": 0.96}
QUICK: dict[str, dict[str, Any]] = {  # what takes long, taken short: less of the same
    "clq": {"grid": 3, "probe": (0.5, 1.0), "search_samples": 1, "search_steps": 1, "reach": 1},
    "duquant": {"steps": 24}, "lrq_dit": {"steps": 24, "choose": "measured"}, "svdquant": {"num_grids": 2, "iterations": 2},
    "flatquant": {"iterations": 4}, "q_dit": {"search": "evolution", "population": 2, "epochs": 1, "mutations": 1, "crossovers": 0},
    "ptq4dit": {"iterations": 4}, "ptq4dm": {"iterations": 4}, "q_diffusion": {"iterations": 4, "scale_iterations": 2, "ranges": "mse"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def rotated_by_torch(monkeypatch):
    """On both sides: our own kernel of the CPU adds in another order."""
    monkeypatch.setattr(rotations, "cpu_lacks", lambda: "this test is about devices")


@dataclass(frozen=True)
class Family:
    target: Target
    calibration: Calibration
    wanted: Bits  # where the method defines it


@pytest.fixture(scope="module")
def dit(small_model) -> Family:
    """Every layer and attention operand in static formats."""
    recorded = calibrate(small_model, Sampler("ddim", steps=2, guidance=1.5), n=8, seed=0)
    return Family(small_model.target("all", attention=True), recorded, STATIC.with_widths(4, 8))


@pytest.fixture(scope="module")
def pixart(tmp_path_factory) -> Family:
    """The blocks in W4A8, dynamic; folds go into adaLN-single."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pixart")
    SMALL["pixart"]().save_pretrained(folder)
    model = load_model(ModelSpec("pixart", "pixart", source=str(folder)))
    for (
        parameter
    ) in model.transformer.parameters():  # a file's tensors lie at odd addresses, where sums round otherwise
        parameter.data = parameter.data.clone()
    prompts = (Prompt("a red circle"), Prompt("two blue squares"))
    recorded = calibrate(model, Sampler(model.adapter.SAMPLERS[0], 2, 2.0), n=8, seed=0, prompts=prompts)
    return Family(model.target(), recorded, DYNAMIC)


@pytest.fixture(params=["dit", "pixart"])
def family(request) -> Family:
    return request.getfixturevalue(request.param)


@dataclass(frozen=True)
class Case:
    method: ModuleType
    bits: Bits
    params: Any
    least_share: float = LEAST_SHARE


def case_of(name: str, family: Family) -> Case:
    """A method in the family's format, or in another that it defines."""
    method = registry.method(name)
    for bits in (family.wanted, STATIC, DYNAMIC):
        try:
            registry.check_bits(name, bits)
        except UserError:
            continue
        return Case(method, bits, replace(method.Params(), **QUICK.get(name, {})), LEAST_OF_FEW.get(name, LEAST_SHARE))
    raise AssertionError(name)


def run(case: Case, family: Family, device: torch.device | str, ops: Operations) -> SimpleNamespace:
    """What a run does with a method between calibration and samples."""
    method, bits, params = case.method, case.bits, case.params
    target, calibration = family.target.on(device), replace(family.calibration, device=torch.device(device))
    select = getattr(method, "select_calibration", None)
    chosen = calibration if select is None else select(calibration, params, 0)
    with ops, torch.no_grad():
        with ops.stage("fit"):
            state = method.fit(target, chosen, bits, params)
            recipe = method.apply(target, state, bits, params)
        with ops.stage("build"):
            model = build(target, recipe, dtype=torch.float32, device=device, backend="simulate")
        with ops.stage("layer errors"):
            atlas = error_atlas(target, recipe, model, calibration)
        output = calibration.call(model, 1, calibration.rows(1, 3))[0]
    return SimpleNamespace(state=state, recipe=recipe, atlas=atlas, output=output)


def tensors_of(recipe: Any) -> dict[str, Tensor]:
    """Codes, scales, zero points, transforms and all."""
    found: dict[str, Tensor] = {}
    for part, of_part in (("layer", recipe.layers), ("attention", recipe.attention)):
        for name, each in of_part.items():
            encode(each, f"{part}/{name}", found)
    return found


@pytest.mark.parametrize("name", [name for name in METHODS if name not in LEARNING])
def test_a_method_computes_on_the_device_what_it_computes_on_the_cpu(name, family, second):
    compare(case_of(name, family), family, second)


@pytest.mark.parametrize("name", LEARNING)
def test_a_method_that_learns_does_so_too(name, family, learns):
    compare(case_of(name, family), family, learns)


def compare(case: Case, family: Family, second: torch.device) -> None:
    ops = counted()
    here, there = run(case, family, "cpu", counted()), run(case, family, second, ops)
    stays_on_the_cpu(there)
    same(there.state, here.state)
    same(tensors_of(there.recipe), tensors_of(here.recipe))
    assert there.output.device == second
    torch.testing.assert_close(there.output.cpu(), here.output, rtol=0, atol=1e-5)
    torch.testing.assert_close(there.atlas.noise_LS, here.atlas.noise_LS, rtol=1e-5, atol=1e-12)
    assert ops.stages() >= {"fit", "layer errors"}, "a build that transforms nothing only moves"
    for stage in ops.stages() - {""}:
        assert ops.share_on_second_device(stage) >= case.least_share, f"{stage}\n{ops.report()}"


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit: the second device's kernels are the CPU's, and nothing is summed in another order."""
    assert found.keys() == expected.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]


def stays_on_the_cpu(run: SimpleNamespace) -> None:
    """What was found for the whole model; on the device it would stand beside the model itself."""
    parts = [*run.state.values(), *run.recipe.layers.values(), *run.recipe.attention.values()]
    assert all(to_device(part, "cpu") is part for part in parts)


class NoFloat64(TorchDispatchMode):
    """Refuses float64 on the second device, as Apple's GPUs do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == NAME and leaf.dtype == torch.float64:
                raise TypeError(f"this device has no float64 ({func})")
        return out


@pytest.mark.parametrize("name", ["htg", "clq", "gptq", "repq"])
def test_a_device_without_float64_is_given_none(name, pixart, second, monkeypatch):
    """Models are observed on it; the algebra of weights, and so what fits run block by block, stays on the CPU."""
    here = run(case_of(name, pixart), pixart, "cpu", counted())
    monkeypatch.setattr(devices, "_has_float64", lambda device: device.type == "cpu")
    with NoFloat64():
        there = run(case_of(name, pixart), pixart, second, counted())
    stays_on_the_cpu(there)
    same(tensors_of(there.recipe), tensors_of(here.recipe))
    torch.testing.assert_close(there.output.cpu(), here.output, rtol=0, atol=1e-5)


def test_an_accelerator_without_float64_is_told_from_one_with(second):
    assert devices.float64_device(second) == second
    with NoFloat64():
        devices._has_float64.cache_clear()
        assert devices.float64_device(second) == torch.device("cpu")
    devices._has_float64.cache_clear()


def test_a_model_is_built_on_its_device_from_a_recipe_that_stays_where_it_is(dit, second):
    """Of a target whose algebra is elsewhere too; and a model that moves later takes nothing with it."""
    case = case_of("smoothquant", dit)
    here = run(case, dit, "cpu", counted())
    with counted() as ops:
        build(dit.target, here.recipe, dtype=torch.float32, device=second)
    assert ops.share_on_second_device() >= 0.95, (
        ops.report()
    )  # zero points are looked at where they lie: one of 24 weights
    stays_on_the_cpu(here)
    build(dit.target, here.recipe, dtype=torch.float32).to(second)
    stays_on_the_cpu(here)


def test_a_method_written_as_the_docs_show_is_on_the_device_without_knowing_of_it(
    family, second, tmp_path, monkeypatch
):
    page = (REPOSITORY / "docs" / "add-a-method.md").read_text()
    source = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    (tmp_path / "halve_on_a_device.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    method = importlib.import_module("halve_on_a_device")
    compare(Case(method, STATIC, method.Params()), family, second)


def test_a_method_that_rounds_its_own_weights_is_too(family, second):
    """A clip searched as docs/add-a-method.md says: what `effective_linear` gives lies on the device, and all that follows."""

    def rounded(target: Target, name: str, bits: Bits, ratio: float) -> tuple[QuantizedWeight, Tensor]:
        weight_OC = effective_linear(target, name, {}, frozenset()).weight_OC
        return quantize_weight(weight_OC, bits.weight, ratios=(ratio, ratio)), weight_OC

    def error(*args: Any) -> float:
        weight, weight_OC = rounded(*args)
        return float((weight.dequantize() - weight_OC).square().sum())

    def fit(target: Target, calibration: Calibration, bits: Bits, params: None) -> dict[str, Tensor]:
        best = {n: min((1.0, 0.9, 0.8), key=lambda ratio: error(target, n, bits, ratio)) for n in target.layers}  # noqa: B023
        ranges = static_ranges(target, bits, calibration)
        return ranges | {f"{name}/ratio": torch.tensor(ratio) for name, ratio in best.items()}

    def apply(target: Target, state: dict[str, Tensor], bits: Bits, params: None) -> ModelRecipe:
        weights = {name: rounded(target, name, bits, float(state[f"{name}/ratio"]))[0] for name in target.layers}
        return nearest(target, bits, state, weights=weights)

    compare(Case(SimpleNamespace(fit=fit, apply=apply), family.wanted, None), family, second)


def test_calibration_of_the_dit_is_recorded_on_the_device(small_model, second):
    sampler = Sampler("ddim", steps=2, guidance=1.5)
    with counted() as ops:
        there = calibrate(small_model, sampler, n=2, seed=0, device=second)
    here = calibrate(small_model, sampler, n=2, seed=0)
    for recorded, expected in zip(there.per_step, here.per_step, strict=True):
        same(recorded, expected)
    assert ops.share_on_second_device() >= LEAST_SHARE, ops.report()
