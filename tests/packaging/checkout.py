"""Where the checkout is, and commands that must succeed."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def checked(command: list[str], **kwargs) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{command[:6]}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done
