"""What a record says of the machine and the software that made it."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import ditbench
from ditbench.harness.measure import device_name
from ditbench.harness.paths import HARNESS

# Modules that only choose, show or tell: editing them changes no number.
TELLERS = frozenset(
    ["cli.py", "sweep.py", "listing.py", "doctor.py", "conformance.py", "papers.py", "tracking.py"]
    + ["needs.py", "paired.py", "sample_values.py", "parity_check.py", "export.py", "export_runs.py"]
    + ["progress.py", "record.py", "paths.py", "errors.py", "compose.py", "environment.py"]
)
PACKAGES = ("torch", "diffusers", "transformers", "torchmetrics", "torch-fidelity", "clean-fid", "numpy", "scipy")


def environment(device: torch.device, seed: int) -> dict[str, Any]:
    return {
        "ditbench": ditbench.__version__,
        "git": git_commit(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "seeds": {"seed": seed},
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache
def code_identity() -> dict[str, Any]:
    """What, besides the configuration, makes the numbers: our sources and the libraries that compute."""
    root = HARNESS
    files = [*root.glob("*.py"), *(root.parent / "eval").glob("*.py")]
    folders = [root / folder for folder in ("quant", "backends", "models")]
    files += [path for folder in folders for kind in ("*.py", "*.cpp") for path in folder.rglob(kind)]
    chosen = sorted(path for path in files if path.name not in TELLERS)
    digest = hashlib.sha256()
    for path in chosen:
        digest.update(path.relative_to(root.parent).as_posix().encode() + path.read_bytes())
    return {"sources": digest.hexdigest(), "packages": {name: package_version(name) for name in PACKAGES}}


@cache
def git_commit() -> str | None:
    """Commit of the checkout that this code runs from, with "-dirty" for uncommitted changes; None in a wheel."""
    root = HARNESS.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
