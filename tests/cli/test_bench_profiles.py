"""Where the time of a step goes, ours and OpenVINO's: every operator is of one part, and the parts are the whole."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from ditbench.harness.backends import vnni
from ditbench.harness.backends.attention import lacks
from ditbench.harness.bench import profiles
from ditbench.harness.bench.engines.openvino_nodes import Node, Profiler, parts_of
from ditbench.harness.bench.profiles import (
    ATTENTION,
    BETWEEN,
    COPIES,
    FLOAT,
    GATES,
    NORMS,
    QUANTIZED,
    REST,
    least,
    profiled,
    within_block,
)
from ditbench.harness.bench.show import profile_table, shown
from ditbench.harness.bench.workers import answer
from ditbench.harness.build.build import build
from ditbench.harness.common.extras import installed
from ditbench.harness.models.calls import placed
from ditbench.harness.quant.quantizers import ActQuant, quantize_weight
from ditbench.harness.quant.recipe import LayerRecipe, ModelRecipe
from ditbench.harness.quant.spec import QuantSpec

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(lacks() is not None or vnni.cpu_lacks() is not None, reason="no AVX512-BF16 here")
BLOCKS = ("blocks.0", "blocks.1")


def node(name: str, kind: str, *reads: str, fused: tuple[str, ...] = ()) -> Node:
    return Node(name, kind, fused, reads)


GRAPH = [  # of a block with adaLN, as OpenVINO's CPU runs it
    node("x", "Input"),
    node("__module.model.blocks.0.norm1.linear/aten::linear/Add", "FullyConnected", "x"),
    node("modulation", "Split", "__module.model.blocks.0.norm1.linear/aten::linear/Add"),
    node("mvn", "MVN", "x"),
    node("one_and_scale", "Eltwise", "modulation"),
    node("rows", "Reshape", "mvn"),
    node("modulated", "Eltwise", "rows", "one_and_scale", "modulation"),
    node("__module.model.blocks.0.attn.to_q/aten::linear/MatMul", "FullyConnected", "modulated"),
    node(
        "subgraph",
        "Subgraph",
        "__module.model.blocks.0.attn.to_q/aten::linear/MatMul",
        fused=("x/aten::scaled_dot_product_attention/y",),
    ),
    node("transposed", "Transpose", "subgraph", fused=("a/aten::scaled_dot_product_attention/b",)),
    node("codes", "FakeQuantize", "transposed"),
    node("fc", "FullyConnected", "codes", fused=("__module.model.blocks.1.attn.to_out.0/aten::linear/MatMul",)),
    node("gated", "Eltwise", "fc", "modulation", "x"),
    node("next", "MVN", "gated"),
]


def test_the_nodes_of_an_openvino_graph_are_of_the_parts_that_ours_has():
    found = parts_of(GRAPH, ("blocks.0.attn.to_q", "blocks.1.attn.to_out.0"))
    assert found["__module.model.blocks.0.norm1.linear/aten::linear/Add"] == (FLOAT, "blocks.0.norm1.linear")
    assert found["__module.model.blocks.0.attn.to_q/aten::linear/MatMul"] == (QUANTIZED, "blocks.0.attn.to_q")
    assert found["fc"] == (QUANTIZED, "blocks.1.attn.to_out.0"), "of a name that was fused into it"
    assert {name: found[name][0] for name in ("mvn", "one_and_scale", "modulated", "codes", "next")} == dict.fromkeys(
        ("mvn", "one_and_scale", "modulated", "codes", "next"), NORMS
    )
    assert found["gated"][0] == GATES, "though a norm reads it"
    assert found["subgraph"][0] == ATTENTION and found["transposed"][0] == COPIES
    assert found["x"] == (REST, "Input")


def test_one_call_is_the_difference_of_the_sums_that_openvino_s_means_stand_for():
    means = iter([10.0, 6.0, 5.0])  # of one, two and three calls: 10, 2 and 3 s

    class Request:
        def infer(self, given):
            self.mean = next(means)

        @property
        def profiling_info(self):
            return [SimpleNamespace(node_name="fc", node_type="FullyConnected", real_time=SimpleNamespace(total_seconds=lambda: self.mean))]  # fmt: skip

    graph = SimpleNamespace(get_ordered_ops=list)
    compiled = SimpleNamespace(create_infer_request=Request, get_runtime_model=lambda: graph)
    profiler = Profiler(SimpleNamespace(compiled=compiled, given=lambda arguments: {}), ())
    key = (REST, "FullyConnected")
    assert [round(profiler({})[key], 6) for _ in range(2)] == [2.0, 3.0]


def test_the_least_of_each_node_counts_blocks_together_and_the_largest_comes_first():
    calls = [
        {(FLOAT, "blocks.0.a"): 0.001, (FLOAT, "blocks.1.a"): 0.005, (FLOAT, "b"): 0.009},
        {(FLOAT, "blocks.0.a"): 0.002, (FLOAT, "blocks.1.a"): 0.001, (FLOAT, "b"): 0.003, (REST, BETWEEN): 0.001},
    ]
    assert least(calls, BLOCKS) == {FLOAT: {"b": 3.0, "a": 2.0}, REST: {BETWEEN: 0.0}}


def test_a_layer_is_called_by_its_place_in_any_block():
    assert within_block("blocks.1.attn.to_q", BLOCKS) == "attn.to_q"
    assert within_block("blocks.10.attn.to_q", BLOCKS) == "blocks.10.attn.to_q"
    assert within_block("proj_out", BLOCKS) == "proj_out"


@needs_kernels
def test_every_layer_and_kernel_of_ours_is_in_its_part_and_the_parts_are_the_step(small_model, monkeypatch):
    target = small_model.target()
    weight, act = QuantSpec(8, "per_channel"), ActQuant(QuantSpec(8, "per_token", dynamic=True))
    layers = {n: LayerRecipe(weight=quantize_weight(target.weight(n), weight), act=act) for n in target.layers}
    model = build(target, ModelRecipe(layers), dtype=torch.bfloat16)
    inputs = placed(small_model.step_inputs(2), torch.bfloat16, CPU)
    steps = []
    real = profiles.profile

    class Noted(real):
        def __exit__(self, *error):
            super().__exit__(*error)
            steps.extend(1e-6 * event.cpu_time_total for event in self.events() if event.name == profiles.STEP)

    monkeypatch.setattr(profiles, "profile", Noted)
    found = profiled(model, inputs)
    assert sum(found.values()) == pytest.approx(steps[0]) and all(seconds >= 0 for seconds in found.values())
    products = {node for part, node in found if part == QUANTIZED}
    assert products == set(target.layers)
    assert (ATTENTION, "ditbench_vnni::attention") in found and (GATES, "ditbench_vnni::gated") in found
    assert (NORMS, "ditbench_vnni::normed_rows") in found
    assert any(node.endswith("norm1.linear") for part, node in found if part == FLOAT)


def test_a_process_answers_with_a_profile_and_one_without_is_not_asked():
    rival = SimpleNamespace(profile=lambda arguments: {(REST, BETWEEN): float(arguments)})
    assert answer(("profile", 0, 3), lambda batch: batch, CPU, [rival]) == (True, {(REST, BETWEEN): 3.0})


def test_the_table_has_both_sides_of_a_part_and_leaves_out_what_takes_no_time():
    of = {
        "W8A8": {FLOAT: {"norm1.linear": 3.0, "tiny": 0.001}, REST: {BETWEEN: 1.0}},
        "theirs": {FLOAT: {"norm1.linear": 2.0}},
    }
    text = profile_table({"rows": 2, "calls": 5, "of": of})
    (line,) = (line for line in text.splitlines() if "norm1.linear" in line)
    assert line.split() == ["norm1.linear", "3.00", "(75%)", "2.00", "(100%)"]
    assert "tiny" not in text and "least of 5 profiled calls" in text


@pytest.mark.skipif(not installed("openvino"), reason="the extra ditbench[openvino] is not installed")
@needs_kernels
def test_a_benchmark_beside_openvino_says_where_the_time_of_both_goes(ditbench, tmp_path, monkeypatch):
    monkeypatch.setattr("ditbench.harness.bench.benchmark.PROFILED", 2)
    told = ("model=tiny-dit", "protocol.steps=2", "calibration.n=2", "tracker=none", f"results_dir={tmp_path}")
    done = ditbench("bench", *told, "--formats", "w8a8", "--modes", "eager", "--repeats", "1", "--others", "openvino")
    assert done.code == 0
    profile = json.loads(next(tmp_path.glob("bench/*.json")).read_text())["profile"]
    (theirs,) = (label for label in profile["of"] if label.startswith("OpenVINO INT8"))
    ours = profile["of"]["W8A8"]
    assert set(ours[QUANTIZED]) == set(profile["of"][theirs][QUANTIZED])
    assert {QUANTIZED, FLOAT, ATTENTION, NORMS, GATES} <= set(profile["of"][theirs]) & set(ours)
    assert QUANTIZED in done.out and theirs.split(",")[0] in done.out


def test_nodes_are_printed_beside_those_of_others_and_are_in_the_record_either_way():
    row = {
        "mode": "eager",
        "backend": "vnni",
        "rows": 2,
        "latency_ms": {"median": 1.0, "p10": 1.0, "p90": 1.0},
        "speedup": None,
    }
    ours = row | {"format": "W8A8", "error": 0.0, "held_bytes": 1, "peak_bytes": None}
    theirs = ours | {"format": "theirs", "held_bytes": None}
    of = {label: {FLOAT: {"norm1.linear": 3.0}} for label in ("W8A8", "theirs")}
    record = {
        "model": "m",
        "method": "rtn",
        "env": {"device": "CPU", "packages": {"torch": "2"}},
        "refused": {},
        "shares": {},
        "components": {},
        "roofline": {},
    }
    for rows, printed in (([ours], False), ([ours, theirs], True)):
        profile = {"rows": 2, "calls": 5, "of": {each["format"]: of[each["format"]] for each in rows}}
        assert ("norm1.linear" in shown(record | {"rows": rows, "profile": profile})) == printed
