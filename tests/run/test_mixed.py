"""bits=mixed through the command line: the budget is kept, one candidate is the uniform run, an export draws the same."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from ditbench.harness.backends import onednn_int8
from ditbench.harness.build.export import RECIPE, TENSORS
from ditbench.harness.cli import main
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting import mixed_precision
from ditbench.harness.quant.spec import Bits, MixedBits, QuantSpec, bits_of
from ditbench.harness.records.drawn_samples import samples_of
from ditbench.harness.records.record import read
from ditbench.harness.stages.config import parse
from ditbench.harness.stages.loaded import model_of
from ditbench.methods import dvd_quant, rtn


@pytest.fixture(scope="module")
def mixed_run(tmp_path_factory, tiny):
    """mixed_run(overrides…) → (record, images): in one folder, so that calibration and sensitivities are made once."""
    folder = tmp_path_factory.mktemp("mixed")

    def do(*arguments: str):
        name = f"name=run{len(list(folder.glob('runs/*')))}"
        assert main(["run", *tiny, f"results_dir={folder}", name, "generate.noise_floor_seeds=0", *arguments]) == 0
        home = next(folder.glob(f"runs/{name.removeprefix('name=')}/*/record.json"))
        return json.loads(home.read_text()), samples_of(read(home)).latents[:].numpy(), home.parent

    return do


@pytest.fixture(scope="module")
def by_budget(mixed_run):
    return {bits: mixed_run("bits=mixed", f"bits.budget.average_weight_bits={bits}") for bits in (5.2, 6.5, 9)}


def test_the_budget_is_kept_and_more_of_it_means_less_error(by_budget):
    errors = []
    for budget, (record, _, _) in by_budget.items():
        bits = record["bits"]
        assert bits["weight_bits_quantized_layers"] <= budget
        assert bits["label"] == f"mixed-{bits['weight_bits_quantized_layers']:.1f}"
        reached = bits["mixed"]["predicted"]["average_weight_bits"]
        assert reached == pytest.approx(bits["weight_bits_quantized_layers"])
        errors.append(bits["mixed"]["predicted_error"])
    assert errors[0] > errors[1] > errors[2]
    assert set(by_budget[6.5][0]["bits"]["mixed"]["plan"].values()) > {"w8a8"}
    assert set(by_budget[9][0]["bits"]["mixed"]["plan"].values()) == {"w8a8"}


def test_layers_have_the_widths_of_their_plan(by_budget):
    record, _, _ = by_budget[6.5]
    for name, label in record["bits"]["mixed"]["plan"].items():
        layer = record["layers"][name]
        assert f"w{layer['weight_bits']}a{layer['act_bits']}" == label
    widths = {name: layer["act_bits"] for name, layer in record["layers"].items()}
    for name, width in widths.items():
        if name.endswith("to_q"):
            assert width == widths[name.replace("to_q", "to_k")] == widths[name.replace("to_q", "to_v")]


@pytest.mark.parametrize("label", ["w4a8", "fp8"])
def test_one_candidate_is_the_uniform_run_bit_for_bit(mixed_run, label):
    _, uniform, _ = mixed_run(f"bits={label}", "method=smoothquant")
    _, mixed, _ = mixed_run(
        "bits=mixed", f"bits.candidates=[{label}]", "bits.budget.average_weight_bits=9", "method=smoothquant"
    )
    assert np.array_equal(uniform, mixed)


def test_fp8_is_one_candidate_among_integers(mixed_run):
    """Of the same size as w8a8, so that the budget takes it wherever its measured error is less than that of w4a8."""
    record, _, _ = mixed_run("bits=mixed", "bits.candidates=[w4a8,fp8]", "bits.budget.average_weight_bits=6.5")
    plan = record["bits"]["mixed"]["plan"]
    assert set(plan.values()) == {"w4a8", "fp8"}
    assert {name for name, layer in record["layers"].items() if layer["weight_bits"] == 8} == {
        name for name, label in plan.items() if label == "fp8"
    }


def test_formats_in_blocks_are_candidates(mixed_run):
    """Scales count: 4.5 bits a weight of one, 8.25 of the other, and what little the tensor's own scale takes."""
    record, _, _ = mixed_run("bits=mixed", "bits.candidates=[nvfp4,mxfp8]", "bits.budget.average_weight_bits=6.5")
    assert set(record["bits"]["mixed"]["plan"].values()) == {"nvfp4", "mxfp8"}
    assert {layer["label"] for layer in record["layers"].values()} == {"NVFP4", "MXFP8"}
    assert 4.5 < record["bits"]["weight_bits_quantized_layers"] <= 6.5
    assert record["bits"]["weight_format"] == (
        "e2m1 blocks of 1 × 16, scales in e4m3 (divide) and one float32 of the tensor; e4m3 blocks of 1 × 32, scales in e8m0 (rceil)"
    )


def test_sixteen_bits_alone_are_the_float_model(mixed_run):
    """In float32, where nothing else is rounded."""
    plain = ("generate.dtype=float32", "metrics=fidelity")
    _, float_model, _ = mixed_run("method=fp", *plain)
    record, mixed, _ = mixed_run(
        "bits=mixed", "bits.candidates=[w16a16]", "bits.budget.average_weight_bits=16.1", *plain
    )
    assert np.abs(mixed - float_model).max() < 1e-4
    assert record["bits"]["mixed"]["predicted_error"] == 0


def test_a_budget_of_bytes_is_one_of_the_records_model_bytes(mixed_run, by_budget):
    limit = by_budget[6.5][0]["efficiency"]["model_bytes"]
    record, _, _ = mixed_run("bits=mixed", f"bits.budget.bytes={limit}")
    assert record["efficiency"]["model_bytes"] <= limit
    assert record["bits"]["mixed"]["predicted"]["bytes"] == record["efficiency"]["model_bytes"]


def test_a_mixed_run_is_exported_by_its_plan(by_budget, tmp_path):
    record, _, folder = by_budget[6.5]
    assert main(["export", str(folder), "--out", str(tmp_path / "export")]) == 0
    described = json.loads((tmp_path / "export" / RECIPE).read_text())
    assert described["bits"] == record["bits"]
    assert described["tensors"]["bytes"] == record["efficiency"]["model_bytes"]
    assert (tmp_path / "export" / TENSORS).exists()


@pytest.fixture(scope="module")
def by_range(mixed_run):
    return mixed_run(
        "bits=mixed", "bits.ranges=2", "bits.candidates=[w4a4,w4a8,w8a8]", "bits.budget.average_act_bits=6"
    )


def test_a_plan_by_ranges_is_recorded_with_its_steps_and_has_less_error(by_range):
    record, _, _ = by_range
    plan = record["bits"]["mixed"]
    assert plan["ranges"] == [[0, 0], [1, 1]]
    assert 5.5 < plan["predicted"]["average_act_bits"] <= 6
    assert 0 < plan["predicted_error"] < plan["predicted_error_of_one_range"]
    assert {len(labels) for labels in plan["plan"].values()} == {2}
    assert any(first != second for first, second in plan["plan"].values())
    for name, labels in plan["plan"].items():
        assert record["layers"][name]["act_bits"] == sum(int(label[-1]) for label in labels) / 2


def test_activation_bits_are_weighted_with_multiplications_and_steps(by_range):
    record, _, _ = by_range
    model = model_of(parse(record["config"]).model)
    macs, plan = model.macs, record["bits"]["mixed"]
    total = sum(macs[name] * (int(first[-1]) + int(second[-1])) / 2 for name, (first, second) in plan["plan"].items())
    expected = total / sum(macs[name] for name in plan["plan"])
    assert plan["predicted"]["average_act_bits"] == pytest.approx(expected, rel=1e-9)


def test_layers_that_a_recipe_leaves_out_have_sixteen_activation_bits(small_model, small_target):
    bits = Bits(QuantSpec(4, "per_channel"), QuantSpec(4, "per_token", dynamic=True))
    first, second, *others = small_target.layers
    whole = rtn.apply(small_target, {}, bits, rtn.Params())
    recipes = [replace(whole, layers={n: whole.layers[n] for n in names}) for names in (others, [second, *others])]
    units = [(name,) for name in (second, *others)]
    costs, rest = mixed_precision.COSTS["average_act_bits"](
        None, small_model, small_target, recipes, ["a", "b"], units, np.ones(1)
    )
    macs = small_model.macs
    for candidate, in_float in enumerate([(first, second), (first,)]):
        expected = [16 if name in in_float else 4 for name in small_target.layers]
        weights = [macs[name] for name in small_target.layers]
        found = costs.of(np.full((1, len(units)), candidate)) + rest
        assert found == pytest.approx(np.average(expected, weights=weights))


def test_recipes_that_change_with_the_steps_by_themselves_are_refused(small_model, small_target, small_calibration):
    """A plan says which candidate a layer takes, and would have kept the first range's of each."""
    params = dvd_quant.Params(delta=1e-6)

    def fit(bits: Bits):
        state = dvd_quant.fit(small_target, small_calibration, bits, params)
        return dvd_quant.apply(small_target, state, bits, params), state

    bits = MixedBits((bits_of("w4a4"), bits_of("w8a8")), "bytes", 1e9)
    with pytest.raises(UserError, match="change with the steps by themselves .* set method.delta=null"):
        mixed_precision.quantize(bits, small_model, small_target, small_calibration, fit, made_by={}, timing=None)


def test_errors_of_ranges_are_weighted_with_their_steps(by_range, by_budget):
    """Two steps, both looked at: their sum is what one range of both has."""
    ours, theirs = (record["bits"]["mixed"]["uniform_errors"] for record, _, _ in (by_range, by_budget[9]))
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_a_run_by_ranges_is_exported_by_its_plan(by_range, tmp_path):
    record, _, folder = by_range
    assert main(["export", str(folder), "--out", str(tmp_path / "export")]) == 0
    described = json.loads((tmp_path / "export" / RECIPE).read_text())
    assert described["starts"] == [0, 1]
    assert described["bits"] == record["bits"]
    assert described["tensors"]["bytes"] == record["efficiency"]["model_bytes"]
    changing = {name for name, (first, second) in record["bits"]["mixed"]["plan"].items() if first != second}
    assert {name for name, parts in described["layers"].items() if "variants" in parts} == changing


def test_one_range_is_recorded_as_ever(by_budget):
    for record, _, _ in by_budget.values():
        assert set(record["bits"]["mixed"]) == {
            *("candidates", "budget", "predicted", "predicted_error", "uniform_errors", "plan"),
        }
        assert set(map(type, record["bits"]["mixed"]["plan"].values())) == {str}


REFUSED = {
    "no budget": (["method=rtn"], "bits=mixed takes one budget .* got 0"),
    "two": (["bits.budget.bytes=9", "bits.budget.latency_ms=9"], "got 2"),
    "nothing": (["bits.budget.bytes=-1"], "bits.budget.bytes must be a number above 0, got -1"),
    "no format": (["bits.candidates=[w9a9]", "bits.budget.bytes=9"], "weights cannot have 9 bits"),
    "no range": (["bits.ranges=0", "bits.budget.bytes=9"], "bits.ranges must be .* from 1 to protocol.steps=2, got 0"),
    "more ranges than steps": (["bits.ranges=3", "bits.budget.bytes=9"], "protocol.steps=2, got 3"),
    "half a range": (["bits.ranges=1.5", "bits.budget.bytes=9"], "bits.ranges must be a whole number .* got 1.5"),
    "the same twice": (["bits.candidates=[w4a8,w4a8]", "bits.budget.bytes=9"], "a list of different formats"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_budget_or_no_candidate_is_refused(run, capsys, case):
    import re

    arguments, words = REFUSED[case]
    assert run("bits=mixed", *arguments) == 2
    assert re.search(words, capsys.readouterr().err)


FAILED = {
    "too little": (["bits.budget.average_weight_bits=2"], "bits.budget is too small: these candidates take"),
    "simulated": (
        ["bits.budget.latency_ms=1e9", "bits.candidates=[fp8,w8a8]"],
        "as fp8 is simulated on this device .backend simulate., so its latency is not known",
    ),
    "corrected": (["bits.budget.average_weight_bits=9", "method=ptqd"], "ptqd corrects the sampler"),
}


@pytest.mark.parametrize("case", FAILED)
def test_what_no_plan_can_keep_fails_with_its_reason(run, tmp_path, case):
    import re

    arguments, words = FAILED[case]
    assert run("bits=mixed", *arguments) == 3
    (path,) = tmp_path.glob("runs/*/*/record.json")
    assert re.search(words, json.loads(path.read_text())["error"])


def test_a_budget_of_latency_takes_the_formats_that_run_here(run, read_records, tmp_path):
    """With all the time in the world the plan is the float model, whose error is nothing."""
    if "VNNI" in str(onednn_int8.cpu_lacks()):
        pytest.skip("no integer kernel on this machine")
    assert run("bits=mixed", "bits.candidates=[w8a8,w16a16]", "bits.budget.latency_ms=1e6") == 0
    (record,) = read_records(tmp_path).values()
    assert set(record["bits"]["mixed"]["plan"].values()) == {"w16a16"}
    assert 0 < record["bits"]["mixed"]["predicted"]["latency_ms"] < 1e6
