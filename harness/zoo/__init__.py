"""How the embedded models are trained: `ditbench zoo train NAME`; the models themselves are in `harness/models/zoo`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ditbench.harness.models.zoo import WEIGHTS

Train = Callable[[Path | None, Path], tuple[Path, dict[str, Any]]]


def trainable() -> dict[str, Train]:
    """{name: train(folder or None, checkpoints) -> (folder, the card's numbers)} of every zoo model."""

    def trainer(name: str) -> Train:
        def train(folder: Path | None, checkpoints: Path) -> tuple[Path, dict[str, Any]]:
            module = importlib.import_module(f"ditbench.harness.zoo.{name.replace('-', '_')}")
            folder = folder or WEIGHTS / name
            return folder, module.make(folder, checkpoints)

        return train

    files = [path.stem for kind in ("tiny", "small") for path in Path(__file__).parent.glob(f"{kind}_*.py")]
    return {name: trainer(name) for name in sorted(file.replace("_", "-") for file in files)}
