"""What a command said and left, and how a refusal reads: one or two lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import ditbench

REFUSED, FAILED = 2, 3

TINY = (
    "model=tiny-dit",
    "protocol.n=4",
    "protocol.steps=2",
    "calibration.n=2",
    "metrics=fidelity",
    "metrics.resamples=5",
    "generate.noise_floor_seeds=0",
    "measure.repeats=1",
    "measure.warmup=0",
    "measure.samples=1",
    "tracker=none",
)


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        """What was said on stderr, without the progress bars."""
        lines = [line.rsplit("\r", 1)[-1] for line in self.err.splitlines()]
        return [line for line in lines if line.strip() and "%|" not in line]


def assert_short(outcome: Outcome, *words: str) -> None:
    assert "Traceback" not in outcome.err
    assert 1 <= len(outcome.error_lines) <= 2, outcome.err
    assert outcome.error_lines[0].startswith("ditbench: ")
    for word in words:
        assert word in "\n".join(outcome.error_lines)


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with these variables added to the environment."""
    code = "from ditbench.harness.cli import entry; entry()"
    root = str(Path(ditbench.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": root} | environment,
    )


def records(results_dir: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(results_dir.glob("runs/*/*/record.json"))]


def statuses(results_dir: Path) -> list[str]:
    return [values["status"] for values in records(results_dir)]
