"""Kills, damaged files and a second process change nothing: a short sweep here, a long one with `python tests/run/chaos.py 30`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import chaos

import ditbench


def test_a_sweep_that_is_killed_and_damaged_ends_as_an_undisturbed_one():
    environment = os.environ | {"PYTHONPATH": str(Path(ditbench.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, chaos.__file__, "4", "0", "-m", "method=rtn,smoothquant", "bits=w4a8"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] == 4 and found["runs"] == 2
    assert found["what differs"] == [] and found["leftovers"] == [] and found["tracebacks"] == 0
