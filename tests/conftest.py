"""What many tests share: one small random DiT, its target and its calibration, built once and guarded against change."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import second_device
import torch
from torch import Tensor

if not torch.cuda.is_available():
    # Read when triton is first imported, which diffusers does where sageattention is installed: kernels then run on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

from ditbench.harness.calibration.recording import Calibration, calibrate
from ditbench.harness.common.files import tensors_sha256
from ditbench.harness.fitting.conformance import SMALL_DIT
from ditbench.harness.models.base import LoadedModel, ModelSpec, Sampler
from ditbench.harness.models.loading import load_model
from ditbench.harness.quant.target import Target

SMALL = ModelSpec("small-random-dit", "dit", random=SMALL_DIT)


@pytest.fixture(scope="session")
def small_model() -> Iterator[LoadedModel]:
    """2 blocks, 48 wide, 8×8 pixels in 16 tokens, random weights (adaLN included). Not to be changed: see `own_model`."""
    model = load_model(SMALL)
    before = tensors_sha256(model.transformer.state_dict())
    yield model
    assert tensors_sha256(model.transformer.state_dict()) == before, "a test changed the model that all tests share"


@pytest.fixture(scope="session")
def small_target(small_model: LoadedModel) -> Target:
    return small_model.target()


@pytest.fixture(scope="session")
def small_sampler() -> Sampler:
    return Sampler("ddim", steps=4, guidance=1.5)


@pytest.fixture(scope="session")
def small_calibration(small_model: LoadedModel, small_sampler: Sampler) -> Calibration:
    return calibrate(small_model, small_sampler, n=3, seed=0)


@pytest.fixture
def own_model() -> LoadedModel:
    """A copy of `small_model` that the test may change."""
    return load_model(SMALL)


@pytest.fixture(scope="session")
def normal() -> Callable[..., Tensor]:
    """normal(*shape, seed=0): float64, the same for the same seed."""

    def draw(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return draw


@pytest.fixture
def second() -> Iterator[torch.device]:
    """A second device made of the CPU, for this test: see `second_device.py`."""
    if second_device.WHY_NOT:
        pytest.skip(second_device.WHY_NOT)
    with second_device.in_use() as device:
        yield device


@pytest.fixture
def learns(second: torch.device) -> torch.device:
    """The second device, where autograd knows it: torch counts the devices at a process's first backward and never again, so
    what asks for this runs in the fresh process of tests/device/test_learning.py.
    """
    if "FRESH_PROCESS" not in os.environ:
        pytest.skip(
            "tests/device/test_learning.py runs this, in a process that knew the device before its first backward"
        )
    return second


@pytest.fixture(scope="session")
def e4m3_rows() -> None:
    """Skips where torch multiplies e4m3 on the CPU with one scale a tensor only (2.9 and 2.10 do); a GPU has scales by row."""
    if not torch.cuda.is_available():
        x = torch.ones(16, 16).to(torch.float8_e4m3fn)
        try:
            torch._scaled_mm(x, x.t(), torch.ones(16, 1), torch.ones(1, 16), out_dtype=torch.bfloat16)
        except RuntimeError:
            pytest.skip(f"torch {torch.__version__} has no e4m3 product with scales by row on the CPU")
