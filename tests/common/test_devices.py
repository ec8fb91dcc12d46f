"""Any device of torch's is taken by its name; one that is not here is refused in a line."""

from __future__ import annotations

import pytest
import torch

from ditbench.harness.common import devices
from ditbench.harness.common.errors import UserError


@pytest.mark.parametrize("name", ["cpu", "cpu:0", "auto"])
def test_the_cpu_is_one_device(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.pick_device(name) == torch.device("cpu")


@pytest.mark.parametrize("name", ["cpu:x", "=3", "3", "gpu", "meta", "cuda:99", "", "xla", "vulkan", "fpga:1"])
def test_what_is_no_device_here_is_refused_in_one_line(name):
    with pytest.raises(UserError, match="cannot be used here") as refused:
        devices.pick_device(name)
    assert "\n" not in str(refused.value) and "known here: auto, cpu" in str(refused.value)


@pytest.mark.parametrize("name", ["mps", "foo", "CPU", "gpu", "xla", "=3", "vulkan"])
def test_a_refusal_is_short_whatever_torch_says_of_its_backends(name):
    with pytest.raises(UserError) as refused:
        devices.pick_device(name)
    assert len(str(refused.value).partition("; known here")[0]) < 180


def test_a_refusal_says_what_is_missing_or_how_to_write_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for built, name, words in (
        (False, "cuda:7", "this torch is built without CUDA"),
        (True, "cuda:7", "no CUDA device, or no driver for one"),
        (False, "mps", "no MPS here"),
        (False, "CPU", "write it cpu"),
    ):
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda built=built: built)
        assert words in devices._why_not(name, RuntimeError("a page. of words"))


def test_the_cpu_says_its_model_and_threads_and_counts_no_memory():
    cpu = torch.device("cpu")
    assert f"({torch.get_num_threads()} threads)" in devices.device_name(cpu)
    assert devices.memory_of(cpu) is None
    devices.synchronize(cpu)
