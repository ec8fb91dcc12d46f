"""Chips that are not here: a Triton driver that compiles for them, refuses what they have no room for, and launches nothing.

    with chip("sm_90") as hopper:
        launch.int_product(...)        # compiled as it would be launched there
    hopper.loaded                      # what it has room for: [Loaded(name, shared, registers, stack)]

Outputs are whatever `torch.empty` gave. Not for a process in which Triton is interpreted (TRITON_INTERPRET=1), so the tests run

    python tests/backends/chips.py     # JSON: what every chip takes for the rows of every width and the products of every format
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from ditbench.harness.backends.activations import GELU_ERF, NUMBERS
from ditbench.harness.backends.triton_kernels import between, launch, ways
from ditbench.harness.quant.hadamard import balanced_factors

KIB = 1024
SHARED = {  # bytes that one block can have
    "sm_80": 163 * KIB,  # Ampere: A100
    "sm_89": 99 * KIB,  # Ada: RTX 4090, L40
    "sm_90": 227 * KIB,  # Hopper: H100, H200
    "sm_100": 227 * KIB,  # Blackwell: B200
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
WIDTHS = (1152, 1536, 2304, 3072, 4608, 6144, 9216, 12288)
TOKENS, OUTPUTS = 16, 3072  # few enough outputs that no tile is timed
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Loaded:
    name: str
    shared: int  # bytes of a block
    registers: int  # of a thread
    stack: int  # bytes of a thread: what its registers do not hold


@dataclass
class Chip:
    """The part of Triton's driver that compiling and loading ask."""

    name: str
    loaded: list[Loaded] = field(default_factory=list)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(self.name.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        return list(SHARED).index(self.name)  # Triton keeps what it compiled by it

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *arguments: None

    @property
    def utils(self) -> SimpleNamespace:
        properties = {"max_shared_mem": SHARED[self.name]}
        return SimpleNamespace(get_device_properties=lambda device: properties, load_binary=self._load)

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        registers, stack = resources(binary)
        self.loaded.append(Loaded(name, shared, registers, stack))
        return object(), object(), registers, stack // 4, 1024


def resources(binary: bytes) -> tuple[int, int]:
    """Registers and bytes of stack that a thread of this cubin takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        run = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


@contextmanager
def chip(name: str) -> Iterator[Chip]:
    ways.forget()  # what another chip took: the tensors of all of them lie on the CPU
    triton.runtime.driver.set_active(made := Chip(name))
    try:
        yield made
    finally:
        triton.runtime.driver._active = None
        ways.forget()


def rows(width: int, dtype: torch.dtype = BF16) -> None:
    """Rotated over their whole width, to int8."""
    x_MC = torch.empty(TOKENS, width, dtype=dtype)
    launch.quantize_rows(x_MC, *[None] * 3, list(balanced_factors(width)), None, None, 1.0, -127, 127, False, False)


def product(kind: str, tokens: int = TOKENS, width: int = 3072, group: int | None = None) -> None:
    """int8, 4-bit or looked-up weights, with a bias and a GELU (with erf, the longest end); weights and activations of integers with zero points."""
    empty: Callable[..., Tensor] = torch.empty
    groups = 1 if group is None else width // group
    codes_MC, scale_M = empty(tokens, width, dtype=torch.int8), empty(tokens)
    zero_M, bias_O = empty(tokens, dtype=torch.int32), empty(OUTPUTS, dtype=BF16)
    scale_OG, zero_OG = empty(OUTPUTS, groups), empty(OUTPUTS, groups, dtype=torch.int16)
    row_sum_O = empty(OUTPUTS, dtype=torch.int32 if groups == 1 else torch.float32)
    bytes_OC, halves_OC = empty(OUTPUTS, width, dtype=torch.int8), empty(OUTPUTS, width // 2, dtype=torch.uint8)
    ends = (bias_O, None, None, BF16, NUMBERS[GELU_ERF])
    if kind in ("W8A8", "W4A8"):
        stored = bytes_OC if kind == "W8A8" else halves_OC
        launch.int_product(codes_MC, scale_M, zero_M, stored, scale_OG, zero_OG, row_sum_O, 0, *ends)
    elif kind == "W4A16":
        launch.float_product(codes_MC.to(BF16), None, None, halves_OC, True, scale_OG, zero_OG, None, 0, *ends)
    else:
        table_OL = empty(OUTPUTS, 16)
        launch.float_product(codes_MC, scale_M, zero_M, halves_OC, True, None, None, table_OL, 0, *ends)


def norm(width: int, number: str = "int") -> None:
    """LayerNorm with a modulation by sample, to int8 or e4m3."""
    x, row = torch.empty(1, TOKENS, width, dtype=BF16), torch.empty(1, width, dtype=BF16)
    bounds = (-127, 127, False) if number == "int" else (-448, 448, True)
    between.normed_rows(x, row, row, 1e-6, True, None, None, 1.0, *bounds, False)


def others() -> None:
    """A norm alone, of a head and of a token; a gate; positions; an activation."""
    x, row = torch.empty(1, TOKENS, 3072, dtype=BF16), torch.empty(1, 3072)
    heads, table = x.view(1, TOKENS, 24, 128), torch.empty(TOKENS, 128)
    between.normed(heads.flatten(1, 2), row[:, :128], None, 1e-6, False)
    between.normed(x, row, row, 1e-6, True)
    between.gated(x, row, x)
    between.rotary(heads, table, table)
    between.activate(x, NUMBERS[GELU_ERF], BF16)


def loaded(made: Chip, call: Callable[[], None]) -> dict[str, Any]:
    """What was loaded, in the one way there is."""
    made.loaded.clear()
    try:
        call()
    except Exception as error:
        return {"failure": f"{type(error).__name__}: {error}"}
    return {"loaded": [asdict(kernel) for kernel in made.loaded]}


def taken(made: Chip, call: Callable[[], None]) -> dict[str, Any]:
    """The way that was taken, what was loaded for it, and the message where every way is refused."""
    ways.forget()
    made.loaded.clear()
    try:
        call()
    except Exception as error:
        return {"failure": f"{type(error).__name__}: {error}"}
    (way,) = ways.known()
    return {"way": way, "loaded": [asdict(kernel) for kernel in made.loaded]}


def main() -> None:
    found: dict[str, Any] = {}
    for name in SHARED:
        with chip(name) as made:
            # Widths whose tiles are alike load nothing new.
            found[name] = {f"rows {width}": taken(made, lambda width=width: rows(width)) for width in WIDTHS}
            found[name] |= {kind: taken(made, lambda kind=kind: product(kind)) for kind in ("W8A8", "W4A8", "W4A16")}
            found[name] |= {f"norm {width}": loaded(made, lambda width=width: norm(width)) for width in WIDTHS}
            found[name]["others"] = loaded(made, others)
            if name != "sm_80":  # which has no e4m3
                found[name]["norm to e4m3"] = loaded(made, lambda: norm(3072, "e4m3"))
    with chip("sm_80") as ampere:
        found["sm_80"]["float32 rows 4608"] = taken(ampere, lambda: rows(4608, torch.float32))
    triton.testing.do_bench = lambda call, **settings: float(call() is None)
    with chip("sm_89") as ada:
        found["sm_89"]["W4A16 in groups"] = taken(ada, lambda: product("W4A16", group=64))
        found["sm_89"]["W4A8 looked up"] = taken(ada, lambda: product("W4A8 looked up"))
        found["sm_89"]["many of W4A16"] = taken(ada, lambda: product("W4A16", tokens=1024))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
