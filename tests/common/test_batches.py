from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from ditbench.harness.common import memory
from ditbench.harness.common.batches import Batch, OutOfMemory, in_batches, out_of_memory
from ditbench.harness.common.memory import free_memory


class Narrow(nn.Module):
    """Holds `room` rows at a time; more are too many."""

    def __init__(self, room: int, error: BaseException | None = None) -> None:
        super().__init__()
        self.room, self.error, self.calls = room, error or torch.OutOfMemoryError("CUDA out of memory."), []

    def forward(self, x_NC):
        self.calls.append(len(x_NC))
        if len(x_NC) > self.room:
            raise self.error
        return 2 * x_NC


def test_what_does_not_fit_is_halved_and_every_row_comes_once_in_its_order():
    module, batch, x_NC = Narrow(3), Batch(8), torch.arange(20).view(10, 2)
    found = list(in_batches(x_NC, batch, module))
    assert torch.equal(torch.cat([output for _, output in found]), 2 * x_NC)
    assert [len(rows) for rows, _ in found] == [2, 2, 2, 2, 2]
    assert batch.note() == {"size": 2, "asked": 8, "halved_from": [8, 4]}


def test_a_batch_that_was_halved_stays_so_for_whoever_takes_it_next():
    module, batch = Narrow(2), Batch(4, asked="auto")
    list(in_batches(torch.zeros(4, 1), batch, module))
    module.calls.clear()
    list(in_batches(torch.zeros(4, 1), batch, module))
    assert module.calls == [2, 2] and batch.note()["asked"] == "auto"


def test_a_last_batch_that_is_smaller_and_does_not_fit_is_halved_below_its_own_size():
    module, batch = Narrow(2), Batch(64)
    assert [len(rows) for rows, _ in in_batches(torch.zeros(3, 1), batch, module)] == [2, 1]
    assert batch.size == 2 and module.calls == [3, 2, 1]


def test_one_row_that_does_not_fit_is_said_with_what_to_do():
    with pytest.raises(OutOfMemory, match="generate: out of memory on cpu with one sample .* memory=offload"):
        list(in_batches(range(4), Batch(2), lambda rows: Narrow(0)(torch.zeros(len(rows), 1)), what="generate"))


def test_other_errors_are_not_taken_for_it():
    with pytest.raises(RuntimeError, match="same device"):
        list(in_batches(torch.zeros(4, 1), Batch(4), Narrow(1, RuntimeError("expected all on the same device"))))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    ],
)  # fmt: skip
def test_it_is_known_by_what_torch_and_devices_say(error):
    assert out_of_memory(error)


def test_torch_itself_is_understood():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(raised.value)


def test_what_was_made_before_memory_ran_out_is_let_go_before_the_next_try():
    held, alive = [], []

    def do(rows):
        large = torch.zeros(len(rows), 1000)
        alive.append([each() is not None for each in held])
        held.append(weakref.ref(large))
        if len(rows) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return len(rows)

    gc.disable()
    try:
        assert sum(count for _, count in in_batches(range(4), Batch(4), do)) == 4
    finally:
        gc.enable()
    assert alive[:3] == [[], [False], [False, False]]


def test_free_memory_is_the_least_of_what_system_and_container_leave(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    assert free_memory(torch.device("cpu")) is None
    (tmp_path / "meminfo").write_text("MemTotal:  900 kB\nMemAvailable:   500 kB\n")
    assert free_memory(torch.device("cpu")) == 500 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("300000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    assert free_memory(torch.device("cpu")) == 500 * 1024
    (tmp_path / "memory.max").write_text("400000\n")
    assert free_memory(torch.device("cpu")) == 150_000


def test_a_device_tells_what_its_driver_has(second):
    assert free_memory(second) == 8 * 2**30
