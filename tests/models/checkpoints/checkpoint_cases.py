"""How these tests load a checkpoint, or hear why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditbench.harness.common.errors import UserError
from ditbench.harness.models.base import LoadedModel, ModelSpec
from ditbench.harness.models.loading import load_model

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.0.attn.to_q"


def spec(source: Path | str, family: str = "flux", **more) -> ModelSpec:
    return ModelSpec("mine", family, source=str(source), **more)


def load(source: Path | str, family: str = "flux", **more) -> LoadedModel:
    return load_model(spec(source, family, **more))


def refused(source: Path | str, family: str = "flux", **more) -> str:
    """The one line that is said."""
    with pytest.raises(UserError) as error:
        load(source, family, **more)
    said = str(error.value)
    assert said.startswith("model mine") and "\n" not in said
    return said


def weights(model: LoadedModel) -> dict[str, Tensor]:
    return model.transformer.state_dict()


def edit(path: Path, **values) -> None:
    """Set values in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(file: Path, change) -> None:
    """change(tensors) alters a weight file's tensors in place."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
