"""What stands around a transformer in its pipeline (text encoders, VAE), on the run's device while it computes.

A pipeline is shared by all runs of a sweep and stays where it was loaded. While one of its parts computes, copies of that part's
weights are on the device; behind the call they are dropped, so that one part at a time is there beside one transformer, and the
next run finds the pipeline as it was. (accelerate's offloading hooks would copy the weights back and leave others in their place.)

What `encode_prompt` gives is kept (`encoded_prompts`); a VAE decodes as memory allows (`decoding`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ditbench.harness.common.placement import placed_on
from ditbench.harness.models.decoding import decode_within_memory
from ditbench.harness.models.encoded_prompts import encoding_once

COMPUTES = ("forward", "encode", "decode", "generate")  # methods by which pipelines call their parts


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
        running.encode_prompt = encoding_once(pipe, running, device)
    others = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module) and name not in parts}
    others.pop("transformer", None)
    with ExitStack() as stack:
        if hasattr(others.get("vae"), "decode"):  # innermost: with its latents on the device
            stack.enter_context(replaced(vae := others["vae"], "decode", functools.partial(decode_within_memory, vae)))
        for part in others.values() if device.type != "cpu" else ():
            for method in (name for name in COMPUTES if hasattr(part, name)):
                stack.enter_context(replaced(part, method, functools.partial(_called_there, part, device)))
        yield running


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


@functools.cache
def _computing_elsewhere(kind: type) -> type:
    """A pipeline of that class that makes its tensors on `computes_on`, wherever its parts lie."""
    there = property(lambda pipe: pipe.computes_on)
    return type(kind.__name__, (kind,), {"_execution_device": there, "device": there})
