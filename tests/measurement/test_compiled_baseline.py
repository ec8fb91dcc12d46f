"""`measure.compile=true`: compiled blocks are compared with compiled bf16, eager ones with eager, and the record says which is which."""

from __future__ import annotations

import copy

import pytest
import torch

from ditbench.harness.build.build import float_copy
from ditbench.harness.build.compiled import compiled
from ditbench.harness.measurement import latency
from ditbench.harness.stages.config import parse
from ditbench.harness.sweep.compose import composed

CPU = torch.device("cpu")


@pytest.fixture
def measured(small_model, small_target, monkeypatch):
    """measured(compile, how) → (the record's fields, what was timed in a turn). how: in the place of torch's compiler."""

    def call(compile, how=lambda model, names: copy.deepcopy(model)):
        monkeypatch.setattr(latency, "compiled", how)
        turns = []
        real = latency._mean_call
        monkeypatch.setattr(latency, "_mean_call", lambda model, *rest: turns.append(id(model)) or real(model, *rest))
        ours = float_copy(small_target, dtype=torch.bfloat16)
        settings = {"kind": "measured", "samples": 1, "repeats": 2, "warmup": 0, "device": CPU, "compile": compile}
        return latency.measure(small_model, small_target, ours, **settings), turns

    return call


def test_compiled_and_eager_models_take_turns_and_each_is_compared_with_its_like(measured):
    found, turns = measured(compile=True)
    assert len(set(turns[:4])) == 4 and turns[:4] == turns[4:]
    for prefix in ("", "compiled_"):
        ours, theirs = (found[f"{prefix}{name}"]["median"] for name in ("latency_ms", "baseline_latency_ms"))
        assert found[f"{prefix}speedup"] == theirs / ours
    assert "eager" in found["baseline"] and "blocks compiled" in found["compiled_baseline"]


def test_nothing_is_compiled_or_said_of_it_unless_asked(measured):
    def never(model, names):
        raise AssertionError("compiled")

    found, turns = measured(compile=False, how=never)
    assert len(set(turns)) == 2 and not [name for name in found if name.startswith("compiled")]


def test_a_compiler_that_gives_up_costs_the_comparison_and_not_the_run(measured):
    def broken(model, names):
        made = copy.deepcopy(model)
        made.forward = lambda **inputs: (_ for _ in ()).throw(RuntimeError("no C++ here"))
        return made

    found, turns = measured(compile=True, how=broken)
    assert found["speedup"] and found["compiled_speedup"] is None and len(set(turns)) == 2
    assert found["compiled_baseline"].startswith("none: torch cannot compile it here (RuntimeError")
    assert "no C++ here" in found["compiled_baseline"]


def test_a_compiled_copy_holds_the_same_tensors_and_leaves_the_model_eager(small_target, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **settings: asked.append(self))
    model = float_copy(small_target, dtype=torch.bfloat16)
    copied = compiled(model, small_target.blocks)
    assert asked == [copied.get_submodule(name) for name in small_target.blocks]
    assert all(a is b for a, b in zip(model.parameters(), copied.parameters(), strict=True))


def test_a_configuration_from_before_the_setting_still_parses():
    (raw,) = composed([["model=tiny-dit"]])
    assert parse(raw).section("measure")["compile"] is False
    (old,) = composed([["model=tiny-dit"]])
    del old["measure"]["compile"]
    assert parse(old).section("measure")["compile"] is False
