"""The tiny zoo: small models that are really trained here and shipped with the project.

`weights/<name>/` holds a diffusers pipeline folder (model_index.json, transformer/, scheduler/), the judge that
scores it (`judge/`), the loss curve and the model card. `ditbench zoo train <name>` makes all of it again.
"""

from __future__ import annotations

from pathlib import Path

REFERENCE = "reference.npz"  # in a model's folder: real images that it was not trained on, where no package brings them
WEIGHTS = Path(__file__).parent / "weights"
