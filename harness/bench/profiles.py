"""Where a step's time goes, ours and other engines' beside each other: every operator's time, by the part of the transformer that it is of.

Profiling slows a call down, so these calls are none of those that are timed. A machine with other work interrupts some of them: of each node the least
time of several calls counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from ditbench.harness.backends.base import known_backends
from ditbench.harness.backends.vnni_extension import LIBRARY
from ditbench.harness.build.build import quant_layers
from ditbench.harness.models.parts import replaced

Profile = dict[tuple[str, str], float]  # of one call: {(part, node): seconds}; their sum is the whole call

QUANTIZED, FLOAT = "products of quantized layers", "products in float"
ATTENTION, NORMS, ACTIVATIONS = "attention", "norms, modulation, codes", "activations alone"
GATES, COPIES, REST = "gates, residuals, sums", "copies", "the rest"
PARTS = (QUANTIZED, FLOAT, ATTENTION, NORMS, ACTIVATIONS, GATES, COPIES, REST)
BETWEEN = "between the operators"  # a node of REST

PRODUCT = "integer product"  # as backends name it (`OPERATORS`)
UNPACK = "unpack weights"
OURS = {f"{LIBRARY}::{name}": part for name, part in {
    "attention": ATTENTION, "normed": NORMS, "gated": GATES, "few_rows": FLOAT, "dequantize": QUANTIZED,
}.items()}  # fmt: skip
OF_TORCH = {f"aten::{name}": part for part, names in {
    FLOAT: ("linear", "addmm", "mm", "bmm", "matmul", "conv2d", "conv3d", "convolution"),
    ATTENTION: ("scaled_dot_product_attention",),
    NORMS: ("layer_norm", "rms_norm", "native_layer_norm"),
    ACTIVATIONS: ("gelu", "silu", "softmax", "relu", "sigmoid", "tanh"),
    GATES: ("add", "add_", "mul", "mul_", "sub", "div"),
    COPIES: ("to", "contiguous", "clone", "copy_", "cat", "stack", "reshape", "float"),
}.items() for name in names}  # fmt: skip
LABEL, STEP = "layer ", "step"


def profiled(model: nn.Module, inputs: dict[str, Any]) -> Profile:
    """One eager call on the CPU. Nodes: of products, the layer; of all else, the operator."""
    quantized = set(quant_layers(model))
    parts = _parts_of_operators()
    layers = {name: each for name, each in model.named_modules() if name in quantized or isinstance(each, KINDS)}
    with ExitStack() as stack:
        for name, layer in layers.items():
            if not any(name.startswith(f"{outer}.") for outer in quantized):
                stack.enter_context(replaced(layer, "forward", _labelled(name)))
        trace = stack.enter_context(profile(activities=[ProfilerActivity.CPU]))
        with torch.no_grad(), record_function(STEP):
            model(**inputs)
    (step,) = (event for event in trace.events() if event.name == STEP)
    found: Profile = defaultdict(float)

    def walk(event: Any, layer: str) -> None:
        for child in event.cpu_children:
            name, part = child.name, parts.get(child.name)
            if part is None:
                walk(child, name.removeprefix(LABEL) if name.startswith(LABEL) else layer)
                continue
            if layer in quantized and name in OF_TORCH:
                part = QUANTIZED  # its scale, bias or low rank, of a backend that leaves them to torch
            node = layer if layer and part in (QUANTIZED, FLOAT) else name
            found[part, node] += 1e-6 * child.cpu_time_total

    walk(step, "")
    found[REST, BETWEEN] = 1e-6 * step.cpu_time_total - sum(found.values())
    return dict(found)


KINDS = (nn.Linear, nn.Conv2d, nn.Conv3d)


def _labelled(name: str) -> Callable[..., Any]:
    def call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with record_function(f"{LABEL}{name}"):
            return forward(*args, **kwargs)

    return call


def _parts_of_operators() -> dict[str, str]:
    """{name of an operator in a profile: part}. What makes codes is of the norms, which may make them."""
    found = OF_TORCH | OURS
    for backend in known_backends().values():
        told: Mapping[str, str] = getattr(backend, "OPERATORS", {})
        found |= {name: QUANTIZED if does in (PRODUCT, UNPACK) else NORMS for name, does in told.items()}
    return found


def within_block(layer: str, blocks: Sequence[str]) -> str:
    """ "transformer_blocks.3.attn.to_q" → "attn.to_q": the same place of all blocks is one node."""
    return next((layer[len(block) + 1 :] for block in blocks if layer.startswith(f"{block}.")), layer)


def least(calls: Sequence[Profile], blocks: Sequence[str]) -> dict[str, dict[str, float]]:
    """→ {part: {node: milliseconds}}: the least of each, the same layer of all blocks together; largest first."""
    spent: dict[tuple[str, str], float] = defaultdict(float)
    for part, node in dict.fromkeys(key for call in calls for key in call):
        spent[part, within_block(node, blocks)] += 1e3 * min(call.get((part, node), 0.0) for call in calls)
    ordered = sorted(spent.items(), key=lambda item: -item[1])
    found = {part: {node: ms for (each, node), ms in ordered if each == part} for part in PARTS}
    return {part: nodes for part, nodes in found.items() if nodes}
