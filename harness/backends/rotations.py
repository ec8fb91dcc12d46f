"""x' of a transform on x86 CPUs with AVX512, by our own kernel (`vnni_kernels/rotations.cpp`); torch's everywhere else.

Torch makes a small product of every row and block; ours takes a row as it lies in the first-level cache, about ten times as fast. It is no
part of a recipe, and the same whichever backend runs the layer: a simulated model and a real one give the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ditbench.harness.backends.vnni_extension import cpu_lacks
from ditbench.harness.quant.transforms import Rotation, Transform

LARGEST = 256  # channels of a factor: its matrix stays in the second-level cache


class Factors(NamedTuple):
    """x · diag(signs) · blockdiag(L ⊗ R), as the operators take it."""

    signs_C: Tensor | None
    left_aa: Tensor
    right_bb: Tensor


def transformed(transform: Transform, x: Tensor, step: Tensor | None) -> Tensor:
    """x (…, C) → x' in float32, or in float64 if x is."""
    x = moved(transform, x, step)
    for rotation in transform.rotations:
        x = rotated(rotation, x)  # type: ignore[arg-type]
    return _at_least_float32(x)


def all_but_last(transform: Transform, x: Tensor, step: Tensor | None) -> tuple[Tensor, Factors | None]:
    """x and the factors of the rotation that is still to be done to it, if the kernel does it; else x' and None."""
    *others, last = transform.rotations or (None,)
    x = moved(transform, x, step)
    for rotation in others:
        x = rotated(rotation, x)  # type: ignore[arg-type]
    if last is None:
        return _at_least_float32(x), None
    factors = _factors(last, x)  # type: ignore[arg-type]
    return (x, factors) if factors is not None else (rotated(last, x), None)  # type: ignore[arg-type]


def moved(transform: Transform, x: Tensor, step: Tensor | None) -> Tensor:
    """Before its rotations; bfloat16, which the kernel reads, stays if it has nothing but these."""
    only_rotates = transform.shift is None and transform.scale_C is None
    return x if only_rotates and x.dtype == torch.bfloat16 else transform.moved(_at_least_float32(x), step)


def rotated(rotation: Rotation, x: Tensor) -> Tensor:
    factors = _factors(rotation, x)
    if factors is None:
        return rotation(_at_least_float32(x))
    return torch.ops.ditbench_vnni.rotated(as_rows(x), *factors).reshape(x.shape)


def as_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _factors(rotation: Rotation, x: Tensor) -> Factors | None:
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16) or cpu_lacks() is not None:
        return None
    if torch.is_grad_enabled() and x.requires_grad:
        return None
    parts = rotation.factors()
    if parts is None or max(len(parts[1]), len(parts[2])) > LARGEST:
        return None
    signs_C, *matrices = parts
    return Factors(signs_C, *(matrix.to(torch.float32).contiguous() for matrix in matrices))


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
