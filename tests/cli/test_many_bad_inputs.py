"""Hundreds of bad inputs over all commands: refused before anything heavy, in one or two lines that name what is wrong."""

from __future__ import annotations

import copy
import shlex
from functools import reduce
from importlib.util import find_spec
from pathlib import Path

import pytest
from bad_files import make_files
from bad_inputs import CASES as OF_MOST_COMMANDS
from outcomes import REFUSED, TINY

from ditbench.harness.cli.command_line import COMMANDS
from ditbench.harness.common.errors import UserError
from ditbench.harness.stages.config import parse
from ditbench.harness.sweep.compose import composed
from ditbench.harness.sweep.engines.base import chosen

CASES = [
    *OF_MOST_COMMANDS,
    ("status nope", "nope"),
    ("status", "experiment"),
    ("retry nope", "nope"),
    ("retry nope --failed --missing", "--missing"),
    ("RUN launcher.per_run=2", "launcher=local is one process"),
    ("RUN sweep.of=../../x", "sweep.of"),
    ("export method=rtn bits=w4a8 --out .", "exists; an export overwrites nothing"),
    (
        "export method=rtn bits=w4a8 --out /proc/nowhere/export",
        "/proc/nowhere/export cannot be made",
        "choose another --out",
    ),
    ("export method=rtn bits=w4a8 --out /dev/null/export", "--out", "/dev/null"),
    ("RUN method=dvd_quant method.seed=-1", "method.seed must be at least 0"),
    ("RUN method=dvd_quant method.seed=99999999999999999999", "method.seed must be at most", "67 bits"),
    ("RUN method=svdquant method.rank=99999999999999999999", "method.rank must be at most"),
    ("RUN method=quarot method.damp=-5", "method.damp must be at least 0, got -5"),
    ("RUN method=segquant method.floor=0", "method.floor must be above 0, got 0"),
    ("RUN method=htg method.floor=-1e-9", "method.floor must be above 0"),
    ("RUN method=flatquant method.learning_rate=-1", "method.learning_rate must be at least 0"),
    ("RUN method=gptq method.max_bytes=0", "method.max_bytes must be at least 1"),
    ("RUN method=q_dit method.block=0", "method.block must be at least 1"),
    ("RUN method=q_dit method.crossovers=-2", "method.crossovers must be at least 0"),
    ("RUN method=q_diffusion method.scale_iterations=-2", "method.scale_iterations must be at least 0"),
    ("RUN calibration.select=salient calibration.n=0", "calibration.n=0 records nothing", "calibration.select=all"),
    ("RUN bits=fp8_block bits.weight.block_rows=1000000", "block_rows", "65,536"),
    ("RUN bits=nvfp4 bits.act.group_size=99999999", "group_size", "65,536"),
]


class WentOn(BaseException):
    """Whatever catches errors does not catch this one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, finished_once) -> Path:
    made = tmp_path_factory.mktemp("bad")
    make_files(made, finished_once)
    return made


@pytest.fixture(autouse=True)
def nothing_heavy(monkeypatch):
    def went_on(*args, **kwargs):
        raise WentOn

    for name in ("run.carry_out", "cli.parity.calibrate", "cli.export.calibrate", "bench.benchmark.Round.rows"):
        monkeypatch.setattr(f"ditbench.harness.{name}", went_on)
    monkeypatch.setattr("ditbench.harness.zoo.trainable", lambda: dict.fromkeys(("tiny-dit", "tiny-t2i"), went_on))
    for name in ("HF_HUB_OFFLINE", "DITBENCH_OFFLINE"):
        monkeypatch.setenv(name, "1")


@pytest.mark.parametrize(("line", "words"), [(case[0], case[1:]) for case in CASES], ids=lambda each: str(each)[:60])
def test_a_bad_input_is_refused_in_a_line_that_names_it(ditbench, folder, monkeypatch, line, words):
    if "model.lora" in line and find_spec("peft") is None:
        pytest.skip("without peft all adapters are refused")
    monkeypatch.chdir(folder)
    before = {path.name for path in folder.iterdir()}
    command, *rest = shlex.split(line)
    outcome = ditbench("run", *TINY, "results_dir=out", *rest) if command == "RUN" else ditbench(command, *rest)
    assert outcome.code == REFUSED, outcome
    lines = [each for each in outcome.error_lines if ": run " not in each]  # which says that a run begins
    assert 1 <= len(lines) <= 2 and lines[-1].startswith("ditbench: ") and "Traceback" not in outcome.err, outcome.err
    assert all(word in "\n".join(lines) for word in words), outcome.err
    assert outcome.out == "", "said something on stdout before it refused"
    assert len(outcome.err) < 5000, "a screenful or more"
    assert {path.name for path in folder.iterdir()} - before <= {"out"}


def test_two_hundred_and_more_are_tried_over_every_command(capsys):
    tried = {shlex.split(case[0])[0].replace("RUN", "run") for case in CASES}
    with capsys.disabled():
        print(f"\n{len(CASES)} bad command lines and {len(NEVER) * len(SETTINGS)} bad values")
    assert len({case[0] for case in CASES}) == len(CASES) >= 200
    assert set(COMMANDS) <= tried


NEVER = (float("nan"), float("inf"), {"a": 1}, ["a", 1], -1, 10**30, 1.5e300, "\x07", "\ud800", "x" * 5000, b"bytes")
RAW = composed([TINY])[0]


def names(node, name=""):
    if not isinstance(node, dict):
        return [name]
    return [each for key, value in node.items() for each in names(value, f"{name}.{key}".lstrip("."))]


SETTINGS = [name for name in names(RAW) if not name.startswith("model.usual.")]
TAKEN = {  # what one setting may be, though no other may
    "model.random": ({"a": 1},),  # the transformer's class knows better, once it is made
    "model.note": ("\x07", "\ud800", "x" * 5000),
    "protocol.guidance": (10**30, 1.5e300),
    "protocol.guidance_2": (10**30, 1.5e300),
}
SAID_AS = {"launcher.engine": "launcher", "metrics.names": "metric", "method.name": "method", "model.family": "family"}


@pytest.mark.parametrize("name", SETTINGS)
def test_no_setting_takes_what_none_can_be(name):
    *sections, key = name.split(".")
    for value in NEVER:
        if value in TAKEN.get(name, ()):
            continue
        raw = copy.deepcopy(RAW)
        reduce(lambda node, section: node[section], sections, raw)[key] = value
        with pytest.raises(UserError) as refused:
            parse(raw)
            chosen(raw["launcher"])  # as every command does, whatever carries the run out
        said = str(refused.value)
        assert SAID_AS.get(name, key) in said and said.count("\n") == 0, (name, value, said)


def test_a_section_that_lost_a_setting_is_named():
    raw = copy.deepcopy(RAW)
    del raw["measure"]["repeats"]
    with pytest.raises(UserError, match="measure.repeats is missing"):
        parse(raw)
