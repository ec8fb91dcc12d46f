"""The same metrics on the CPU and on the second device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from operations import counted

from ditbench.eval.base import Evidence, evaluate


def same_there(names: Sequence[str], given: Evidence, device: torch.device, least: float = 0.99) -> None:
    """Assert that they give the CPU's values there, and that `least` of their floating-point operations run there."""
    near = evaluate(names, given)
    with counted() as ops:
        far = evaluate(names, replace(given, device=device))
    assert all(entry["status"] == "ok" for entry in (*near.values(), *far.values())), (near, far)
    assert ops.share_on_second_device() >= least, ops.report()
    for name in names:
        assert far[name]["value"] == pytest.approx(near[name]["value"], rel=1e-5, abs=1e-6), name
        assert far[name]["passport"] == near[name]["passport"]
