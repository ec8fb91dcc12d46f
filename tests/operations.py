"""Counting floating-point operations by stage and by device, so that "it runs on the device" is a number.

    with counted() as ops:
        with ops.stage("fit"):
            fit(...)
    ops.share_on_second_device("fit")   # 0…1
    print(ops.report())                 # per stage; and which lines of ours asked the CPU for how much

Products, convolutions and attention count as torch's own flop formulas say (a multiplication and an addition are 2), decompositions
as textbooks do (Golub & Van Loan), everything else one operation for each element of its largest floating-point tensor (of all tensors of a
list, for operators on lists). Nothing is counted for what only moves or makes numbers (copies, views, gathering, constants, drawn
noise), nor for integers. What NumPy and SciPy compute is not seen, on whatever device the rest runs: the bootstraps of FID and KID, the matrix
root of their libraries, plans of mixed precision, rank correlations. A few operators count too little (FFT, recurrent layers, pinv).
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from second_device import NAME, leaves
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

REPOSITORY = Path(__file__).resolve().parents[1]
OURS = tuple(str(REPOSITORY / name) for name in ("src", "harness", "methods", "eval"))
aten = torch.ops.aten

MOVES = {
    "_to_copy", "copy_", "clone", "cat", "stack", "index", "index_select", "gather", "embedding", "index_put", "index_put_",
    "_index_put_impl_", "index_copy", "index_copy_", "scatter", "scatter_", "masked_select", "masked_scatter", "repeat",
    "repeat_interleave", "roll", "flip", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
    "replication_pad2d", "replication_pad3d", "pixel_shuffle", "pixel_unshuffle", "_local_scalar_dense", "equal", "fill_",
    "fill", "zero_", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones",
    "new_full", "new_empty", "new_empty_strided", "tril", "triu", "slice_scatter", "select_scatter", "slice_backward",
    "select_backward", "unsafe_split", "_unsafe_view", "im2col", "resize_", "set_", "lift_fresh", "isnan", "isinf", "isfinite", "nonzero", "block_diag",
}  # fmt: skip


def _rows_columns(matrix: Tensor) -> tuple[int, int, int]:
    """How many matrices, and their longer and shorter side."""
    rows, columns = matrix.shape[-2:]
    return math.prod(matrix.shape[:-2]), max(rows, columns), min(rows, columns)


def _per_matrix(formula: Callable[[int, int], float]) -> Callable[..., int]:
    """formula(longer side, shorter side) for each matrix of the first argument."""

    def count(matrix: Tensor, *args: Any, **kwargs: Any) -> int:
        matrices, longer, shorter = _rows_columns(matrix)
        return int(matrices * formula(longer, shorter))

    return count


def _solve(matrix: Tensor, right: Tensor, *args: Any, **kwargs: Any) -> int:
    return int(2 / 3 * matrix.numel() * matrix.shape[-1]) + 2 * right.numel() * matrix.shape[-1]


def _batched_sum(start: Tensor, left: Tensor, right: Tensor, *args: Any, **kwargs: Any) -> int:
    """Products of (B, n, m) and (B, m, p), summed over B."""
    return 2 * left.numel() * right.shape[-1]


def _distances(left: Tensor, right: Tensor, *args: Any, **kwargs: Any) -> int:
    """A difference, a power and a sum for each pair of rows and each column."""
    return 3 * left.numel() * right.shape[-2]


def _least_squares(matrix: Tensor, right: Tensor, *args: Any, **kwargs: Any) -> int:
    """QR of the matrix, its Q applied to the right side, and a triangular solve."""
    matrices, longer, shorter = _rows_columns(matrix)
    columns = right.shape[-1] if right.ndim == matrix.ndim else 1
    factor = 2 * longer * shorter**2 - 2 * shorter**3 / 3
    return int(matrices * (factor + columns * (4 * longer * shorter - shorter**2)))


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    """Two products, (queries, keys) and (queries, width), per head; heads of keys may be fewer."""
    return 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


FORMULAS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, *args, **__: 5 * _attention(*args) // 2,
    aten.mv: lambda matrix, *_, **__: 2 * matrix.numel(),
    aten.addmv: lambda _, matrix, *__, **___: 2 * matrix.numel(),
    aten.dot: lambda vector, *_, **__: 2 * vector.numel(),
    aten.addbmm: _batched_sum,
    aten.addbmm_: _batched_sum,
    aten._cdist_forward: _distances,
    aten._euclidean_dist: _distances,
    aten.cholesky_solve: lambda right, factor, *_, **__: 2 * right.numel() * factor.shape[-1],
    aten.linalg_lu_solve: lambda factor, pivots, right, **_: 2 * right.numel() * factor.shape[-1],
    aten.linalg_lstsq: _least_squares,
    aten.linalg_eig: _per_matrix(lambda _, n: 25 * n**3),
    aten.linalg_cholesky_ex: _per_matrix(lambda _, n: n**3 / 3),
    aten.cholesky_inverse: _per_matrix(lambda _, n: 2 * n**3 / 3),
    aten.linalg_inv_ex: _per_matrix(lambda _, n: 2 * n**3),
    aten.linalg_lu_factor_ex: _per_matrix(lambda _, n: 2 * n**3 / 3),
    aten.linalg_qr: _per_matrix(lambda m, n: 4 * m * n**2 - 4 * n**3 / 3),
    aten._linalg_svd: _per_matrix(lambda m, n: 6 * m * n**2 + 20 * n**3),
    aten._linalg_eigh: _per_matrix(lambda _, n: 9 * n**3),
    aten.linalg_solve_triangular: lambda matrix, right, **_: right.numel() * matrix.shape[-1],
    aten._linalg_solve_ex: _solve,
}


def operations(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> int:
    """The floating-point operations of one ATen call."""
    floats = [t for t in leaves((args, *kwargs.values())) if isinstance(t, Tensor) and _is_float(t)]
    packet = func.overloadpacket
    if not floats:
        return 0
    if packet in FORMULAS:
        return FORMULAS[packet](*args, **kwargs)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    if func.is_view or packet.__name__ in MOVES or (torch.Tag.nondeterministic_seeded in func.tags):
        return 0
    if packet.__name__.startswith("_foreach_"):
        return sum(t.numel() for t in args[0] if _is_float(t))
    floats += [t for t in leaves((out,)) if isinstance(t, Tensor) and _is_float(t)]
    return max(t.numel() for t in floats)


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


class Operations(TorchDispatchMode):
    """Counts while it is entered. `by_stage[stage, device]` and, for what the CPU did, `on_cpu[stage, operator, place]`."""

    def __init__(self) -> None:
        super().__init__()
        self.by_stage: Counter[tuple[str, str]] = Counter()
        self.on_cpu: Counter[tuple[str, str, str]] = Counter()
        self._stage = ""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        before, self._stage = self._stage, name
        try:
            yield
        finally:
            self._stage = before

    def share_on_second_device(self, stage: str | None = None) -> float:
        """Of the operations of that stage, or of all. Raises ValueError where nothing was counted."""
        by_device: Counter[str] = Counter()
        for (where, device), count in self.by_stage.items():
            if stage in (None, where):
                by_device[device] += count
        if not by_device.total():
            raise ValueError(
                f"no floating-point operation was counted in stage {stage!r}; known: {sorted(self.stages())}"
            )
        return by_device[NAME] / by_device.total()

    def stages(self) -> set[str]:
        return {stage for stage, _ in self.by_stage}

    def report(self, most: int = 15) -> str:
        lines = [
            f"{stage or '-'}: {self.share_on_second_device(stage):.4%} on {NAME}" for stage in sorted(self.stages())
        ]
        worst = [
            f"  cpu {n:>14,} {stage or '-'} {op} {place}" for (stage, op, place), n in self.on_cpu.most_common(most)
        ]
        return "\n".join(lines + worst)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_composed(func) and func.overloadpacket not in FORMULAS and func.overloadpacket not in flop_registry:
            with self:  # under inference_mode operators come whole (linear, attention): count what they are made of
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        out = func(*args, **kwargs)
        count = operations(func, args, kwargs, out)
        if count:
            tensors = [each for each in leaves((args, *kwargs.values(), out)) if isinstance(each, Tensor)]
            device = NAME if any(each.device.type == NAME for each in tensors) else tensors[0].device.type
            self.by_stage[self._stage, device] += count
            if device == "cpu":
                self.on_cpu[self._stage, func.overloadpacket.__name__, _place()] += count
        return out


@cache
def _is_composed(func: Any) -> bool:
    """Whether torch has it as a composition of others only."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return key in func.py_kernels or torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


def counted() -> Operations:
    """A counter; use it in `with`."""
    return Operations()


def _place() -> str:
    """The innermost line of ours that is running; a backward pass runs in a thread that has none."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith(OURS):
            return f"{Path(frame.f_code.co_filename).relative_to(REPOSITORY)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
