"""A fitted state is an artifact: found by all that made it, checked, and the recipe made of it is the same."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from ditbench.harness.common.artifacts import read_manifest
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import tensors_sha256
from ditbench.harness.common.memory import PeakMemory, peak_memory
from ditbench.harness.common.paths import CONF
from ditbench.harness.fitting import registry
from ditbench.harness.quant.serialize import encode
from ditbench.harness.stages import states
from ditbench.harness.stages.config import parse
from ditbench.harness.stages.loaded import model_of
from ditbench.harness.stages.quantize import calibrate, fit_cost, target_of
from ditbench.harness.sweep import compose
from ditbench.methods import smoothquant

BASE = ("method=smoothquant", "bits=w4a8", "protocol.steps=2", "calibration.n=2", "device=cpu")


@pytest.fixture
def fitted(tmp_path):
    """fitted(overrides…) → (recipe, state, recording), each time as a run of its own does it."""

    def do(*overrides: str, bits=None):
        config = config_of(*overrides, f"cache_dir={tmp_path}")
        model = model_of(config.model)
        recording = calibrate(config, model)
        return *states.fitted(config, target_of(config, model), recording, bits or config.bits), recording

    return do


def config_of(*overrides: str):
    compose.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra_compose("config", overrides=[*BASE, *overrides])
    return parse(OmegaConf.to_container(composed, resolve=True))


def content(recipe) -> str:
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in recipe.layers.items():
        encode(layer, name, tensors)
    return tensors_sha256(tensors)


def count_fits(monkeypatch, method=smoothquant) -> list[int]:
    calls, fit = [], method.fit

    def counted(*arguments):
        calls.append(1)
        return fit(*arguments)

    monkeypatch.setattr(method, "fit", counted)
    return calls


def test_a_state_is_fitted_once_and_its_recipe_is_the_same(fitted, monkeypatch, tmp_path):
    fits = count_fits(monkeypatch)
    recipe, state, recording = fitted()
    again, found, _ = fitted()
    assert len(fits) == 1 and state and tensors_sha256(state) == tensors_sha256(found)
    assert content(recipe) == content(again)
    (folder,) = (tmp_path / "state").iterdir()
    assert read_manifest(folder / "manifest.json")["made_from"] == {"recording": recording.key}


CHANGES = ["method.strength=0.6", "bits=w4a4", "bits.weight.symmetric=false", "seed=1", "protocol.skip=[proj]"]


@pytest.mark.parametrize("override", [*CHANGES, "calibration.n=3", "protocol.scope=all", "model=tiny-dit-stress"])
def test_whatever_makes_a_state_makes_another(fitted, monkeypatch, override):
    fits = count_fits(monkeypatch)
    fitted()
    fitted(override)
    assert len(fits) == 2


def test_the_rows_that_are_chosen_make_another_state(fitted, monkeypatch):
    fits, seen = count_fits(monkeypatch), []
    salient = states.salient
    monkeypatch.setattr(states, "salient", lambda *given: seen.append(given[1:]) or salient(*given))
    _, every, _ = fitted("calibration.keep=1")
    _, few, recording = fitted("calibration.select=salient", "calibration.keep=1")
    _, more, _ = fitted("calibration.select=salient", "calibration.keep=3")
    fitted("calibration.select=salient", "calibration.keep=3")
    assert len(fits) == 3 and seen == [(1, 1), (3, 1)]  # tiny-dit's samples have one channel
    assert len({tensors_sha256(state) for state in (every, few, more)}) == 3
    assert recording.num_rows(0) == 4  # layers are judged on all of them


def test_a_method_that_chooses_itself_is_not_chosen_for(fitted):
    with pytest.raises(
        UserError, match="method ptq4dm chooses itself what it is calibrated on; set calibration.select=all"
    ):
        fitted("method=ptq4dm", "calibration.select=salient")


def test_what_a_state_does_not_depend_on_leaves_it(fitted, monkeypatch):
    fits = count_fits(monkeypatch)
    for override in ("protocol.n=7", "metrics=fidelity", "generate.dtype=float32", "backend=simulate", "name=other"):
        fitted(override)
    assert len(fits) == 1


def test_an_edited_source_of_the_method_makes_another_state(fitted, monkeypatch):
    fits = count_fits(monkeypatch)
    fitted()
    monkeypatch.setattr(registry, "source_sha256", lambda name: "edited")
    fitted()
    assert len(fits) == 2


def test_a_flipped_float_in_a_state_is_named_and_it_is_fitted_again(fitted, tmp_path, capfd):
    recipe, _, _ = fitted()
    file = next((tmp_path / "state").glob("*/state.safetensors"))
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 1
    file.write_bytes(damaged)
    again, _, _ = fitted()
    said = capfd.readouterr().err
    assert str(file) in said and "the state of smoothquant W4A8 is made again" in said
    assert content(recipe) == content(again)


def test_a_method_that_learns_nothing_has_a_state_too(fitted, tmp_path):
    assert fitted("method=rtn")[1] == {} == fitted("method=rtn")[1]
    assert len(list((tmp_path / "state").iterdir())) == 1


def test_entries_that_are_one_tensor_are_kept(fitted, monkeypatch):
    fit = smoothquant.fit

    def doubled(*arguments):
        state = fit(*arguments)
        name, tensor = next(iter(state.items()))
        return state | {"twice": tensor, "turned": torch.ones(2, 3).T}

    monkeypatch.setattr(smoothquant, "fit", doubled)
    _, state, _ = fitted()
    _, found, _ = fitted()
    assert tensors_sha256(state) == tensors_sha256(found)


def test_cost_is_that_of_a_run_that_finds_nothing(fitted):
    """First: statistics and state are made. Second: another state on the same statistics. Third, fourth: each alone, all found."""
    _, _, first = fitted()
    _, _, second = fitted("method.strength=0.6")
    _, _, third = fitted()
    _, _, fourth = fitted("method.strength=0.6")

    def seconds(recording, kind: str) -> float:
        return sum(value for what, value in recording.saved_s.items() if what.startswith(kind))

    assert seconds(first, "") == 0 and seconds(second, "statistics") > 0 == seconds(second, "state")
    assert seconds(third, "state") > 0 == seconds(third, "statistics"), "its own seconds hold the statistics'"
    assert seconds(fourth, "state") > 0 and seconds(fourth, "statistics") == seconds(second, "statistics")


def test_cost_is_told_of_a_state_that_was_fitted_beside_another(fitted, tmp_path):
    """As the candidates of mixed precision are: the second found the statistics that the first had made."""
    config = config_of(f"cache_dir={tmp_path}")
    model = model_of(config.model)
    recording, target = calibrate(config, model), target_of(config, model)
    for bits in (config.bits, config.bits.with_widths(4, 4)):
        states.fitted(config, target, recording, bits)
    assert sum(recording.saved_s.values()) == 0, "this run made all of it"
    _, _, alone = fitted(bits=config.bits.with_widths(4, 4))
    assert sum(value for what, value in alone.saved_s.items() if what.startswith("statistics")) > 0


@pytest.mark.skipif(sys.platform != "linux", reason="process memory is read from /proc")
def test_the_memory_of_a_fit_that_was_found_is_that_of_when_it_was_fitted(fitted, monkeypatch):
    fit, mib = smoothquant.fit, 2**20
    monkeypatch.setattr(smoothquant, "fit", lambda *arguments: (bytearray(300 * mib), fit(*arguments))[1])
    costs = []
    for _ in range(2):
        with peak_memory(torch.device("cpu")) as memory:
            _, _, recording = fitted()
        costs.append(fit_cost({"calibrate": 1.0, "quantize": 1.0}, recording, memory))
    made, found = costs
    assert made["peak_memory_bytes"] > made["memory_before_bytes"] + 200 * mib
    assert memory.peak_bytes < memory.before_bytes + 200 * mib, "the second time nothing is fitted"
    assert found["peak_memory_bytes"] == pytest.approx(made["peak_memory_bytes"], abs=50 * mib)
    assert found["peak_memory_bytes"] > found["memory_before_bytes"] + 200 * mib


@pytest.mark.parametrize("untold", ["here", "of the state"])
def test_no_memory_is_told_where_one_stretch_was_not_measured(fitted, untold):
    fitted()
    recording = fitted()[2]
    here, of_state = PeakMemory(1, 2), PeakMemory(3, 4)
    recording.fits["a state"] = PeakMemory() if untold == "of the state" else of_state
    cost = fit_cost({"calibrate": 1.0, "quantize": 1.0}, recording, PeakMemory() if untold == "here" else here)
    assert cost["peak_memory_bytes"] is None


def test_what_apply_draws_does_not_depend_on_whether_fit_ran(fitted, monkeypatch):
    apply, drawn = smoothquant.apply, []

    def drawing(*arguments):
        drawn.append(float(torch.rand(())))
        return apply(*arguments)

    monkeypatch.setattr(smoothquant, "apply", drawing)
    for seed in (1, 2):
        torch.manual_seed(seed)
        fitted()
    assert drawn[0] == drawn[1]


def test_a_method_that_changes_the_float_model_is_refused_and_leaves_no_other_run_with_it(fitted, monkeypatch):
    fit = smoothquant.fit

    def spoiling(target, *arguments):
        state = fit(target, *arguments)
        target.module(target.layers[0]).weight.data += 1
        return state

    monkeypatch.setattr(smoothquant, "fit", spoiling)
    with pytest.raises(UserError, match="changed the float model"):
        fitted()


def test_the_keys_of_two_recordings_are_two(fitted):
    config, (_, _, recording) = config_of(), fitted()
    target = target_of(config, model_of(config.model))
    keys = {states.key_of(config, target, each, config.bits) for each in (recording, replace(recording, key="other"))}
    assert len(keys) == 2


def test_a_name_to_skip_that_no_layer_has_is_said(capsys):
    model = model_of(config_of().model)
    target_of(config_of("protocol.skip=[to_q]"), model)
    assert "protocol.skip" not in capsys.readouterr().err
    target_of(config_of("protocol.skip=[to_w]"), model)
    assert "protocol.skip=to_w leaves nothing in float" in capsys.readouterr().err
