"""Judges: small classifiers that come with an embedded model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError

from ditbench.eval.base import FeatureModel
from ditbench.harness.common.devices import CPU
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import file_sha256
from ditbench.harness.models.zoo import judge


def load_judge(folder: Path, device: torch.device = CPU) -> FeatureModel:
    """The judge saved in folder (config.json, model.safetensors), on the device; its name is that of the folder and its parent."""
    try:
        module = judge.load(folder).to(device)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{folder}: expected a judge (config.json and model.safetensors), came {type(error).__name__}: {error}; "
            "reinstall ditbench or train the embedded model again"
        ) from error
    name = "/".join(folder.resolve().parts[-2:])
    return FeatureModel(name, module, judge.FEATURE_WIDTH, file_sha256(folder / "model.safetensors"))
