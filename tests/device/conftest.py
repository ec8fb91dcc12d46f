"""A small FLUX that tests of devices share."""

from __future__ import annotations

import pytest
import torch
from small_pipelines import SIZES, SMALL

from ditbench.harness.models.base import LoadedModel, ModelSpec
from ditbench.harness.models.loading import load_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LoadedModel:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("flux")
    SMALL["flux"]().save_pretrained(folder)
    return load_model(ModelSpec("small-flux", "flux", source=str(folder), size=SIZES["flux"]))
