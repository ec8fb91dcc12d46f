"""What a block computes between two products, put off until it is whole, and then computed by one kernel of ours.

norm(x) · (1 + scale) + shift, and x + gate · y, are written in every family's own words: some in float32 and cast back, some with a weight
and a bias, by a table or by a linear layer. Under `Between` their steps compute nothing: each gives a `Pending` tensor, which knows what
it stands for. A sum with a gate is whole when it is in bfloat16; a norm is when somebody reads it, and a quantized layer
that does so gets it together with its codes. Whoever asks for anything else gets torch's own steps, as they were called: so no
block need be known.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ditbench.harness.backends.activations import GELU_ERF, GELU_TANH, SILU
from ditbench.harness.backends.between import Kernels, kernels_of
from ditbench.harness.build.treatment import Step, Treatment, now

BF16, F32 = torch.bfloat16, torch.float32


@dataclass(frozen=True, eq=False)
class Norm:
    """LayerNorm, which is centred, or RMSNorm."""

    eps: float
    centred: bool


@dataclass(frozen=True, eq=False)
class Form:
    """base + norm(x) · factor + shift; what is None is left out. x, base: bfloat16 (B, T, C); factor, shift: (B, C) or (1, C)."""

    x: Tensor
    norm: Norm | None = None
    factor: Tensor | None = None
    shift: Tensor | None = None
    base: Tensor | None = None

    @property
    def is_x(self) -> bool:
        return self.norm is None and self.factor is None and self.base is None

    @property
    def is_product(self) -> bool:
        return self.norm is None and self.factor is not None and self.base is None

    def computed(self) -> Tensor | None:
        """In bfloat16, by a kernel; None if none computes this."""
        if self.base is not None:
            return gated(self.base, self.factor, self.x)  # type: ignore[arg-type]
        if self.norm is not None:
            return normed(self.x, self.norm, self.factor, self.shift)
        return self.x if self.is_x else None


def normed(x: Tensor, norm: Norm, factor: Tensor | None, shift: Tensor | None) -> Tensor:
    return _kernels(x).normed(x.contiguous(), factor, shift, norm.eps, norm.centred)


def gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate · y of tokens (B, T, C)."""
    return _kernels(x).gated(x.contiguous(), gate, y.contiguous())


def _kernels(x: Tensor) -> Kernels:
    kernels = kernels_of(x.device)
    assert kernels is not None  # or nothing had been put off
    return kernels


class Pending(Tensor):
    """A tensor of a form. To torch it is one of its shape and dtype, whose values are computed when they are asked for."""

    form: Form | None  # until it is settled; never of a product
    again: Callable[..., Tensor] | None  # what was called; of a product, with the activation that it is to end in
    value: Tensor | None
    kept_dtype: torch.dtype
    is_linear: bool
    reads: tuple[Tensor, ...]  # whose values its own are made of, as they are now
    codes: tuple[Treatment, Step, Any] | None  # whose, at which step, and what it makes of these values

    @classmethod
    def of(cls, form: Form) -> Pending:
        """Of a form that a kernel computes."""
        return _pending(form.x.shape, BF16, form, lambda: form.x, form.x.device)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ASKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        made = taken(func, args, kwargs)
        return func(*settled(args), **settled(kwargs)) if made is None else made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*settled(args), **settled(kwargs or {}))

    def settle(self) -> Tensor:
        """Its values, a plain tensor."""
        if self.value is None:
            assert self.again is not None
            with torch._C.DisableTorchFunction():  # nothing of it is to be put off again
                value = self.form.computed() if self.form is not None and self.kept_dtype == BF16 else None
                if value is None:
                    value = self.again(None) if self.is_linear else self.again()
            self._keep(value)
        assert self.value is not None
        return self.value

    def handed_to(
        self, kernel: Any, step: Tensor | None, treatment: Treatment | None, *, keep: bool
    ) -> tuple[Tensor, Any]:
        """Its values, or itself if they are still nobody's and not to be kept, and what the kernel makes of them (`FusedKernel.rows`) if
        that came with the norm. kernel: None for none. treatment: of the layer, which others may share.
        """
        form = self.form
        if kernel is None or form is None or form.norm is None or form.base is not None or self.kept_dtype != BF16:
            return self.settle(), None
        if self.codes is not None and not keep and self.codes[:2] == (treatment, now(step)):
            return self, self.codes[2]
        made = kernel.normed(form.x.contiguous(), form.norm, form.factor, form.shift, step, keep=keep)
        if made is None:
            return self.settle(), None
        value, rows = made
        if treatment is not None:
            self.codes = treatment, now(step), rows
        if value is None:
            return self, rows
        self._keep(value)
        return value, rows

    def _keep(self, value: Tensor) -> None:
        self.value, self.form, self.again, self.reads = value, None, None, ()
        _open.pop(id(self), None)
        if self.codes is not None:
            treatment, at, rows = self.codes
            treatment.leave(value, at, rows)
            self.codes = None


_open: weakref.WeakValueDictionary[int, Pending] = weakref.WeakValueDictionary()  # which nobody has asked for yet


def settled(tree: Any) -> Any:
    """The same with plain tensors: of a tensor, and of tuples, lists and dicts."""
    if isinstance(tree, Pending):
        return tree.settle()
    if type(tree) in (tuple, list):
        return type(tree)(settled(each) for each in tree)
    if type(tree) is dict:
        return {name: settled(each) for name, each in tree.items()}
    return tree_map_only(Pending, Pending.settle, tree) if isinstance(tree, tuple | list | dict) else tree


def _pending(
    shape: torch.Size,
    dtype: torch.dtype,
    form: Form | None,
    again: Callable[..., Tensor],
    device: torch.device,
    reads: tuple[Tensor, ...] = (),
) -> Pending:
    """reads: beside what the form has."""
    parts = () if form is None else (form.x, form.factor, form.shift, form.base)
    made: Any = Tensor._make_wrapper_subclass(Pending, shape, dtype=dtype, device=device)
    made.codes = None
    made.form, made.again, made.value, made.kept_dtype, made.is_linear = form, again, None, dtype, form is None
    made.reads = (*reads, *(part for part in parts if part is not None))
    _open[id(made)] = made
    return made


def put_off_linear(x: Tensor, outputs: int, compute: Callable[[str | None], Tensor]) -> Tensor | None:
    """The result of a quantized layer that reads x, inside of `Between`: what comes next may be an activation that it can end in."""
    takes = x.kept_dtype == BF16 if isinstance(x, Pending) else _takes(x)
    if not _inside.blocks or not takes:
        return None
    return _pending(torch.Size((*x.shape[:-1], outputs)), BF16, None, compute, x.device, (x,))


def put_off_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor | None:
    """Inside of `Between`, of what a form can hold."""
    return _rms_norm(F.rms_norm, x, x.shape[-1:], weight, eps) if _inside.blocks else None


class _Inside(threading.local):
    blocks = 0


_inside = _Inside()


class Between(TorchFunctionMode):
    """Inside of it the steps that `Form` can hold are put off."""

    def __enter__(self) -> Any:
        _inside.blocks += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _inside.blocks -= 1
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in ASKS:
            return func(*args, **kwargs)
        if _open and args and _changes(func) and isinstance(args[0], Tensor):
            _settle_what_reads(args[0])
        made = taken(func, args, kwargs)
        return func(*args, **kwargs) if made is None else made


def taken(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """What a call gives if it is a step of a form; None if torch is to compute it."""
    step = STEPS.get(func)
    return None if step is None or "out" in kwargs else step(func, *args, **kwargs)


@lru_cache(4096)
def _changes(func: Any) -> bool:
    """Whether it writes into its first argument."""
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


def _settle_what_reads(x: Tensor) -> None:
    """x: about to be written into."""
    place = _place(x)
    for each in list(_open.values()):
        if any(read is x or (place is not None and _place(read) == place) for read in each.reads):
            each.settle()


def _place(x: Tensor) -> int | None:
    """Of its values, where it has any yet."""
    value = x.value if isinstance(x, Pending) else x
    return None if value is None else value.untyped_storage().data_ptr()


def _form(x: Any) -> Form | None:
    """Of tokens (B, T, C) that our kernels take, or of what is pending."""
    if isinstance(x, Pending):
        if x.form is not None or (x.is_linear and len(x.shape) != 3):
            return x.form
        x = x.settle()
    return Form(x) if isinstance(x, Tensor) and x.dim() == 3 and _takes(x) else None


def _takes(x: Tensor) -> bool:
    plain = x.dtype == BF16 and x.numel() > 0 and kernels_of(x.device) is not None
    return plain and not (torch.is_grad_enabled() and x.requires_grad)


def _row(x: Any, of: Tensor) -> Tensor | None:
    """What is one for all tokens of a sample of tokens (B, T, C), as (B, C) or (1, C)."""
    if isinstance(x, Pending) and x.dim() == 3 and x.shape[1] == 1:
        x = x.settle()
    if not isinstance(x, Tensor) or isinstance(x, Pending) or x.dtype not in (BF16, F32) or x.device != of.device:
        return None
    if x.shape[-1:] != of.shape[-1:] or (torch.is_grad_enabled() and x.requires_grad):
        return None
    if x.dim() == 3 and x.shape[1] == 1 and x.shape[0] in (1, len(of)):
        x = x[:, 0]
    elif x.dim() == 1:
        x = x[None]
    elif x.dim() != 2 or x.shape[0] != 1:
        return None
    return x if x.stride(-1) == 1 else x.contiguous()


def _multiplied(func: Any, input: Any, other: Any) -> Tensor | None:
    for wide, narrow in ((input, other), (other, input)):
        form = _form(wide)
        if form is None or form.base is not None or (form.x.shape[1] == 1 and form.is_x):
            continue
        row = _row(narrow, form.x)
        if row is not None:
            factor = row if form.factor is None else form.factor.float() * row
            shift = None if form.shift is None else form.shift.float() * row
            dtype, whole = torch.promote_types(wide.dtype, narrow.dtype), replace(form, factor=factor, shift=shift)
            again = partial(_again, func, input, other)
            return _pending(form.x.shape, dtype, whole, again, form.x.device, (wide,))
    return None


def _again(func: Any, *args: Any) -> Tensor:
    return func(*settled(args))


def _added(func: Any, input: Any, other: Any, alpha: float = 1) -> Tensor | None:
    if alpha != 1 or not (isinstance(input, Pending) or isinstance(other, Pending)):
        return None
    again = partial(_again, func, input, other)
    for wide, narrow in ((input, other), (other, input)):
        form = _form(wide)
        if form is None or form.base is not None or not isinstance(narrow, Tensor):
            continue
        dtype = torch.promote_types(wide.dtype, narrow.dtype)
        if form.norm is not None and (row := _row(narrow, form.x)) is not None:
            shift = row if form.shift is None else form.shift.float() + row
            return _pending(form.x.shape, dtype, replace(form, shift=shift), again, row.device, (wide,))
        base = _form(narrow) if form.is_product else None
        if base is not None and base.is_x and base.x.shape == form.x.shape:
            return _when_whole(replace(form, base=base.x), dtype, again, (wide, narrow))
    return None


def _when_whole(form: Form, dtype: torch.dtype, again: Callable[[], Tensor], reads: tuple[Tensor, ...]) -> Tensor:
    """What nothing more can be put to is computed as soon as it is in bfloat16."""
    if dtype == BF16 and (form.base is not None or form.is_x):
        value = form.computed()
        assert value is not None
        return value
    return _pending(form.x.shape, dtype, form, again, form.x.device, reads)


def _cast(func: Any, x: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    form = _form(x)
    if form is None or not (isinstance(x, Pending) or func is not Tensor.type_as):
        return None
    wanted = F32 if func is Tensor.float else args[0] if args else kwargs.get("dtype")
    if isinstance(wanted, Tensor):
        wanted = wanted.dtype if wanted.device == x.device else None
    if len(args) + len(kwargs) != (func is not Tensor.float) or wanted not in (BF16, F32):
        return None
    if wanted == x.dtype:
        return x
    return _when_whole(form, wanted, lambda: func(*settled((x, *args)), **kwargs), (x,))


def _layer_norm(
    func: Any, x: Any, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor | None:
    return _norm(lambda: func(settled(x), shape, weight, bias, eps), x, shape, weight, bias, Norm(eps, True))


def _rms_norm(func: Any, x: Any, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor | None:
    if eps is None:
        return None
    return _norm(lambda: func(settled(x), shape, weight, eps), x, shape, weight, None, Norm(eps, False))


def _norm(
    again: Callable[[], Tensor], x: Any, shape: Any, weight: Tensor | None, bias: Tensor | None, norm: Norm
) -> Tensor | None:
    of_heads = isinstance(x, Tensor) and not isinstance(x, Pending) and x.dim() == 4 and _takes(x)
    form = Form(x.flatten(1, 2)) if of_heads else _form(x)
    if form is None or not form.is_x or tuple(shape) != (form.x.shape[-1],):
        return None
    rows = [None if each is None else _row(each, form.x) for each in (weight, bias)]
    if any(row is None and given is not None for row, given in zip(rows, (weight, bias), strict=True)):
        return None
    if of_heads:
        return normed(form.x, norm, *rows).view(x.shape)
    return _pending(form.x.shape, x.dtype, Form(form.x, norm, *rows), again, form.x.device, (x,))


def _gelu(func: Any, input: Any, *, approximate: str = "none") -> Tensor | None:
    return _activated(input, GELU_TANH if approximate == "tanh" else GELU_ERF)


def _activated(x: Any, activation: str) -> Tensor | None:
    """The end of a product that nobody has asked for."""
    if not isinstance(x, Pending) or not x.is_linear or x.value is not None:
        return None
    with torch._C.DisableTorchFunction():
        return x.again(activation)  # type: ignore[misc]


STEPS: dict[Any, Callable[..., Tensor | None]] = {
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    **dict.fromkeys((F.gelu, torch._C._nn.gelu), _gelu),
    F.silu: lambda func, input, inplace=False: _activated(input, SILU),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _multiplied),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _added),
    **dict.fromkeys((Tensor.float, Tensor.to, Tensor.type_as), _cast),
}
# What a tensor is asked without its values.
ASKS = {
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad")
    ),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_inference, Tensor.__hash__),
}
