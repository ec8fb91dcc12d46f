"""What goes backward on the second device, in a process that knew the device before its first backward."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import second_device

TESTS = Path(__file__).resolve().parents[1]
FILES = ("device/test_methods_on_a_device.py", "test_second_device.py")
LEARNS = "that_learns or training_is or gradient_of_attention"


@pytest.mark.skipif(bool(second_device.WHY_NOT), reason=second_device.WHY_NOT)
def test_learning_on_the_device_is_the_cpus_in_a_fresh_process():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES, "-k", LEARNS]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")} | {
        "FRESH_PROCESS": "1"
    }
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) == 10 and "skipped" not in done.stdout.splitlines()[-1]
