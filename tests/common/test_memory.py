import ctypes
import sys

import pytest
import torch

from ditbench.harness.common import memory
from ditbench.harness.common.memory import peak_memory

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="process memory is read from /proc")
def test_the_peak_counts_what_was_freed_again_and_starts_anew():
    with peak_memory(torch.device("cpu")) as first:
        bytearray(200 * MIB)
    with peak_memory(torch.device("cpu")) as second:
        pass
    assert first.peak_bytes - first.before_bytes >= 190 * MIB
    assert second.peak_bytes - second.before_bytes < 100 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="process memory is read from /proc")
@pytest.mark.parametrize("where", ["before", "within", "after"])
def test_a_stretch_within_another_hides_nothing_from_it(where):
    with peak_memory(torch.device("cpu")) as outer:
        bytearray(200 * MIB if where == "before" else 1)
        with peak_memory(torch.device("cpu")) as inner:
            bytearray(200 * MIB if where == "within" else 1)
        bytearray(200 * MIB if where == "after" else 1)
    assert outer.peak_bytes - outer.before_bytes >= 190 * MIB
    assert (inner.peak_bytes - inner.before_bytes >= 190 * MIB) == (where == "within")


def test_a_stretch_that_fails_is_over(monkeypatch):
    with pytest.raises(ValueError), peak_memory(torch.device("cpu")):
        raise ValueError
    assert memory._measured == []


def test_where_the_system_does_not_tell_nothing_is_claimed(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "PROCESS", tmp_path / "absent")
    with peak_memory(torch.device("cpu")) as found:
        pass
    assert found.peak_bytes is None and found.before_bytes is None


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the allocator is not that of glibc")
def test_holes_between_tensors_that_stay_are_given_back():
    tensors = [torch.ones(25_000) for _ in range(2000)]  # 100 kB each: small enough to lie side by side
    tensors = tensors[::2]
    with peak_memory(torch.device("cpu")) as with_holes:
        memory.trim()
    with peak_memory(torch.device("cpu")) as without:
        pass
    assert without.before_bytes < with_holes.before_bytes - 50 * MIB
    assert len(tensors) == 1000
