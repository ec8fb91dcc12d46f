"""What a sweep does where its folder, its disk or its files are not what they should be."""

from __future__ import annotations

import errno
import os

import pytest

from ditbench.harness.cli import main
from ditbench.harness.common.errors import UserError
from ditbench.harness.records import hashed_json, sweeps
from ditbench.harness.records.sweeps import DONE, MISSING, REFUSED


def states(home):
    return {each.job.title: each.state for each in sweeps.outcomes(sweeps.newest(home))}


def test_a_job_that_met_a_full_disk_is_missing_and_retry_does_it(sweep, quick, home, tmp_path, capsys):
    def full(config):
        if config.raw["bits"]["label"] == "w4a4":
            raise OSError(errno.ENOSPC, "No space left on device")
        return "ok"

    quick(full)
    assert sweep("method=rtn", "bits=w8a8,w4a4") == 3
    assert states(home) == {"tiny-dit rtn W8A8": DONE, "tiny-dit rtn W4A4": MISSING}
    assert "missing: tiny-dit rtn W4A4" in (said := capsys.readouterr().err) and "No space left" in said
    again = quick()
    assert main(["retry", "swept", "--results-dir", str(tmp_path)]) == 0
    assert again == ["tiny-dit rtn W4A4"]


def test_retry_ends_as_its_sweep_did_where_a_refused_job_is_left(sweep, quick, tmp_path):
    quick()
    assert sweep("method=rtn,ptq4dit", "bits=fp8") == 2
    assert main(["retry", "swept", "--results-dir", str(tmp_path)]) == 2


def test_a_name_that_leads_elsewhere_is_refused_and_nothing_lies_there(sweep, quick, tmp_path, capsys):
    quick()
    assert sweep("method=rtn", "bits=w8a8", "name=swept,../../elsewhere") == 2
    assert "is used as a folder" in capsys.readouterr().err
    assert not (tmp_path.parent / "elsewhere").exists() and sorted(os.listdir(tmp_path / "runs")) == ["swept"]


@pytest.mark.parametrize(
    "change",
    [
        {"stamp": "../../../../victim"},
        {"stamp": 5},
        {"jobs": [{"number": [], "overrides": [], "title": ""}]},
        {"jobs": [{"number": 0, "overrides": [], "title": "", "run_id": {}}]},
        {"jobs": 3},
        {"config_dirs": "x"},
    ],
)
def test_a_manifest_that_is_none_is_named(sweep, quick, home, tmp_path, change, capsys):
    quick()
    assert sweep("method=rtn", "bits=w8a8") == 0
    path = sweeps.newest(home).folder / sweeps.FILE
    hashed_json.write(path, hashed_json.text_of(hashed_json.read(path) | change))
    with pytest.raises(UserError, match=f"{path}: cannot be read"):
        sweeps.read(home, path.parent.name)
    capsys.readouterr()
    assert main(["status", "swept", "--results-dir", str(tmp_path)]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("values", [{"title": "x"}, {"title": "x", "overrides": 3}, {"before": 3}, {"run_id": []}])
def test_a_jobs_note_that_is_none_counts_for_nothing(sweep, quick, home, values, capsys):
    quick()
    assert sweep("method=rtn", "bits=w8a8") == 0
    folder = sweeps.newest(home).folder
    hashed_json.write(folder / "7.json", hashed_json.text_of(values))
    capsys.readouterr()
    assert states(home) == {"tiny-dit rtn W8A8": DONE}
    assert f"{folder / '7.json'}: cannot be read" in capsys.readouterr().err


def test_a_stamp_that_leads_elsewhere_is_no_sweep(sweep, quick, tmp_path, capsys):
    quick()
    assert sweep("method=rtn", "bits=w8a8") == 0
    assert main(["status", "swept", "--sweep", "../../x", "--results-dir", str(tmp_path)]) == 2
    assert main(["status", "..", "--results-dir", str(tmp_path)]) == 2


def test_a_record_says_more_than_a_worker_of_its_run_that_was_refused(sweep, quick, home):
    quick()
    assert sweep("method=rtn", "bits=w8a8") == 0
    (job,) = sweeps.newest(home).jobs
    stamp = sweeps.newest(home).stamp
    sweeps.say_of_job((home, stamp), sweeps.Job(0, job.overrides, job.title, job.run_id, refused="no such device"))
    assert states(home) == {job.title: DONE}
    assert REFUSED not in states(home).values()


def test_a_pipe_that_nobody_reads_changes_no_exit_code(sweep, quick, monkeypatch):
    quick(lambda config: "failed")

    def closed(*values, **how):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    assert sweep("method=rtn", "bits=w8a8") == 3
