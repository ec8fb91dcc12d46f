"""Other libraries in a benchmark: each in its own process, taking turns; what fails costs its own rows. No library is needed."""

from __future__ import annotations

import json
import math
import multiprocessing
from types import SimpleNamespace

import pytest
import torch

from ditbench.harness.bench import workers as bench_workers
from ditbench.harness.bench.benchmark import baseline_of
from ditbench.harness.bench.engines import base, gemlite, onnxruntime, openvino
from ditbench.harness.bench.engines.base import GRAPH, Rival, known_engines
from ditbench.harness.bench.show import shown
from ditbench.harness.bench.workers import Job, Remote, answer, workers
from ditbench.harness.common.extras import installed
from ditbench.harness.measurement.timing import in_turns

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = ("model=tiny-dit", "protocol.steps=2", "calibration.n=2", "tracker=none")
SHORT = ("--formats", "w8a8", "--modes", "eager", "--repeats", "1")


class Pipe:
    """The other end answers at once, by a function; order: of what was asked."""

    def __init__(self, answers, order=None):
        self.answers, self.order, self.asked = answers, [] if order is None else order, None

    def send(self, asked):
        self.asked = asked
        self.order.append(asked[0] if asked else "end")

    def recv(self):
        return self.answers(self.asked)


def remote(answers, order=None, name="theirs"):
    return Remote(name, GRAPH, "engine", None, 0, Pipe(answers, order))


def test_every_file_of_the_folder_is_an_engine_and_says_its_name():
    engines = known_engines()
    assert set(engines) == {"gemlite", "onnxruntime", "openvino", "torchao"}
    assert all(name == engine.NAME for name, engine in engines.items())


@pytest.mark.parametrize("engine", [openvino, onnxruntime])
def test_an_engine_that_is_not_installed_says_what_to_install_and_one_of_the_cpu_that_it_is(engine, monkeypatch):
    monkeypatch.setattr(base, "installed", lambda package: False)
    assert f"pip install 'ditbench[{engine.NAME}]'" in engine.unavailable(CPU)
    assert engine.unavailable(CUDA) == "it runs on the CPU, the device is cuda"
    monkeypatch.setattr(base, "installed", lambda package: True)
    assert engine.unavailable(CPU) is None


def test_gemlite_says_that_it_needs_cuda_before_anything_else():
    assert "gemlite runs on CUDA, the device is cpu" in gemlite.unavailable(CPU)


def test_engines_take_turns_with_ours_and_time_themselves():
    order = []
    theirs = remote(lambda asked: (True, 0.25), order)
    calls = {"ours": lambda: order.append("ours") or 0.5, "theirs": lambda: theirs.seconds(2)}
    times = in_turns(calls, repeats=2, warmup=1, title="bench")
    assert order == ["ours", "seconds"] * 3
    assert times == {"ours": [500.0, 500.0], "theirs": [250.0, 250.0]}


def test_an_engine_that_fails_once_is_asked_no_more_and_says_why():
    order = []
    theirs = remote(lambda asked: (False, "RuntimeError in its.py:3: no"), order)
    assert theirs.output(2) is None and math.isnan(theirs.seconds(2)) and theirs.why == "RuntimeError in its.py:3: no"
    assert order == ["output"]


def test_a_process_that_dies_is_said_to_have_ended():
    def dies(asked):
        raise EOFError

    theirs = remote(dies)
    assert theirs.output(2) is None and theirs.why == "its process ended"


def test_a_process_answers_with_the_prediction_or_the_seconds_or_what_went_wrong():
    def fails(arguments):
        raise RuntimeError("no room")

    rivals = [Rival("a", GRAPH, lambda arguments: arguments["x"] * 2), Rival("b", GRAPH, fails)]

    def inputs(batch):
        return {"x": torch.ones(batch, 3, dtype=torch.bfloat16)}

    well, found = answer(("output", 0, 2), inputs, CPU, rivals)
    assert well and found.tolist() == [[2.0] * 3] * 2
    well, seconds = answer(("seconds", 0, 2), inputs, CPU, rivals)
    assert well and seconds > 0
    well, why = answer(("seconds", 1, 2), inputs, CPU, rivals)
    assert not well and "RuntimeError" in why and "no room" in why


def test_an_engine_that_is_not_there_starts_no_process(monkeypatch):
    monkeypatch.setattr(bench_workers, "serve", None)  # would fail in the process
    absent = SimpleNamespace(unavailable=lambda device: "absent not installed; pip install absent")
    monkeypatch.setattr(bench_workers, "known_engines", lambda: {"absent": absent})
    refused = {}
    with workers([Job("absent", {}, (), ("eager",), 1)], CPU, refused) as remotes:
        assert remotes == []
    assert refused == {"absent": "absent not installed; pip install absent"}


def test_a_process_that_cannot_make_its_models_costs_its_rows_and_ends(monkeypatch):
    """A configuration that no process can read: the reason comes back, and nothing of it is left."""
    there = SimpleNamespace(unavailable=lambda device: None)
    monkeypatch.setattr(bench_workers, "known_engines", lambda: {"openvino": there})
    refused: dict[str, str] = {}
    with workers([Job("openvino", {}, (), ("eager",), 1)], CPU, refused) as remotes:
        assert remotes == []
    assert list(refused) == ["openvino"] and refused["openvino"] != ""
    assert multiprocessing.active_children() == []


def test_a_graph_is_compared_with_eager_bf16_and_all_else_with_its_own_mode():
    assert baseline_of("compiled", ("eager", "compiled")) == "compiled"
    assert baseline_of(GRAPH, ("eager", "compiled")) == "eager"
    assert baseline_of(GRAPH, ("compiled",)) == "compiled"


def test_the_table_says_the_error_and_which_bf16_a_speed_up_is_against():
    row = {
        "format": "OpenVINO INT8",
        "mode": GRAPH,
        "backend": "openvino",
        "rows": 2,
        "held_bytes": None,
        "peak_bytes": None,
    }
    row |= {
        "latency_ms": {"median": 10.0, "p10": 9.0, "p90": 11.0},
        "baseline": "bf16 eager",
        "speedup": 2.0,
        "error": 0.0213,
    }
    record = {"model": "m", "method": "rtn", "env": {"device": "d", "packages": {"torch": "2"}}, "rows": [row]}
    text = shown(record | {"refused": {"gemlite": "absent"}, "shares": {}, "components": {}, "roofline": {}})
    assert "2.00× eager" in text and "0.0213" in text and "gemlite did not run: absent" in text


def test_an_unknown_engine_is_refused_with_those_that_are_known(ditbench):
    outcome = ditbench("bench", "model=tiny-dit", "--others", "openvino,tensorrt")
    assert outcome.code == 2 and "no engine 'tensorrt'" in outcome.err and "onnxruntime" in outcome.err


def test_a_layer_is_found_by_the_place_of_its_node():
    assert (
        onnxruntime.layer_of("/model/transformer_blocks.0/attn1/to_out.0/MatMul")
        == "transformer_blocks.0.attn1.to_out.0"
    )


def test_ranges_hold_zero_and_both_ends_of_all_calls():
    layer = torch.nn.Linear(2, 1)
    seen = openvino.Ranges(layer)
    layer(torch.tensor([[1.0, 3.0]]))
    assert (float(seen.low), float(seen.high)) == (0.0, 3.0)
    layer(torch.tensor([[-2.0, 1.0]]))
    assert (float(seen.low), float(seen.high)) == (-2.0, 3.0)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_an_engine_that_is_there_has_rows_with_their_error(ditbench, tmp_path, engine):
    packages = {"openvino": ["openvino"], "onnxruntime": ["onnxruntime", "onnx"]}[engine]
    if missing := [package for package in packages if not installed(package)]:
        pytest.skip(f"{', '.join(missing)} not installed: the extra ditbench[{engine}]")
    outcome = ditbench("bench", *SMALL, f"results_dir={tmp_path}", *SHORT, "--others", engine)
    assert outcome.code == 0
    record = json.loads(next(tmp_path.glob("bench/*.json")).read_text())
    assert record["refused"] == {}
    theirs = [row for row in record["rows"] if row["backend"] == engine]
    (bf16,) = (row for row in record["rows"] if row["format"] == "bf16")
    assert len(theirs) == {"openvino": 3, "onnxruntime": 1}[engine]
    for row in theirs:
        assert row["mode"] == GRAPH and row["baseline"] == "bf16 eager" and 0 < row["error"] < 0.05
        assert row["speedup"] == bf16["latency_ms"]["median"] / row["latency_ms"]["median"]
