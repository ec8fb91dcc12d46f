"""What chips that are not here would take: compiled for them by `chips.py`, launched on none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="the compiler of the kernels")

from triton.runtime.errors import OutOfResources  # noqa: E402

from ditbench.harness.backends.triton_kernels import launch, ways  # noqa: E402
from ditbench.harness.common.errors import UserError  # noqa: E402
from ditbench.harness.common.paths import CONF  # noqa: E402
from ditbench.harness.quant.transforms import Hadamard  # noqa: E402

CHIPS = ("sm_80", "sm_89", "sm_90", "sm_100")
SHARED_KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227}
WIDTHS = (1152, 1536, 2304, 3072, 4608, 6144, 9216, 12288)
SMALLER = [64, 64, 64, 4, 3]
FULL = OutOfResources(344064, 232448, "shared memory")


@pytest.fixture(scope="module")
def found():
    """{chip: {what was asked: {way, loaded} or {failure}}}, by one process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(CONF.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    run = [sys.executable, str(Path(__file__).with_name("chips.py"))]
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("chip", CHIPS)
def test_what_a_chip_takes_fits_its_shared_memory_and_its_registers(found, chip):
    assert {name: answer["failure"] for name, answer in found[chip].items() if "failure" in answer} == {}
    for name, answer in found[chip].items():
        for kernel in answer["loaded"]:
            assert kernel["shared"] <= 1024 * SHARED_KIB[chip], name
        if answer["loaded"] and name != "many of W4A16":
            assert answer["loaded"][-1]["stack"] <= 512, name


@pytest.mark.parametrize("chip", CHIPS)
def test_what_stands_between_products_is_held_in_registers(found, chip):
    """A row of every width is whole in a program; its sums go through little shared memory. Widths whose tiles are alike load nothing new."""
    names = [f"norm {width}" for width in WIDTHS] + ["others"] + ["norm to e4m3"] * (chip != "sm_80")
    kernels = [kernel for name in names for kernel in found[chip][name]["loaded"]]
    assert Counter(kernel["name"] for kernel in kernels) == Counter(
        {"normed_kernel": 6 + (chip != "sm_80"), "gated_kernel": 1, "rotary_kernel": 1, "activate_kernel": 1}
    )
    assert max(kernel["stack"] for kernel in kernels) <= 16
    assert max(kernel["shared"] for kernel in kernels) <= 16 * 1024


@pytest.mark.parametrize("width", WIDTHS)
def test_rotated_rows_are_fused_wherever_their_tile_fits(found, width):
    """On sm_100 none compiled from 2304 on. The largest tile takes 96 KiB of Ada's 99 in Triton 3.6, 128 from 3.7 on."""
    for chip in CHIPS if width < 8192 else ("sm_80", "sm_90", "sm_100"):
        assert found[chip][f"rows {width}"]["way"] is True, chip


def test_few_outputs_of_packed_weights_fall_to_a_tile_that_fits(found):
    """They took 128 × 128 × 128 unasked: 336 KiB of Hopper's 227 in W4A16, 144 of Ada's 99 in W4A8."""
    assert found["sm_90"]["W4A16"]["way"] == [64, 128, 128, 4, 4]
    assert found["sm_89"]["W4A16"]["way"] == found["sm_89"]["W4A8 looked up"]["way"] == SMALLER
    assert found["sm_89"]["W4A8"]["way"] == [64, 128, 128, 4, 4]


def test_many_outputs_find_a_tile_where_the_large_ones_do_not_fit(found):
    """Of W4A16 Ada has room for none that the search knew."""
    answer = found["sm_89"]["many of W4A16"]
    assert (
        answer["way"] == SMALLER and len(answer["loaded"]) == 1
    )  # the least was loaded before; every larger is refused


def test_a_tile_that_spills_is_passed_over(found):
    """Rows of 4608 in float32 keep over a KiB a thread in memory on Ampere: torch rotates them instead."""
    fused, pieces = found["sm_80"]["float32 rows 4608"]["loaded"]
    assert found["sm_80"]["float32 rows 4608"]["way"] is False
    assert fused["stack"] > 512 >= pieces["stack"]


@pytest.fixture
def forgotten():
    ways.forget()
    yield
    ways.forget()


class Compiled:
    def __init__(self, n_spills: int) -> None:
        self.n_spills = n_spills


def caller(answers, calls):
    """call(way) → what stands for it in answers, raised where it is an error."""

    def call(way):
        calls.append(way)
        if isinstance(answers[way], Exception):
            raise answers[way]
        return Compiled(answers[way])

    return call


def test_the_first_way_that_fits_is_remembered_for_its_key(forgotten):
    calls = []
    call = caller({"large": FULL, "broken": RuntimeError("PassManager::run failed"), "small": 3, "least": 0}, calls)
    ways.run(("key",), call, ("large", "broken", "small", "least"))
    assert calls == ["large", "broken", "small", "small"]
    ways.run(("key",), call, ("large", "broken", "small", "least"))
    assert calls[4:] == ["small"]
    ways.run(("another",), call, ("least",))
    assert calls[5:] == ["least"]


def test_where_all_spill_the_least_is_taken(forgotten):
    calls = []
    ways.run(("key",), caller({"a": 4000, "b": 200, "c": 900}, calls), ("a", "b", "c"))
    assert calls == ["a", "b", "c", "b"]


@pytest.mark.parametrize("timed", [True, False])
def test_a_device_that_takes_no_way_says_which_limit_it_has(forgotten, timed, monkeypatch):
    monkeypatch.setattr(ways.triton.testing, "do_bench", lambda call, **settings: call())
    with pytest.raises(UserError, match="Required: 344064, Hardware limit: 232448.*backend=simulate"):
        ways.run(("key",), caller({"a": FULL, "b": FULL}, []), ("a", "b"), timed=timed)


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("a bug")], ids=str)
def test_other_errors_are_not_taken_for_a_refusal(forgotten, timed, error, monkeypatch):
    monkeypatch.setattr(ways.triton.testing, "do_bench", lambda call, **settings: call())
    with pytest.raises(type(error)):
        ways.run(("key",), caller({"a": error, "b": 0}, []), ("a", "b"), timed=timed)


def test_a_kind_of_arguments_tells_what_compiles_apart():
    x = torch.zeros(2)
    assert ways.kinds([x, None, 3]) == ways.kinds([torch.ones(5), None, 3])
    assert ways.kinds([x]) != ways.kinds([x.bfloat16()]) != ways.kinds([None]) and ways.kinds([3]) != ways.kinds([4])


def test_kernels_are_launched_on_the_device_of_their_tensors(forgotten, monkeypatch):
    """Triton takes the current device, whatever its arguments lie on: `cuda:1` in a process whose current device is 0."""
    current, launched = ["cuda:0"], []

    @contextmanager
    def device(wanted):
        current.append(str(wanted))
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: launched.append(current[-1])

    monkeypatch.setattr(launch.torch.cuda, "device", device)
    monkeypatch.setattr(launch, "_rotation_sides", lambda *arguments: (None, None))
    for name in ("quantize_rows_kernel", "int_product_kernel", "float_product_kernel"):
        monkeypatch.setattr(launch, name, Kernel())
    with FakeTensorMode():  # whose tensors say that they lie on a GPU
        x_MC, codes_MC, stored = (
            torch.empty(rows, 32, device="cuda:1", dtype=dtype)
            for rows, dtype in ((3, torch.float32), (3, torch.int8), (4, torch.int8))
        )
        scale = torch.empty(4, 1, device="cuda:1")
        ends = (None, None, None, torch.bfloat16)
        for rotation in ([], [4, 8]):
            launch.quantize_rows._init_fn(x_MC, *[None] * 3, rotation, None, None, 1.0, -127, 127, False, False)
        launch.int_product._init_fn(codes_MC, scale, scale, stored, scale, None, None, 0, *ends)
        launch.float_product._init_fn(x_MC, None, None, stored, False, scale, None, None, 0, *ends)
    assert set(launched) == {"cuda:1"} and len(launched) >= 4


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.skipif(torch.cuda.is_available(), reason="refuses in the interpreter")
def test_rows_whose_tile_is_refused_are_rotated_by_torch_to_the_same_codes(forgotten, kept, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x_MC = torch.randn(6, 48, generator=generator).to(dtype)
    shift_C, scale_C = torch.randn(48, generator=generator), torch.rand(48, generator=generator) + 0.5
    signs_C = Hadamard(48, torch.randn(48, generator=generator).sign()).signs_C
    way = (x_MC, shift_C, scale_C, signs_C, [2, 4], None, None, 0.9, 0, 255, False, kept)
    fused = launch.quantize_rows(*way)
    kernel, refused = launch.quantize_rows_kernel, []

    class NoRoom:
        def __getitem__(self, grid):
            def call(*arguments, **constants):
                if arguments[5] is not None:  # the right side of a rotation
                    refused.append(grid)
                    raise FULL
                return kernel[grid](*arguments, **constants)

            return call

    ways.forget()
    monkeypatch.setattr(launch, "quantize_rows_kernel", NoRoom())
    pieces = launch.quantize_rows(*way)
    assert len(refused) == 1
    assert (fused[0].int() - pieces[0].int()).abs().max() <= 1 and (fused[0] != pieces[0]).float().mean() < 0.02
    torch.testing.assert_close(pieces[1], fused[1], rtol=1e-5, atol=0)
    assert torch.equal(pieces[2], fused[2]) and pieces[3].dtype == dtype
    torch.testing.assert_close(pieces[3], fused[3], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
