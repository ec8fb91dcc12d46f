"""A second device made of the CPU: tensors on it refuse to meet CPU tensors as CUDA's do, and compute the CPU's own numbers.

"It runs on a GPU" means that weights, inputs, noise, text encoders, VAE, judges, observers and fits meet on one device. A machine
without a GPU can prove that, and `operations.counted` says what share of the arithmetic is done there.

    with second_device.in_use() as device:      # the fixture `second` is this
        layer.to(device)                        # "second_device:0": ordinary tensors, ordinary Parameters
        layer(torch.randn(2, 4))                # RuntimeError: ... at least two devices, second_device:0 and cpu!
        layer(torch.randn(2, 4).to(device))     # bit for bit what the CPU computes

How: a tensor on it owns CPU memory under another device's name, torch's PrivateUse1. DLPack hands memory over without a copy, and
the name is changed on the way. An operator takes the CPU's names back, runs the CPU's kernel, and names the result.

What it cannot show: kernels, speed, memory. What differs from CUDA: it has no generators (noise is drawn on the CPU and moved, as
our seeds need anyway) and no pinned memory; autocast changes nothing; `Module.to` makes new Parameters, so tied ones come apart, and
`cpu_parameter.data = tensor_on_it` is refused (both as on any out-of-tree device); safetensors cannot load straight to it.

The name is one that no library and no layer has (torch gives `Module` a method of it): diffusers takes an "npu" for a device without float64.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

NAME = "second_device"
WHY_NOT = ""  # why this torch cannot have a second device; empty where it can
try:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as _setup
except ImportError:
    WHY_NOT = f"torch {torch.__version__} has no device that Python can register (2.9 has not, 2.13 has)"

aten = torch.ops.aten
_CPU_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_DLPACK_CPU, _DLPACK_OTHER = 1, 12  # kDLCPU; kDLExtDev, which torch reads as PrivateUse1
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_libraries: list[torch.library.Library] = []  # registrations last as long as these

# Index tensors may stay on the CPU, as CUDA allows; a value that is one CPU number too.
_TAKES_CPU_INDICES = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_TAKES_CPU_NUMBER = {*_TAKES_CPU_INDICES, "aten::fill_", "aten::masked_fill_", "aten::index_fill_"}


def on_second(tensor: Tensor) -> bool:
    return tensor.device.type == NAME


def _renamed(tensor: Tensor, dlpack_device: int) -> Tensor:
    """The same memory, shape, dtype and strides under another device's name."""
    capsule = torch._C._to_dlpack(tensor)  # type: ignore[attr-defined]
    ctypes.c_int32.from_address(_capsule_pointer(capsule, b"dltensor") + 8).value = dlpack_device
    return torch._C._from_dlpack(capsule)  # type: ignore[attr-defined]


def _near(tensor: Tensor) -> Tensor:
    if not on_second(tensor):
        return tensor
    near = _renamed(tensor, _DLPACK_CPU)
    near = near._conj() if tensor.is_conj() else near  # two bits of a tensor that DLPack does not carry
    return near._neg_view() if tensor.is_neg() else near


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operator that has a tensor of the second device among its arguments, or is told to make one there."""
    if op.is_view or op._schema.name == "aten::set_":  # shape and strides only: the CPU's kernel takes any device
        return op.redispatch(_CPU_KERNEL, *args, **kwargs)
    _refuse_mixing(op, args, kwargs)
    given: dict[int, Tensor] = {}  # id of what the CPU's kernel sees → what was given: in-place operators return it

    def near(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("cpu")
        # Something empty may be an `out` that the kernel makes larger, which borrowed memory cannot become.
        seen = torch.empty_like(value, device="cpu") if value.numel() == 0 else _near(value)
        given[id(seen)] = value
        return seen

    def far(value: Tensor) -> Tensor:
        if id(value) not in given:
            return _renamed(value, _DLPACK_OTHER)
        if value.shape != given[id(value)].shape:
            _become(given[id(value)], value)
        return given[id(value)]

    near_args = [_changed(value, near) for value in args]
    near_kwargs = {name: _changed(value, near) for name, value in kwargs.items()}
    declared = zip(args, op._schema.arguments, strict=False)
    if any(isinstance(each, int | float | complex) and str(argument.type) == "Tensor" for each, argument in declared):
        op = op.overloadpacket  # torch shows Python a number where it holds a number as a tensor: let it choose again
    return _changed(op(*near_args, **near_kwargs), far)


def _changed(value: Any, change: Any) -> Any:
    """Its tensors and devices changed: operators take and give those, plain values, and lists of them (pytree is 3 times slower)."""
    if isinstance(value, Tensor | torch.device):
        return change(value)
    return type(value)([_changed(each, change) for each in value]) if isinstance(value, list | tuple) else value


def leaves(values: Iterable[Any]) -> Iterator[Any]:
    """What an operator takes or gives, without the lists around it."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from leaves(value)
        else:
            yield value


def _refuse_mixing(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    name = op._schema.name
    takes_numbers = torch.Tag.pointwise in op.tags or name in _TAKES_CPU_NUMBER
    if name in _TAKES_CPU_INDICES:
        args = (args[0], *args[2:])
    for leaf in leaves((args, *kwargs.values())):
        if isinstance(leaf, torch.Generator):
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{leaf.device.type}'")
        if isinstance(leaf, Tensor) and not on_second(leaf) and not (takes_numbers and leaf.dim() == 0):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and cpu! ({name})"
            )


def _become(far: Tensor, near: Tensor) -> Tensor:
    """`far`, an operator's output, takes over the memory and shape of `near`."""
    held = _renamed(near, _DLPACK_OTHER)
    where = held.untyped_storage(), held.storage_offset(), held.shape, held.stride()
    return aten.set_.source_Storage_storage_offset.redispatch(_CPU_KERNEL, far, *where)


def _copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """The one operator that takes tensors of both devices."""
    _near(target).copy_(_near(source))
    return target


def _resize(tensor: Tensor, size: Any, memory_format: Any = None) -> Tensor:
    return _become(
        tensor, torch.empty(size, dtype=tensor.dtype, memory_format=memory_format or torch.contiguous_format)
    )


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """The kernel that the CPU would choose; torch has no say for a device that registers none, and takes the slow one."""
    _refuse_mixing(aten.scaled_dot_product_attention.default, (query, key, value, attn_mask), {})
    options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    near = [
        None if each is None else _near(each.detach()).requires_grad_(each.requires_grad)
        for each in (query, key, value, attn_mask)
    ]
    chosen = aten._fused_sdp_choice(*near, enable_gqa=enable_gqa, **options)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), float("-inf"))
    if chosen == torch.nn.attention.SDPBackend.FLASH_ATTENTION.value:
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=attn_mask, **options)[0]
    return aten._scaled_dot_product_attention_math(query, key, value, attn_mask, enable_gqa=enable_gqa, **options)[0]


def _cpu_operators() -> Iterator[Any]:
    """Operators that have a kernel of the CPU's own; torch would compose some of others, with other roundings."""
    yield from (aten.convolution.default, aten.convolution_backward.default)
    for full_name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU"):
        name, _, overload = full_name.removeprefix("aten::").partition(".")
        if full_name.startswith("aten::") and name != "resize_":
            yield getattr(getattr(aten, name), overload or "default")


_new_storage = torch.UntypedStorage.__new__


def _storage(cls: type, *args: Any, device: Any = None, **kwargs: Any) -> Any:
    """`UntypedStorage(bytes, device=…)`, as deepcopy and torch.load call it; for other devices torch has an allocator."""
    if device is not None and torch.device(device).type == NAME:
        return torch.empty(*args, dtype=torch.uint8, device=device).untyped_storage()
    return _new_storage(cls, *args, **kwargs) if device is None else _new_storage(cls, *args, device=device, **kwargs)


class Module(ModuleType):
    """`torch.second_device`, what `torch.cuda` is for CUDA. Available only inside `in_use`, so that others never find it."""

    in_use = False

    def is_available(self) -> bool:
        return self.in_use

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return int(self.in_use)

    def get_device_name(self, device: Any = None) -> str:
        return "a second device made of the CPU"

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return 8 * 2**30, 16 * 2**30

    def zero(self, device: Any = None) -> int:
        return 0

    current_device = memory_allocated = max_memory_allocated = memory_reserved = max_memory_reserved = zero

    def device(self, index: Any) -> Any:
        return nullcontext()

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def nothing(self, *args: Any, **kwargs: Any) -> None:
        """No streams, no cache, no generator: what would tend them does nothing."""

    synchronize = empty_cache = ipc_collect = set_device = reset_peak_memory_stats = nothing
    manual_seed = manual_seed_all = set_rng_state = _is_in_bad_fork = nothing


_module = Module(f"torch.{NAME}")


def register() -> None:
    """Register the device with this process; a second time is nothing. Raises RuntimeError where torch cannot."""
    if WHY_NOT:
        raise RuntimeError(WHY_NOT)
    if _libraries:
        return
    _setup(NAME, backend_module=_module)
    everything, aten_library = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    _libraries.extend((everything, aten_library))
    everything.fallback(_run, "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # autocast changes nothing here
    for op in _cpu_operators():
        aten_library.impl(op, partial(_run, op), "PrivateUse1")
    aten_library.impl("_copy_from", _copy, "PrivateUse1")
    for bit in ("Conjugate", "Negative"):
        aten_library.impl("_copy_from", torch.library.fallthrough_kernel, bit)
    aten_library.impl("resize_", _resize, "PrivateUse1")
    for key in ("PrivateUse1", "AutogradPrivateUse1"):  # the first under inference_mode
        aten_library.impl("scaled_dot_product_attention", _attention, key)
    torch.UntypedStorage.__new__ = _storage  # type: ignore[method-assign, assignment]


@contextmanager
def in_use() -> Iterator[torch.device]:
    """The device is there, as `torch.second_device.is_available()` and `torch.accelerator` say."""
    register()
    _module.in_use = True
    try:
        yield torch.device(NAME, 0)
    finally:
        _module.in_use = False
