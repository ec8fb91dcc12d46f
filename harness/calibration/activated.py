"""Which layers read what an activation gives: seen on a call of the model, whatever the layers are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ditbench.harness.build.build import float_copy
from ditbench.harness.calibration.recording import Calibration
from ditbench.harness.models.calls import float_dtype, placed
from ditbench.harness.models.macs import KnownValues, on_meta
from ditbench.harness.quant.target import Target, is_linear_map

GELU, SILU = "gelu", "silu"
ACTIVATIONS = {F.gelu: GELU, torch._C._nn.gelu: GELU, F.silu: SILU, torch._C._nn.silu: SILU}
# What they give stays what it is through these: in another dtype, in another shape, a part of it.
SAME = frozenset(
    (
        F.dropout, torch.dropout, Tensor.to, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.contiguous,
        Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten, Tensor.unflatten, Tensor.squeeze,
        Tensor.unsqueeze, Tensor.transpose, torch.transpose, Tensor.permute, torch.permute, Tensor.expand, Tensor.repeat,
        Tensor.repeat_interleave, Tensor.__getitem__,
    )
)  # fmt: skip


@torch.no_grad()
def activation_readers(target: Target, calibration: Calibration) -> dict[str, str]:
    """{layer: GELU or SILU} of the linear layers that read what one gives and nothing else, no product with a gate.

    One recorded row is called without weights, or with them where the model reads what comes out of them.

    Raises:
        UserError: there is no recording (calibration.n=0).
    """
    calls, dtype = calibration.rows(0, 1), float_dtype(target.transformer)
    try:
        with KnownValues():
            model = on_meta(target.transformer)
            return _seen(model, lambda: [model(**placed(call.arguments(), dtype, "cpu")) for call in calls])
    except (RuntimeError, TypeError):  # it reads what comes out of its weights: see `count_macs`
        model = float_copy(target, dtype=dtype, device=calibration.device)
        return _seen(model, lambda: calibration.call(model, 0, calls))


def _seen(model: nn.Module, run: Any) -> dict[str, str]:
    read: dict[str, set[str | None]] = {}

    def see(name: str) -> Any:
        return lambda module, args: read.setdefault(name, set()).add(getattr(args[0], "made_by", None))

    layers = {name: module for name, module in model.named_modules() if is_linear_map(module)}
    handles = [module.register_forward_pre_hook(see(name)) for name, module in layers.items()]
    try:
        with Followed():
            run()
    finally:
        for handle in handles:
            handle.remove()
    only = {name: next(iter(kinds)) for name, kinds in read.items() if len(kinds) == 1}
    return {name: kind for name, kind in only.items() if kind is not None}


class Followed(TorchFunctionMode):
    """Tensors that an activation gave say so (`made_by`), for as long as nothing is computed from them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        read = getattr(args[0], "made_by", None) if args and func in SAME else None
        result = func(*args, **(kwargs or {}))
        made_by = ACTIVATIONS.get(func, read)
        if isinstance(result, Tensor) and (made_by or hasattr(result, "made_by")):
            result.made_by = made_by  # type: ignore[attr-defined]
        return result
