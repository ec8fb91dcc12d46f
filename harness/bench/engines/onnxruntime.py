"""onnxruntime on the CPU: int8 weights per channel and dynamic int8 activations per tensor of the same layers, the rest float32."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditbench.harness.bench.engines.base import GRAPH, Rival, Work, lacks, not_on_the_cpu
from ditbench.harness.build.build import float_copy
from ditbench.harness.build.flat_calls import FlatCall, leaves
from ditbench.harness.build.openvino_export import expressible
from ditbench.harness.common.errors import UserError

NAME = "onnxruntime"
OPSET = 18
PRODUCTS = ("MatMul", "Gemm")


def unavailable(device: torch.device) -> str | None:
    return not_on_the_cpu(device) or lacks(("onnxruntime", "onnx"), "'ditbench[onnxruntime]'")


def rivals(work: Work) -> Iterator[Rival]:
    from onnxruntime import InferenceSession, SessionOptions
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        plain, int8 = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        exported(work, plain)
        quantize_dynamic(
            *(plain, int8),
            nodes_to_quantize=products_of(plain, work.layers),
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
            op_types_to_quantize=list(PRODUCTS),
        )
        options = SessionOptions()
        options.intra_op_num_threads = work.threads
        options.add_session_config_entry(
            "session.force_spinning_stop", "1"
        )  # whose turn it is has the cores for itself
        session = InferenceSession(int8, options, providers=["CPUExecutionProvider"])
    names = {each.name for each in session.get_inputs()}

    def call(arguments: dict[str, Any]) -> Tensor:
        given = {name: each.float() if each.is_floating_point() else each for name, each in leaves(arguments)}
        fed = {name: each.numpy() for name, each in given.items() if name in names}
        return torch.from_numpy(session.run(None, fed)[0])

    yield Rival("onnxruntime dynamic int8, rest float32", GRAPH, call)


@torch.no_grad()
def exported(work: Work, path: Path) -> None:
    """The float transformer as ONNX, inputs by the names of its arguments."""
    model = float_copy(work.target, dtype=torch.float32)
    expressible(model)
    first, second = (dict(leaves(example)) for example in work.examples)
    differ = {
        name: {axis: f"{name}_{axis}" for axis, size in enumerate(each.shape) if size != second[name].shape[axis]}
        for name, each in first.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, of every Python number; and that there is another exporter
        torch.onnx.export(
            FlatCall(model, work.examples[0], list(first)),
            tuple(first.values()),
            path,
            input_names=list(first),
            dynamic_axes=differ,
            opset_version=OPSET,
            dynamo=False,  # the other one names no node by the layer that it is of
        )


def products_of(path: Path, layers: tuple[str, ...]) -> list[str]:
    """The nodes that multiply by the weights of the layers.

    Raises:
        UserError: a layer has none.
    """
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    found = {layer_of(node.name): node.name for node in graph.node if node.op_type in PRODUCTS}
    lost = [name for name in layers if name not in found]
    if lost:
        raise UserError(
            f"onnxruntime: {len(lost)} of {len(layers)} layers have no product in the ONNX graph, {lost[0]}"
        )
    return [found[name] for name in layers]


def layer_of(node: str) -> str:
    """ "/model/blocks.0/attn/to_out.0/MatMul" → "blocks.0.attn.to_out.0"."""
    return ".".join(node.split("/")[2:-1])
