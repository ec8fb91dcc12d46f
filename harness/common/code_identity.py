"""What, besides the configuration, makes the numbers: our sources and the libraries that compute."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ditbench.harness.common.paths import HARNESS

# The rooms whose code can change a number; the others choose, keep, show or tell.
COMPUTING = (
    *("samples", "quant", "backends", "build", "models", "calibration"),
    *("fitting", "generation", "measurement", "stages"),
)
# Of these rooms and of eval, the files that only tell.
TELLERS = frozenset(["conformance.py", "export.py", "export_checks.py", "needs.py", "paired_differences.py"])
TELLERS |= {"schedule.py", "step_finder.py"}
PACKAGES = ("torch", "diffusers", "transformers", "torchmetrics", "torch-fidelity", "clean-fid", "numpy", "scipy")


@cache
def code_identity() -> dict[str, Any]:
    """{sources: one SHA-256, packages: {name: version}}."""
    root = HARNESS.parent
    folders = [*(HARNESS / room for room in COMPUTING), root / "eval"]
    files = [HARNESS / "run.py", *(path for each in folders for kind in ("*.py", "*.cpp") for path in each.rglob(kind))]
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.name not in TELLERS):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return {"sources": digest.hexdigest(), "packages": {name: package_version(name) for name in PACKAGES}}


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
