"""A model's call recorded once and played back: the same operators in the same order, and none of the modules' Python between them.

On a CPU the operators are recorded by torch.fx, and give the same bits. On CUDA it is a CUDA graph, captured after a warm-up; **that has not
run on a device yet**. What is no tensor is part of a recording, and so are shapes and the range of denoising steps: a call that differs in
them is recorded anew. The step itself, and weights that are changed in place, are read at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ditbench.harness.build.flat_calls import output_of
from ditbench.harness.quant.steps import StepClock

WARM_UP = 3  # calls before a capture: kernels are compiled and tiles are chosen in them
Recording = Callable[..., Tensor]  # of the tensors among the arguments


class Graphed(nn.Module):
    """Called as the model is, without gradients; returns its prediction.

    Raises what recording does: an operator that needs the value of a tensor cannot be recorded.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._clock: StepClock | None = getattr(model, "clock", None)  # models of others have none
        self._recordings: dict[Any, Recording] = {}

    @torch.no_grad()
    def forward(self, **arguments: Any) -> Tensor:
        leaves, spec = tree_flatten(arguments)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        steps = None if self._clock is None else self._clock.range
        kind = steps, spec, tuple(_kind(leaf) for leaf in leaves)
        if kind not in self._recordings:
            record = _captured if tensors[0].device.type == "cuda" else _traced
            self._recordings[kind] = record(_of_tensors(self.model, leaves, spec), tensors)
        return self._recordings[kind](*tensors)


def _kind(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _of_tensors(model: nn.Module, leaves: Sequence[Any], spec: TreeSpec) -> Recording:
    """The model's call with its tensors as places."""

    def call(*tensors: Tensor) -> Tensor:
        given = iter(tensors)
        return output_of(model(**tree_unflatten([next(given) if isinstance(x, Tensor) else x for x in leaves], spec)))

    return call


def _traced(call: Recording, tensors: Sequence[Tensor]) -> Recording:
    """Weights become arguments: looking them up in a module, one by one, takes a hundredth of a call."""
    from torch.fx.experimental.proxy_tensor import make_fx  # seconds

    traced = make_fx(call, tracing_mode="real")(*tensors)
    first = next(iter(traced.graph.nodes))
    held: list[Tensor] = []
    places: dict[Any, Node] = {}
    for node in traced.graph.find_nodes(op="get_attr"):
        if node.target not in places:
            with traced.graph.inserting_before(first):
                places[node.target] = traced.graph.placeholder(f"held_{len(held)}")
            held.append(getattr(traced, node.target))
        node.replace_all_uses_with(places[node.target])
        traced.graph.erase_node(node)
    traced.recompile()
    return partial(traced.forward, *held)


def _captured(call: Recording, tensors: Sequence[Tensor]) -> Recording:
    places = [tensor.clone() for tensor in tensors]
    graph, output = captured(lambda: call(*places), tensors[0].device)

    def play(*given: Tensor) -> Tensor:
        for place, tensor in zip(places, given, strict=True):
            place.copy_(tensor)
        graph.replay()
        return output.clone()  # type: ignore[no-any-return]  # the next call writes over it

    return play


def captured(call: Callable[[], Any], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Any]:
    """What the call launches on a CUDA device, and what it returned, which every replay writes over."""
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call()
    return graph, output
