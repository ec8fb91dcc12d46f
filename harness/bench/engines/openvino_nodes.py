"""What OpenVINO says of the time of its own nodes, by the parts that ours has.

A node that others were fused into (GELU or the next quantizer into a product, residual and gate into one sum) is of the part
that it started as; `originalLayersNames` has all.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ditbench.harness.bench.profiles import (
    ACTIVATIONS,
    ATTENTION,
    BETWEEN,
    COPIES,
    FLOAT,
    GATES,
    NORMS,
    QUANTIZED,
    REST,
    Profile,
)
from ditbench.harness.build.openvino_run import Runner

COUNTS = {"PERF_COUNT": True}
PRODUCTS = ("FullyConnected", "MatMul", "Convolution")
NORM = ("MVN", "RMS", "RMSNorm", "GroupNormalization")
OF_KIND = {
    **dict.fromkeys(NORM, NORMS),
    **dict.fromkeys(("FakeQuantize", "Quantize"), NORMS),
    **dict.fromkeys(("Gelu", "Swish", "Softmax", "SoftMax", "Relu", "Tanh", "Sigmoid"), ACTIVATIONS),
    **dict.fromkeys(("Transpose", "Reorder", "Reshape", "Concat", "Split", "VariadicSplit"), COPIES),
    **dict.fromkeys(("StridedSlice", "Slice", "Convert", "Broadcast", "Tile"), COPIES),
}
SUMS = ("Add", "Multiply", "Subtract", "Divide", "PowerStatic", "Eltwise")
PASSES = ("Reorder", "Reshape", "Transpose", "Convert")  # what goes through them is what came
MODULE = re.compile(r"^__module\.model\.(?P<layer>[^/]+)/")  # the transformer is `model` of a `FlatCall`


@dataclass(frozen=True)
class Node:
    """kind: OpenVINO's word for it. fused: names of all that it does. reads: names of nodes."""

    name: str
    kind: str
    fused: tuple[str, ...]
    reads: tuple[str, ...]

    @property
    def layer(self) -> str:
        """The module that it is of, as the transformer names it."""
        found = (MODULE.match(name) for name in (self.name, *self.fused))
        return next((each["layer"] for each in found if each), "")


def parts_of(nodes: Sequence[Node], layers: Sequence[str]) -> dict[str, tuple[str, str]]:
    """{name of a node: (part, how ours calls it)}. layers: those that are quantized."""
    quantized, by_name = set(layers), {node.name: node for node in nodes}

    def comes_from_a_norm(node: Node) -> bool:
        for name in node.reads:
            source = by_name.get(name)
            while source is not None and source.kind in PASSES and source.reads:
                source = by_name.get(source.reads[0])
            if source is not None and (source.kind in NORM or (source.name in modulates)):
                return True
        return False

    modulates: set[str] = set()
    for node in nodes:  # in the order in which they run
        if node.kind in SUMS and comes_from_a_norm(node):
            modulates.add(node.name)
    readers: dict[str, list[Node]] = {}
    for node in nodes:
        for name in node.reads:
            readers.setdefault(name, []).append(node)
    found = {}
    for node in nodes:
        part, called = OF_KIND.get(node.kind, REST), node.kind
        if any("scaled_dot_product_attention" in name for name in (node.name, *node.fused)) and node.kind not in PASSES:
            part = ATTENTION
        elif node.kind in PRODUCTS:
            part = QUANTIZED if node.layer in quantized else FLOAT
            called = node.layer or node.kind
        elif node.kind in SUMS:
            read = readers.get(node.name, [])
            prepares = bool(read) and all(each.name in modulates for each in read)  # 1 + scale
            part = NORMS if node.name in modulates or prepares else GATES
        found[node.name] = part, called
    return found


class Profiler:
    """A model compiled once more, with counters: what is timed has none.

    OpenVINO tells of each node the mean of all calls since it was compiled, in whole microseconds, so that one call is the difference of two
    sums, to as many microseconds as there were calls.
    """

    def __init__(self, run: Runner, layers: Sequence[str]) -> None:
        self.run = run
        self.request = run.compiled.create_infer_request()
        self.parts = parts_of(nodes_of(run.compiled.get_runtime_model()), layers)
        self.calls, self.sums = 0, Counter[tuple[str, str]]()

    def __call__(self, arguments: dict[str, Any]) -> Profile:
        given, before = self.run.given(arguments), self.sums
        if not self.calls:  # the first one lays weights out
            before, _ = self._called(given)
        after, whole = self._called(given)
        found: Profile = {key: after[key] - before[key] for key in after if after[key]}
        return found | {(REST, BETWEEN): whole - sum(found.values())}

    def _called(self, given: dict[str, Any]) -> tuple[Counter[tuple[str, str]], float]:
        """→ ({(part, node): seconds of all calls so far}, seconds of this one)."""
        start = time.perf_counter()
        self.request.infer(given)
        whole = time.perf_counter() - start
        self.calls, self.sums = self.calls + 1, Counter()
        for node in self.request.profiling_info:
            key = self.parts.get(node.node_name, (REST, node.node_type))
            self.sums[key] += self.calls * node.real_time.total_seconds()
        return self.sums, whole


def nodes_of(model: Any) -> list[Node]:
    """Of a compiled model's graph, in the order in which they run."""

    def told(node: Any, name: str) -> str:
        info: Mapping[str, Any] = node.get_rt_info()
        return str(info[name].astype(str)) if name in info else ""

    found = sorted(model.get_ordered_ops(), key=lambda node: int(told(node, "execOrder") or 0))
    return [
        Node(
            node.get_friendly_name(),
            told(node, "layerType"),
            tuple(name for name in told(node, "originalLayersNames").split(",") if name),
            tuple(port.get_node().get_friendly_name() for port in node.input_values()),
        )
        for node in found
    ]
