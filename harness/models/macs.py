"""Multiply-accumulates of one call of a transformer, by layer. Shapes decide them, so no weight is touched.

The call runs on a copy whose parameters lie on `meta`. What does not come out of a weight (masks, positions, rotary
tables, timesteps) keeps its values, since models read such values to decide shapes; what comes out of a weight is a shape.
Attention is counted where it is called, whatever backend would compute it.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ditbench.harness.models.calls import float_dtype, placed
from ditbench.harness.quant.target import QUANTIZABLE, weight_matrix

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def count_macs(transformer: nn.Module, inputs: Mapping[str, Any]) -> dict[str, int]:
    """Multiply-accumulates of one call, by layer name (0 for a layer that does not run), and by the name of each module that calls
    attention, of its two products; "" is the whole call, attention included.

    inputs: the call's arguments by name, nested as the model takes them. All their rows are counted: give it one row to
    know one sample. The parameters may lie on `meta` already; nothing of the transformer is changed.

    A model that reads what comes out of its weights (which experts a gate chose, say) cannot be counted without them: it is
    called once as it is, where it is.
    """
    dtype = float_dtype(transformer)
    try:
        with KnownValues():
            return _count(on_meta(transformer), placed(inputs, dtype, "cpu"))
    except (RuntimeError, TypeError):  # what torch raises when a tensor without values is read
        device = next((parameter.device for parameter in transformer.parameters()), torch.device("cpu"))
        if device.type == "meta":
            raise
        return _count(transformer, placed(inputs, dtype, device))  # an error of another cause comes again


def on_meta(transformer: nn.Module) -> nn.Module:
    """A copy with all parameters on `meta` and all buffers on the CPU; no parameter's values are copied."""
    memo: dict[int, Any] = {}
    for parameter in transformer.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in transformer.buffers():
        memo[id(buffer)] = buffer if buffer.is_meta else buffer.cpu()
    return copy.deepcopy(transformer, memo)


def _count(transformer: nn.Module, arguments: dict[str, Any]) -> dict[str, int]:
    layers = {name: module for name, module in transformer.named_modules() if isinstance(module, QUANTIZABLE)}
    macs = dict.fromkeys(layers, 0)

    def hook(name: str) -> Callable[..., None]:
        def count(module: nn.Linear | nn.Conv2d, args: tuple, output: Tensor) -> None:
            macs[name] += output.numel() * weight_matrix(module).shape[1]

        return count

    handles = [module.register_forward_hook(hook(name)) for name, module in layers.items()]
    try:
        with (
            inside(transformer) as running,
            every_product() as products,
            Attention(products, running) as attention,
        ):
            transformer(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    return macs | dict(attention.of) | {"": (products.get_total_flops() - attention.seen_flops) // 2 + attention.macs}


def every_product() -> FlopCounterMode:
    """torch's counter, and the products that it does not know: of rows in groups, each with a matrix of its own (experts)."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, which then reads its environment

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_flops})


def grouped_flops(left: Any, right: Any, *others: Any, out_shape: Any = None, **more: Any) -> int:
    """Shapes: rows (T, C) or groups of rows (G, T, C), times (G, C, O) or (C, O); two dimensions both of which are grouped share C."""
    return 2 * math.prod(out_shape) * left[-1] if len(left) + len(right) > 4 else 2 * left[0] * left[1] * right[1]


@contextmanager
def inside(model: nn.Module) -> Iterator[list[str]]:
    """Names of the modules that are running, the innermost last; the model's own is ""."""
    running: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda module, args: running.append(name)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    handles = []
    for name, module in model.named_modules():
        handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    try:
        yield running
    finally:
        for handle in handles:
            handle.remove()


READ_AT_MOST = (
    2**26
)  # elements of what is repeated; a larger table is a mask of all tokens by all, which decides no shape


class KnownValues(TorchDispatchMode):
    """Tensors on `meta` have no values, and what is computed from one has none, whatever device the rest is on. Operations
    among others are carried out.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func is torch.ops.aten.repeat.default and args[0].numel() * math.prod(args[1]) > READ_AT_MOST:
            args = _to_meta(args)
        elif all(not operand.is_meta for operand in operands):
            return func(*args, **kwargs)
        if func._schema.is_mutable and not args[0].is_meta:
            raise RuntimeError(f"{func}: what had values would have none")
        if func is torch.ops.aten._to_copy.default:
            kwargs = kwargs | {"device": torch.device("meta")}  # it stays without values wherever it goes
        if func.overloadpacket in INDEXED:  # masks among the indices decide shapes
            kept, rest = args[1], (args[0], None, *args[2:])
            first, _, *rest = _to_meta(rest)
            return func(first, kept, *rest, **_to_meta(kwargs))
        return func(*_to_meta(args), **_to_meta(kwargs))


INDEXED = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


def _to_meta(nested: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to("meta"), nested)


class Attention(TorchFunctionMode):
    """Counts both products of every softmax(q kᵀ) v; without values it computes nothing.

    seen_flops: what of it the counter of all products has counted as well (which depends on torch's version and backend).
    of: by the module that calls it, the last of `running` (see `inside`), if that is told.
    """

    def __init__(self, products: FlopCounterMode, running: list[str] | None = None) -> None:
        super().__init__()
        self.products, self.macs, self.seen_flops = products, 0, 0
        self.running, self.of = running, Counter[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = chain(args, (kwargs[name] for name in ("query", "key", "value")[len(args) :]))
        keys, width = value.shape[-2:]
        macs = query.numel() * keys + query.shape[:-1].numel() * keys * width
        self.macs += macs
        if self.running and self.running[-1]:
            self.of[self.running[-1]] += macs
        if query.is_meta:
            return query.new_empty(*query.shape[:-1], width)
        before = self.products.get_total_flops()
        output = func(*args, **kwargs)
        self.seen_flops += self.products.get_total_flops() - before
        return output
