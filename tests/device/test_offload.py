"""Blocks that are on the device only while they run: the resident model's outputs, and no more than one block there."""

from __future__ import annotations

import pytest
import torch
from device_chain import config_of
from torch import Tensor, nn

from ditbench.harness.build import offload
from ditbench.harness.build.build import build, float_copy, quant_layers
from ditbench.harness.build.offload import away, weights_bytes
from ditbench.harness.measurement.latency import measure
from ditbench.harness.measurement.layer_errors import error_atlas
from ditbench.harness.models.base import LoadedModel, Sampler
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.spec import QuantSpec
from ditbench.harness.samples.conditions import Conditions
from ditbench.harness.samples.samples import Prompt
from ditbench.harness.stages.loaded import model_of
from ditbench.harness.stages.quantize import calibrate, fitted, target_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(model) -> ModelRecipe:
    target, weight, act = model.target(), QuantSpec(4, "per_channel"), QuantSpec(8, "per_token", dynamic=True)
    layers = {
        n: LayerRecipe(weight=quantize_weight(target.weight(n), weight), act=ActQuant(act)) for n in target.layers
    }
    return ModelRecipe(layers)


def drawn(model: LoadedModel, transformer: nn.Module) -> Tensor:
    wanted = Conditions((0, 1), prompts=(Prompt("a"), Prompt("b")))
    return model.adapter.sample(model.pipe, transformer, wanted, Sampler("pipeline", 2, 2.0)).latents.cpu()


def held(module: nn.Module, device: torch.device) -> list[str]:
    """Names of what lies on the device, what kernels have made for themselves too."""
    found = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.device == device]
    for name, each in module.named_modules():
        found += [f"{name}.{n}" for n, t in vars(each).items() if isinstance(t, Tensor) and t.device == device]
    return found


@pytest.mark.parametrize("kind", ["float", "w4a8"])
def test_outputs_are_the_resident_models_and_one_block_is_there_at_a_time(second, model, recipe, kind):
    chosen = recipe if kind == "w4a8" else ModelRecipe({})
    settings = {"dtype": torch.float32, "device": second, "backend": "simulate"}
    expected = drawn(model, build(model.target(), chosen, **settings))
    transformer = build(model.target(), chosen, **settings, memory="offload")
    blocks = {name: transformer.get_submodule(name) for name in model.target().blocks}
    seen = []
    for name, block in blocks.items():
        block.register_forward_pre_hook(
            lambda *_, name=name: seen.append((name, [each for each, other in blocks.items() if held(other, second)]))
        )
    assert not any(held(block, second) for block in blocks.values())
    assert torch.equal(drawn(model, transformer), expected)
    assert seen and all(there == [name] for name, there in seen)
    assert not any(held(block, second) for block in blocks.values()), "something stayed"
    assert transformer.memory["memory"] == "offload" and transformer.memory["asked"] == "offload"


def test_a_block_that_fails_is_taken_back_and_the_next_call_is_right(second, model, recipe):
    transformer = build(
        model.target(), recipe, dtype=torch.float32, device=second, backend="simulate", memory="offload"
    )
    expected = drawn(model, transformer)
    block = transformer.get_submodule(model.target().blocks[1])
    layer = next(each for each in block.modules() if hasattr(each, "kernel")).kernel
    inner = layer.forward
    layer.forward = lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        drawn(model, transformer)
    layer.forward = inner
    assert not held(block, second)
    assert torch.equal(drawn(model, transformer), expected)


def test_auto_takes_what_the_weights_leave_room_for(second, model, recipe, monkeypatch):
    settings = (model.target(), recipe, torch.float32, second, "simulate")
    needed = weights_bytes(*settings)
    for free, expected in ((2 * needed, "resident"), (needed, "offload"), (None, "resident")):
        monkeypatch.setattr(offload, "free_memory", lambda device, free=free: free)
        found = offload.chosen("auto", *settings)
        assert found == {"memory": expected, "asked": "auto", "weights_bytes": needed, "free_bytes": free}
    assert offload.chosen("offload", *settings[:3], CPU, "simulate")["memory"] == "resident"


def test_the_bytes_it_decides_by_are_those_of_the_model_that_runs(second, model, recipe):
    for chosen in (ModelRecipe({}), recipe):
        transformer = build(model.target(), chosen, dtype=torch.float32, device=second, backend="simulate")
        drawn(model, transformer)
        tensors = [*transformer.parameters(), *transformer.buffers()]
        for each in transformer.modules():
            tensors += [value for value in vars(each).values() if isinstance(value, Tensor)]
        real = sum({id(t): t.nbytes for t in tensors}.values())
        assert 0.9 < weights_bytes(model.target(), chosen, torch.float32, second, "simulate") / real < 1.1


def test_a_model_that_is_away_leaves_nothing_on_the_device_and_comes_back_as_it_was(second, model, recipe):
    for memory in ("resident", "offload"):
        transformer = build(
            model.target(), recipe, dtype=torch.float32, device=second, backend="simulate", memory=memory
        )
        expected, before = drawn(model, transformer), set(transformer.state_dict())
        with away(transformer, second):
            assert held(transformer, second) == []
            drawn(model, float_copy(model.target(), dtype=torch.float32, device=second))
        assert torch.equal(drawn(model, transformer), expected) and set(transformer.state_dict()) == before


def test_folds_and_layer_errors_are_the_same_when_blocks_are_guests(second, tmp_path, monkeypatch):
    config = config_of("pixart", "smoothquant", "second_device", tmp_path)
    model = model_of(config.model)
    target, recording = target_of(config, model), calibrate(config, model)
    with torch.enable_grad():
        recipe, _ = fitted(config, target, recording, config.bits)
    assert recipe.folded
    found = {}
    for memory in ("resident", "offload"):
        free = None if memory == "resident" else 0
        monkeypatch.setattr(offload, "free_memory", lambda device, free=free: free)
        quantized = build(target, recipe, dtype=torch.float32, device=second, memory="auto")
        assert quantized.memory["memory"] == memory and quant_layers(quantized)
        found[memory] = error_atlas(target, recipe, quantized, recording).noise_LS
    assert (found["resident"] == found["offload"]).all() and found["resident"].any()


def timed(model: LoadedModel, transformer: nn.Module, device: torch.device, memory: str = "auto") -> dict:
    settings = {"kind": "measured", "samples": 1, "repeats": 1, "warmup": 0, "device": device, "memory": memory}
    return measure(model, model.target(), transformer, **settings)


def test_a_model_whose_blocks_are_guests_is_not_timed_and_the_record_says_why(second, model):
    transformer = float_copy(model.target(), dtype=torch.bfloat16, device=second, memory="offload")
    found = timed(model, transformer, second)
    assert found["kind"] == "not timed" and found["latency_ms"] is None and "that of the bus" in found["not_timed"]


def test_a_baseline_that_does_not_fit_beside_is_timed_afterwards_and_one_that_never_fits_not_at_all(
    second, model, monkeypatch
):
    transformer = float_copy(model.target(), dtype=torch.bfloat16, device=second)
    assert "interleaved" in timed(model, transformer, second)["baseline"]
    beside = []

    def free_beside(device: torch.device) -> int | None:
        beside.append(bool(held(transformer, device)))
        return 0 if beside[-1] else None

    monkeypatch.setattr(offload, "free_memory", free_beside)
    found = timed(model, transformer, second)
    assert beside == [True, False], "the second time our model had left"
    assert "afterwards" in found["baseline"] and found["speedup"] > 0 and found["kind"] == "measured"
    assert held(transformer, second), "and it came back"

    monkeypatch.setattr(offload, "free_memory", lambda device: 0)
    found = timed(model, transformer, second)
    assert found["latency_ms"] and found["speedup"] is None and found["baseline"].startswith("none")
