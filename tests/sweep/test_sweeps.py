"""A sweep: which jobs it has, known before any of them starts, and what became of each, read from records."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from ditbench.harness.cli import main
from ditbench.harness.common.errors import UserError
from ditbench.harness.records import sweeps
from ditbench.harness.records.sweeps import DONE, FAILED, MISSING, REFUSED, RUNNING
from ditbench.harness.sweep import launch
from ditbench.harness.sweep.multirun import Multirun


def states(home):
    return {each.job.title: each.state for each in sweeps.outcomes(sweeps.newest(home))}


def test_all_jobs_are_known_before_the_first_starts(sweep, quick, home, capsys):
    seen = []
    started = quick(lambda config: seen.append(sweeps.newest(home)) or "ok")
    assert sweep("method=fp,rtn", "bits=w8a8,w4a4") == 0
    first = seen[0]
    assert [job.title for job in first.jobs] == [
        "tiny-dit fp W16A16",
        "tiny-dit fp W16A16",
        "tiny-dit rtn W8A8",
        "tiny-dit rtn W4A4",
    ]
    assert [job.same_as for job in first.jobs] == [None, 0, None, None]
    assert "method=rtn" in first.jobs[3].overrides and "bits=w4a4" in first.jobs[3].overrides
    assert started == ["tiny-dit fp W16A16", "tiny-dit rtn W8A8", "tiny-dit rtn W4A4"], "a run is done once"
    assert sorted(path.name for path in home.iterdir() if path.name[0] != ".") == sorted(
        job.run_id for job in first.jobs if job.same_as is None
    ), "the ids that were foreseen are those of the records"
    assert "of swept: 3 runs: 3 to do, 1 of the jobs the same as another" in capsys.readouterr().err


def test_what_is_refused_is_said_first_and_stops_nobody(sweep, quick, home, capsys):
    said_before = []
    started = quick(lambda config: said_before.append(capsys.readouterr().err) or "ok")
    assert sweep("method=rtn,ptq4dit", "bits=w8a8,fp8") == 2
    assert started == ["tiny-dit rtn W8A8", "tiny-dit rtn FP8", "tiny-dit ptq4dit W8A8"]
    assert "refused: tiny-dit ptq4dit fp8: " in said_before[0]
    assert states(home) == dict.fromkeys(started, DONE) | {"tiny-dit ptq4dit fp8": REFUSED}
    said = capsys.readouterr()
    assert "ptq4dit" in said.err and "Traceback" not in said.err and "gptq" not in said.out


def test_where_all_are_refused_nothing_is_written(sweep, quick, home):
    started = quick()
    assert sweep("method=ptq4dit", "bits=fp8") == 2
    assert not started and not home.exists()


def test_outcomes_come_from_records_not_from_who_ran_them(sweep, quick, home, capsys):
    quick(lambda config: "failed" if config.method == "gptq" else "ok")
    assert sweep("method=rtn,gptq", "bits=w8a8,w4a4") == 3
    assert states(home) == {
        "tiny-dit rtn W8A8": DONE,
        "tiny-dit rtn W4A4": DONE,
        "tiny-dit gptq W8A8": FAILED,
        "tiny-dit gptq W4A4": FAILED,
    }
    assert "failed: tiny-dit gptq W8A8: it was to fail" in capsys.readouterr().err
    sweep_of = sweeps.newest(home)
    shutil.rmtree(home / sweep_of.jobs[0].run_id)
    assert states(home)["tiny-dit rtn W8A8"] == MISSING


def test_a_job_that_never_came_back_is_missing_and_the_exit_code_says_so(sweep, quick, home, capsys, monkeypatch):
    quick()
    usual = launch._carried_out
    monkeypatch.setattr(launch, "_carried_out", lambda sweep, each: {} if each.job.number == 1 else usual(sweep, each))
    assert sweep("method=rtn", "bits=w8a8,w4a4") == 3
    assert "missing: tiny-dit rtn W4A4: it left no record" in capsys.readouterr().err


def test_a_failure_of_an_earlier_sweep_says_nothing_of_this_one(sweep, quick, home, monkeypatch):
    quick(lambda config: "failed")
    assert sweep("method=rtn", "bits=w8a8,w4a4") == 3
    monkeypatch.setattr(launch, "_carried_out", lambda multirun, each: {})
    assert sweep("method=rtn", "bits=w8a8,w4a4") == 3
    assert set(states(home).values()) == {MISSING}


def test_the_same_command_again_starts_only_what_is_not_recorded(sweep, quick, home, capsys):
    quick(lambda config: "failed" if config.method == "gptq" else "ok")
    assert sweep("method=rtn,gptq", "bits=w8a8") == 3
    again = quick()
    assert sweep("method=rtn,gptq", "bits=w8a8") == 0
    assert again == ["tiny-dit gptq W8A8"]
    assert set(states(home).values()) == {DONE}
    assert "of swept: 2 runs: 1 to do, 1 recorded already" in capsys.readouterr().err


def test_force_asks_what_came_of_this_command(sweep, quick, home):
    quick()
    assert sweep("method=rtn", "bits=w8a8") == 0
    quick(lambda config: "failed")
    assert sweep("method=rtn", "bits=w8a8", "--force") == 3
    assert set(states(home).values()) == {FAILED}


def test_a_run_that_a_process_holds_is_running(sweep, quick, home):
    seen = []
    quick(lambda config: seen.append(states(home)) or "ok")
    assert sweep("method=rtn", "bits=w8a8,w4a4") == 0
    assert seen[0] == {"tiny-dit rtn W8A8": RUNNING, "tiny-dit rtn W4A4": MISSING}


def test_a_job_says_itself_which_run_it_is(sweep, quick, home):
    quick()
    assert sweep("method=rtn", "bits=w8a8") == 0
    sweep_of = sweeps.newest(home)
    elsewhere = sweeps.Job(0, (), "tiny-dit rtn W8A8", run_id="0123456789ab")  # on a device of another kind
    sweeps.say_of_job((home, sweep_of.stamp), elsewhere)
    assert sweeps.newest(home).jobs[0].run_id == "0123456789ab"
    assert states(home) == {"tiny-dit rtn W8A8": MISSING}


def test_a_damaged_list_is_named_and_one_before_is_taken(sweep, quick, home, capsys):
    quick()
    assert sweep("method=rtn", "bits=w8a8") == 0
    first = sweeps.newest(home)
    later = home / ".sweeps" / "99990101-000000-000000-0000"
    shutil.copytree(first.folder, later)
    text = (later / "sweep.json").read_text()
    (later / "sweep.json").write_text(text.replace("tiny-dit rtn", "tiny-dit gptq"))
    assert sweeps.newest(home).stamp == first.stamp
    assert f"{later}/sweep.json: cannot be read" in capsys.readouterr().err
    with pytest.raises(UserError, match="no sweep nothing; known: "):
        sweeps.read(home, "nothing")


def test_what_a_sweep_is_belongs_to_no_record(sweep, quick, home):
    quick()
    assert sweep("method=rtn", "bits=w8a8") == 0
    record = json.loads(next(home.glob("*/record.json")).read_text())
    assert "sweep" not in record["config"]


def test_one_run_keeps_no_list(quick, home, tmp_path):
    quick()
    assert main(["run", "model=tiny-dit", "name=swept", "tracker=none", f"results_dir={tmp_path}"]) == 0
    assert not (home / ".sweeps").exists() and len(os.listdir(home)) == 1


@pytest.fixture
def elsewhere(monkeypatch):
    """Jobs go through Hydra's launcher, as if it had processes of its own."""
    monkeypatch.setattr(Multirun, "here", False)


def test_a_launcher_of_others_gets_the_jobs_that_are_to_do(sweep, quick, home, elsewhere, capsys):
    quick(lambda config: "failed" if config.method == "gptq" else "ok")
    assert sweep("method=fp,gptq,ptq4dit", "bits=w8a8,fp8", "device=cpu") == 2
    said = capsys.readouterr()
    assert states(home) == {
        "tiny-dit fp W16A16": DONE,
        "tiny-dit gptq W8A8": FAILED,
        "tiny-dit gptq FP8": FAILED,
        "tiny-dit ptq4dit W8A8": DONE,
        "tiny-dit ptq4dit fp8": REFUSED,
    }
    assert "failed: tiny-dit gptq FP8: it was to fail" in said.err and "[job 0] tiny-dit fp W16A16: run" in said.err


def test_a_job_that_is_refused_where_it_runs_says_so(sweep, quick, home, elsewhere, capsys):
    def happens(config):
        raise UserError("no weights on this machine")

    quick(happens)
    assert sweep("method=rtn", "bits=w8a8,w4a4") == 2
    assert set(states(home).values()) == {REFUSED} and "no weights on this machine" in capsys.readouterr().err


def test_a_device_that_only_the_jobs_machine_has_is_not_refused_here_but_there(sweep, quick, home, elsewhere, capsys):
    quick()
    assert sweep("method=rtn", "bits=w8a8", "device=mps") == 2
    (job,) = sweeps.newest(home).jobs
    assert job.title == "tiny-dit rtn W8A8" and "device='mps' cannot be used here" in job.refused
    assert "1 to do" in capsys.readouterr().err, "it was started"


def test_a_lost_job_of_another_launcher_is_missing(sweep, quick, home, elsewhere, monkeypatch, capsys):
    quick()
    usual = Multirun.launch
    monkeypatch.setattr(Multirun, "launch", lambda self, jobs, task: usual(self, jobs[:1], task))
    assert sweep("method=rtn", "bits=w8a8,w4a4", "device=cpu") == 3
    assert "missing: tiny-dit rtn W4A4: it left no record" in capsys.readouterr().err
