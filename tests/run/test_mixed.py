"""bits=mixed through the command line: the budget is kept, one candidate is the uniform run, an export draws the same."""

from __future__ import annotations

import json

import numpy as np
import pytest

from harness.backends import onednn_int8
from harness.cli import main
from harness.export import RECIPE, TENSORS


@pytest.fixture(scope="module")
def mixed_run(tmp_path_factory, tiny):
    """mixed_run(overrides…) → (record, images): in one folder, so that calibration and sensitivities are made once."""
    folder = tmp_path_factory.mktemp("mixed")

    def do(*arguments: str):
        name = f"name=run{len(list(folder.glob('runs/*')))}"
        assert main(["run", *tiny, f"results_dir={folder}", name, "generate.noise_floor_seeds=0", *arguments]) == 0
        home = next(folder.glob(f"runs/{name.removeprefix('name=')}/*/record.json"))
        return json.loads(home.read_text()), np.load(home.parent / "images.npz")["latents"], home.parent

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


REFUSED = {
    "no budget": (["method=rtn"], "bits=mixed takes one budget .* got 0"),
    "two": (["bits.budget.bytes=9", "bits.budget.latency_ms=9"], "got 2"),
    "nothing": (["bits.budget.bytes=-1"], "bits.budget.bytes must be a number above 0, got -1"),
    "no format": (["bits.candidates=[w9a9]", "bits.budget.bytes=9"], "weights cannot have 9 bits"),
    "the same twice": (["bits.candidates=[w4a8,w4a8]", "bits.budget.bytes=9"], "a list of different formats"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_budget_or_no_candidate_is_refused(run, capsys, case):
    import re

    arguments, words = REFUSED[case]
    assert run("bits=mixed", *arguments) == 2
    assert re.search(words, capsys.readouterr().err)


FAILED = {
    "too little": (["bits.budget.average_weight_bits=2"], "the least that these candidates can take is"),
    "simulated": (
        ["bits.budget.latency_ms=1e9", "bits.candidates=[w3a3,w8a8]"],
        "as w3a3 is simulated on this device .backend simulate., so its latency is not known",
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
    if "VNNI" in str(onednn_int8._cpu_lacks()):
        pytest.skip("no integer kernel on this machine")
    assert run("bits=mixed", "bits.candidates=[w8a8,w16a16]", "bits.budget.latency_ms=1e6") == 0
    (record,) = read_records(tmp_path).values()
    assert set(record["bits"]["mixed"]["plan"].values()) == {"w16a16"}
    assert 0 < record["bits"]["mixed"]["predicted"]["latency_ms"] < 1e6
