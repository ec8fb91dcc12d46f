"""What a record says of the machine and the software that made it."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from typing import Any

import torch

import ditbench
from ditbench.harness.common.code_identity import PACKAGES, package_version
from ditbench.harness.common.devices import device_name
from ditbench.harness.common.paths import HARNESS
from ditbench.harness.common.precision import float32_precision


def environment(device: torch.device, seed: int) -> dict[str, Any]:
    return {
        "ditbench": ditbench.__version__,
        "git": git_commit(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "float32": float32_precision(),
        "seeds": {"seed": seed},
        "finished_at": now(),
    }


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


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
