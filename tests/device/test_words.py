"""A device that is registered by whoever imports it is known by its name wherever devices are named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ditbench.harness.backends.matrix import format_matrix
from ditbench.harness.bench.parts import shares
from ditbench.harness.bench.roofline import roofline
from ditbench.harness.cli.doctor import examine
from ditbench.harness.common import devices
from ditbench.harness.common.errors import UserError


def test_it_is_taken_by_name_and_named_among_what_is_known_here(second):
    assert devices.pick_device("second_device") == torch.device("second_device")
    assert devices.pick_device("second_device:0") == second
    assert "second_device:0" in devices.known_here() and torch.device("second_device") in devices.kinds_here()
    with pytest.raises(UserError, match="known here: auto, cpu, second_device:0"):
        devices.pick_device("second_devise")


def test_nobody_takes_it_unasked(second):
    assert devices.pick_device("auto").type != "second_device"


def test_kernels_and_doctor_speak_of_it(second, tmp_path):
    rows = [line.split() for line in format_matrix().splitlines()]
    assert any(row[:3] == ["W8A8", "second_device", "simulated"] for row in rows), rows
    assert "second_device: a second device made of the CPU; device=second_device takes it" in examine(tmp_path)


def test_its_peaks_are_measured_and_where_its_time_goes_is_refused_in_a_line(second, monkeypatch):
    monkeypatch.setattr("ditbench.harness.bench.roofline.SIDE", 64)
    monkeypatch.setattr("ditbench.harness.bench.roofline.COPIED_BYTES", 2**16)
    assert set(roofline(second, repeats=1)) == {"bf16 TFLOP/s", "copy GB/s"}
    with pytest.raises(UserError, match="torch's profiler sees no time of a second_device"):
        shares(nn.Linear(2, 2), {}, second)
