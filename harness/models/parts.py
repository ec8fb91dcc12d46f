"""What stands around a transformer in its pipeline (text encoders, VAE), on the run's device while it computes.

A pipeline is shared by all runs of a sweep and stays where it was loaded. While one of its parts computes, copies of that part's
weights are on the device; behind the call they are dropped, so that one part at a time is there beside one transformer, and the
next run finds the pipeline as it was. (accelerate's offloading hooks would copy the weights back and leave others in their place.)

What `encode_prompt` gave for the same arguments on the same device is kept in memory, so that a sweep, the float model and
both halves of a run read every batch of prompts once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ditbench.harness.models.calls import PLAIN

COMPUTES = ("forward", "encode", "decode", "generate")  # methods by which pipelines call their parts
KEPT_BYTES = 2 * 2**30  # of encoded prompts per pipeline: 500 of FLUX.1's; what does not fit is encoded again

_encoded: WeakKeyDictionary[Any, dict[str, Any]] = (
    WeakKeyDictionary()
)  # pipeline → {arguments: what encode_prompt gave}


@contextmanager
def running_on(pipe: Any, device: torch.device, **parts: Any) -> Iterator[Any]:
    """The same pipeline around other parts, computing on the device; nothing is copied, and `pipe` is left alone.

    parts: those given, such as transformer=…, have to be on the device already.
    """
    wanted = inspect.signature(type(pipe).__init__).parameters
    settings = {name: pipe.config[name] for name in wanted if name in pipe.config and name not in pipe.components}
    running = _computing_elsewhere(type(pipe))(**{**pipe.components, **settings, **parts})
    running.computes_on = device
    if hasattr(running, "encode_prompt"):
        running.encode_prompt = _kept(running, _encoded.setdefault(pipe, {}), device)
    others = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module) and name not in parts}
    others.pop("transformer", None)
    with ExitStack() as stack:
        for part in others.values() if device.type != "cpu" else ():
            for method in (name for name in COMPUTES if hasattr(part, name)):
                stack.enter_context(replaced(part, method, functools.partial(_called_there, part, device)))
        yield running


def forget_prompts(pipe: Any) -> None:
    """Prompts are encoded anew when they are next asked for."""
    _encoded.pop(pipe, None)


@contextmanager
def placed_on(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the module's parameters and buffers are copies on the device; then they are what they were, where they were."""
    before = [
        (table, name, tensor)
        for each in module.modules()
        for table in (each._parameters, each._buffers)
        for name, tensor in table.items()
        if tensor is not None
    ]
    there: dict[int, Tensor] = {}
    for _, _, tensor in before:
        if id(tensor) not in there:  # one that is held under two names stays one
            copied = tensor.detach().to(device)
            there[id(tensor)] = (
                nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied
            )
    try:
        for table, name, tensor in before:
            table[name] = there[id(tensor)]
        yield
    finally:
        for table, name, tensor in before:
            table[name] = tensor


@contextmanager
def replaced(part: Any, method: str, around: Callable[..., Any]) -> Iterator[None]:
    """Calls of part.method go to around(original, …); then the part has again what it had, its class's or another's in its place."""
    had, original = vars(part).get(method), getattr(part, method)
    setattr(part, method, functools.wraps(original)(functools.partial(around, original)))
    try:
        yield
    finally:
        delattr(part, method) if had is None else setattr(part, method, had)


def _called_there(part: nn.Module, device: torch.device, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(device), (args, kwargs))
    with placed_on(part, device):
        return call(*args, **kwargs)


def _kept(running: Any, known: dict[str, Any], device: torch.device) -> Callable[..., Any]:
    """Its encode_prompt, that remembers. It is asked with texts and settings; where tensors are among them, nothing is kept."""
    encode = running.encode_prompt

    @functools.wraps(encode)
    def remembering(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            return encode(*args, **kwargs)
        own = [item for item in vars(running).items() if isinstance(item[1], PLAIN)]  # it may read the guidance there
        key = repr((str(device), args, sorted(kwargs.items()), sorted(own)))
        if key not in known:
            found = encode(*args, **kwargs)
            kept = tree_map_only(Tensor, lambda tensor: tensor.to("cpu", copy=True), found)
            if sum(map(_bytes_of, known.values())) + _bytes_of(kept) > KEPT_BYTES:
                return found
            known[key] = kept
        return tree_map_only(Tensor, lambda tensor: tensor.to(device, copy=True), known[key])

    return remembering


def _bytes_of(nested: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(nested) if isinstance(leaf, Tensor))


@functools.cache
def _computing_elsewhere(kind: type) -> type:
    """A pipeline of that class that makes its tensors on `computes_on`, wherever its parts lie."""
    there = property(lambda pipe: pipe.computes_on)
    return type(kind.__name__, (kind,), {"_execution_device": there, "device": there})
