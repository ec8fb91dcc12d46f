"""One conformance case per method, and one fresh process that answers for all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest

from ditbench.harness.calibration.recording import calibrate
from ditbench.harness.fitting import conformance
from ditbench.harness.fitting.conformance import SMALL_DIT, Case
from ditbench.harness.models.base import ModelSpec, Sampler
from ditbench.harness.models.loading import load_model

# What `apply_saved` is run in: a process that has fitted nothing. Importing diffusers takes seconds, so there is one for
# all methods, started before it is needed; `ditbench check-method` starts one per method.
SERVER = """
import json, sys, traceback
from ditbench.harness.fitting.conformance import apply_saved
for line in sys.stdin:
    try:
        apply_saved(*json.loads(line))
        answer = ""
    except Exception:
        answer = traceback.format_exc()
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="session", autouse=True)
def fresh_process() -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        yield process
        process.kill()  # it holds nothing that has to be put away


@pytest.fixture
def in_fresh_process(fresh_process: subprocess.Popen, monkeypatch) -> None:
    """conformance's own subprocess call goes to the process that is already there."""

    def run(command: list[str], **unused) -> SimpleNamespace:
        name, folder, seed, scope = command[3:]
        fresh_process.stdin.write(json.dumps([name, folder, int(seed), scope]) + "\n")
        fresh_process.stdin.flush()
        problem = json.loads(fresh_process.stdout.readline())
        return SimpleNamespace(returncode=int(bool(problem)), stderr=problem)

    monkeypatch.setattr(conformance, "subprocess", SimpleNamespace(run=run))


@pytest.fixture(scope="session")
def case_of() -> Callable[..., Case]:
    """case_of(method, scope="blocks"): the same Case for the same arguments, so that a model is drawn once.

    Learned roundings run a tenth of their iterations; `ditbench check-method` asks the same with all of them.
    """

    @cache
    def case(name: str, scope: str = "blocks") -> Case:
        made = Case(name, scope=scope)
        if hasattr(made.params, "iterations"):
            made.params = replace(made.params, iterations=max(1, made.params.iterations // 10))
        return made

    return case


@pytest.fixture(scope="module")
def five_blocks():
    """(target, calibration): enough blocks that three behind the first are not all of them."""
    model = load_model(ModelSpec("five-random-blocks", "dit", random=SMALL_DIT | {"num_layers": 5}))
    return model.target(), calibrate(model, Sampler("ddim", steps=2, guidance=1.0), n=2, seed=0)
