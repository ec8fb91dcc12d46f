"""What a command said and left, and how a refusal reads: one or two lines."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from warm import Warm

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


@cache
def _warm() -> Warm:
    return Warm(environment=os.environ | {"PYTHONPATH": str(Path(ditbench.__file__).parents[1])})


def process(*arguments: str, cwd: Path | None = None, path: Sequence[Path] = ()) -> Outcome:
    """The command in a process of its own, there; path: folders that modules are looked for in first."""
    root = Path(ditbench.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*path, root)))}
    done = _warm()(*arguments, cwd=cwd or Path.cwd(), environment=environment, path=path)
    return Outcome(done.returncode, done.stdout, done.stderr)


def records(results_dir: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(results_dir.glob("runs/*/*/record.json"))]


def statuses(results_dir: Path) -> list[str]:
    return [values["status"] for values in records(results_dir)]
