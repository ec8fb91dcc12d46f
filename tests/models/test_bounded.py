"""Random models that nobody has room for are refused before their memory is touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ditbench.harness.common.errors import UserError
from ditbench.harness.models import bounded as module
from ditbench.harness.models.bounded import bounded


def test_weights_count_until_memory_is_spent(monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda device: 1000)
    with torch.device("meta"), bounded("model.random", weights=True):
        nn.Linear(10, 20)  # 880 bytes
    refused = pytest.raises(UserError, match="model.random: it would take more")
    with torch.device("meta"), refused, bounded("model.random", weights=True):
        nn.Sequential(nn.Linear(10, 20), nn.Linear(10, 20))


def test_a_plan_counts_tables_only(monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda device: 1000)
    with torch.device("meta"), bounded("model.random", weights=False):
        nn.Linear(100, 200)
        with pytest.raises(UserError, match="model.random"):
            nn.Module().register_buffer("table", torch.zeros(251))


def test_too_many_tensors_are_refused_and_nothing_is_counted_afterwards(monkeypatch):
    monkeypatch.setattr(module, "MOST_TENSORS", 3)
    with pytest.raises(UserError, match="more than 3 tensors"), bounded("model.random", weights=True):
        nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    nn.Sequential(*(nn.Linear(1, 1) for _ in range(5)))
