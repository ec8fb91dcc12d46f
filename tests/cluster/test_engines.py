"""A sweep is the same whoever carries it out: records, table, exit codes; what is interrupted goes on from what is kept."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from engines_here import (
    ENGINES,
    EVERY,
    TINY,
    begun,
    home,
    kept,
    needs_joblib,
    needs_ray,
    needs_slurm,
    recorded,
    slurm,
    states,
    swept,
    until,
)

TWELVE = ("method=rtn,smoothquant,quarot", "bits=w8a8,w6a6,w4a8,w4a4")
SLOW = ("method=rtn", "bits=w8a8,w4a8,w4a4", "protocol.n=48", "protocol.steps=4", "generate.batch_size=4")


@pytest.fixture(scope="module")
def by_one_process(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("local")
    code, said = swept(folder, "local", *TWELVE)
    assert code == 0, said
    assert len(recorded(folder)) == 12
    return folder, said


def rows(said: str) -> list[tuple[str, ...]]:
    """Method, bits, effective bits and metrics of each row of the table: what is no time."""
    return [tuple(line.split()[:7]) for line in said.splitlines() if re.match(r"(rtn|smoothquant|quarot)\s+W", line)]


@pytest.mark.parametrize("engine", EVERY)
def test_twelve_runs_are_the_same_by_every_engine(engine, by_one_process, tmp_path):
    code, said = swept(tmp_path, engine, *TWELVE)
    assert code == 0, said
    assert recorded(tmp_path) == recorded(by_one_process[0])
    assert len(rows(said)) == 12 and rows(said) == rows(by_one_process[1])
    assert "[12/12]" in said and "Traceback" not in said


@pytest.mark.parametrize("engine", EVERY)
def test_a_failing_job_and_a_refused_one_are_told_and_stop_nobody(engine, tmp_path):
    code, said = swept(tmp_path, engine, "method=rtn", "bits=w8a8,w4a4", "backend=auto,onednn_int8")
    assert code == 3 and states(tmp_path) == {"done": 3, "failed": 1}, said
    assert "failed: tiny-dit rtn W4A4: backend=onednn_int8 cannot run this" in said
    code, said = swept(tmp_path, engine, "method=rtn,ptq4dit", "bits=fp8")
    assert code == 2 and states(tmp_path) == {"done": 1, "refused": 1}, said
    assert said.splitlines()[1].startswith("refused: tiny-dit ptq4dit fp8: "), "before anything starts"
    assert "Traceback" not in said


@needs_joblib
def test_two_workers_on_one_run_share_its_samples_and_record_it_once(tmp_path):
    code, said = swept(tmp_path, "joblib", "method=rtn", "bits=w4a8", "launcher.per_run=2", *SLOW[2:])
    assert code == 0, said
    assert list(recorded(tmp_path)) == [next(iter(recorded(tmp_path)))] and states(tmp_path) == {"done": 1}
    assert said.count("[job 0] tiny-dit rtn W4A8: run ") == 2, "both worked on it"


@needs_joblib
def test_a_worker_that_is_killed_costs_no_run(tmp_path):
    process = begun(tmp_path, "run", "-m", *TINY, *SLOW, *ENGINES["joblib"])
    until(lambda: any(home(tmp_path).glob(".*.part")))
    os.kill(busiest_child(process.pid), signal.SIGKILL)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0 and "a worker died" in said, said
    assert len(recorded(tmp_path)) == 3 and states(tmp_path) == {"done": 3}


def busiest_child(pid: int) -> int:
    """loky's workers are children of ours, its resource tracker is one, too, which does nothing."""
    told = subprocess.run(["ps", "-o", "pid=,cputimes=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return int(max((line.split() for line in told.splitlines()), key=lambda each: int(each[1]))[0])


@needs_slurm
def test_a_sweep_that_is_cancelled_half_way_goes_on_by_retry_and_nothing_is_done_twice(tmp_path):
    process = begun(tmp_path, "run", "-m", *TINY, *SLOW, *ENGINES["slurm"])
    until(lambda: any(home(tmp_path).glob("*/record.json")) and any(home(tmp_path).glob(".*.part")))
    job = (tmp_path / "results" / "slurm").glob("*_0_submitted.pkl")
    slurm("scancel", next(job).name.partition("_")[0])
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 3 and "SLURM says CANCELLED" in said, said
    before, files = recorded(tmp_path), kept(tmp_path)
    assert 1 <= len(before) < 3 and states(tmp_path) == {"done": len(before), "missing": 3 - len(before)}
    again = begun(tmp_path, "retry", "swept")
    said, _ = again.communicate(timeout=900)
    assert again.returncode == 0, said
    after = recorded(tmp_path)
    assert states(tmp_path) == {"done": 3} and len(after) == 3 and not any("." in name for name in after)
    assert before.items() <= after.items() and files.items() <= kept(tmp_path).items()


@needs_slurm
def test_a_task_that_is_requeued_goes_on_from_its_pieces(tmp_path):
    process = begun(tmp_path, "run", "-m", *TINY, *SLOW, "bits=w4a4", *ENGINES["slurm"])
    until(lambda: any((tmp_path / "results" / "cache" / "samples").rglob("*.safetensors")))
    files = kept(tmp_path)
    (line,) = {each.split()[0] for each in slurm("squeue", "--noheader", "--format=%A").splitlines()}
    slurm("scontrol", "requeue", line)
    until(lambda: "PENDING" in slurm("squeue", "--noheader", "--format=%T", "--jobs", line))
    slurm("scontrol", "update", f"JobId={line}", "StartTime=now")  # SLURM would wait two minutes
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    assert states(tmp_path) == {"done": 1} and len(recorded(tmp_path)) == 1
    assert files.items() <= kept(tmp_path).items(), "what was drawn before is not drawn again"


@needs_ray
def test_the_run_of_a_ray_worker_that_is_killed_comes_back(tmp_path):
    process = begun(tmp_path, "run", "-m", *TINY, *SLOW, *ENGINES["ray"])
    until(lambda: any(home(tmp_path).glob(".*.part")))
    killed = subprocess.run(["pgrep", "-f", "^ray::Worker.do"], capture_output=True, text=True).stdout.split()[0]
    os.kill(int(killed), signal.SIGKILL)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0 and "its worker died; it begins again" in said, said
    assert states(tmp_path) == {"done": 3} and len(recorded(tmp_path)) == 3
    assert not any("." in name for name in recorded(tmp_path))
