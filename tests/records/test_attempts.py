"""Folders of attempts: one record of a run, whoever does it; no leftovers; nothing of the living is taken away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

import ditbench
from ditbench.harness.common.files import STALE_S, atomic_path
from ditbench.harness.records.attempts import attempt, attempts, clear, finished, survey
from ditbench.harness.records.record import Record

RUN = "0123456789ab"
WAITS = """
import sys, time
from pathlib import Path
from ditbench.harness.records.attempts import attempt
with attempt(Path(sys.argv[1]), "default", sys.argv[2]):
    print("in", flush=True)
    time.sleep(600)
"""


def record(status: str = "ok", run_id: str = RUN, **metrics: str) -> Record:
    """metrics: name → status."""
    entries = {
        name: {"value": 1.0 if its == "ok" else None, "ci95": None, "n": 1, "status": its, "reason": None}
        | {"passport": {}, "better": "higher", "paired": False, "unit": "", "noise_floor": None}
        for name, its in metrics.items()
    }
    return Record(run_id, status, {}, "rtn", "tiny-dit", "default", metrics=entries)


def publish(results: Path, ours: Record, force: bool = False) -> Record:
    with attempt(results, "default", ours.run_id) as this:
        return this.publish(ours, force)


def names(results: Path) -> list[str]:
    return sorted(os.listdir(results / "runs" / "default"))


def test_of_two_that_do_the_same_run_the_first_to_end_is_recorded_and_the_other_finds_it(tmp_path):
    with attempt(tmp_path, "default", RUN) as slow, attempt(tmp_path, "default", RUN) as fast:
        assert slow.folder != fast.folder
        theirs = fast.publish(record())
        assert slow.publish(record()).folder == theirs.folder == tmp_path / "runs" / "default" / RUN
        assert fast.published and not slow.published
    assert names(tmp_path) == [RUN]


def test_of_eight_at_once_one_is_recorded(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: publish(tmp_path, record()).folder, range(8)))
    assert set(found) == {tmp_path / "runs" / "default" / RUN} and names(tmp_path) == [RUN]


@pytest.mark.parametrize(
    ("before", "ours", "kept"),
    [
        (record(), record(), 1),
        (record("failed"), record("failed"), 2),  # each failure is kept
        (record("failed"), record(), 2),
        (record(), record("failed"), 1),
        (record(psnr="failed", ssim="failed"), record(psnr="ok", ssim="failed"), 2),
        (record(psnr="failed", ssim="ok"), record(psnr="ok", ssim="failed"), 1),
        (record(psnr="skipped"), record(psnr="ok"), 1),  # what was skipped has not failed
    ],
)
def test_another_attempt_is_recorded_only_where_it_is_better(tmp_path, before, ours, kept):
    publish(tmp_path, before)
    came = publish(tmp_path, ours)
    assert names(tmp_path) == [RUN, f"{RUN}.2"][:kept]
    assert came.folder.name == names(tmp_path)[-1]
    publish(tmp_path, ours, force=True)
    assert len(names(tmp_path)) == kept + 1


def test_two_that_fail_at_once_leave_one_failure(tmp_path):
    with attempt(tmp_path, "default", RUN) as one, attempt(tmp_path, "default", RUN) as other:
        one.publish(record("failed"))
        other.publish(record("failed"))
    assert names(tmp_path) == [RUN]


def test_the_best_attempt_counts_and_of_equals_the_newest(tmp_path):
    for each in (record(psnr="failed"), record(psnr="ok"), record(psnr="failed"), record("failed")):
        publish(tmp_path, each, force=True)
    assert finished(tmp_path, "default", RUN).folder.name == f"{RUN}.2"
    publish(tmp_path, record(psnr="ok"), force=True)
    assert finished(tmp_path, "default", RUN).folder.name == f"{RUN}.5"
    assert [each.folder.name for each in survey(tmp_path).records] == [f"{RUN}.5"]
    publish(tmp_path, record(run_id="f" * 12))
    assert len(attempts(tmp_path, "default", RUN)) == 5


def test_who_comes_next_removes_what_a_kill_left_and_nothing_of_the_living(tmp_path):
    """The killed and the living are processes of one host; nothing but their locks tells them apart."""
    root = str(Path(ditbench.__file__).parents[1])
    killed, living = (
        subprocess.Popen(
            [sys.executable, "-c", WAITS, str(tmp_path), run_id],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": root},
        )
        for run_id in (RUN, "f" * 12)
    )
    try:
        for process in (killed, living):
            assert process.stdout.readline() == "in\n"
        assert len(names(tmp_path)) == 4
        killed.send_signal(signal.SIGKILL)
        killed.wait(timeout=30)
        with attempt(tmp_path, "default", "e" * 12):  # another run clears up too
            assert {name[1:13] for name in names(tmp_path)} == {"e" * 12, "f" * 12}
        assert {name[1:13] for name in names(tmp_path)} == {"f" * 12}
    finally:
        for process in (killed, living):
            process.kill()
            process.wait(timeout=30)


def test_what_a_kill_left_can_be_cleared_without_beginning_a_run(tmp_path):
    home = tmp_path / "runs" / "default"
    (home / f".{RUN}.0123abcd.part" / "half").mkdir(parents=True)
    (home / f".{RUN}.0123abcd.lock").touch()
    clear(home)
    assert names(tmp_path) == []
    clear(nowhere := home / "nowhere")
    assert not nowhere.exists()


def test_a_run_that_raises_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), attempt(tmp_path, "default", RUN):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_two_writers_of_one_file_do_not_meet_and_old_leftovers_go(tmp_path):
    path = tmp_path / "a.json"
    for age in (0.0, 2 * STALE_S):
        left = tmp_path / f".a.json.{int(age):08x}.part"
        left.write_text("left by a kill")
        os.utime(left, (left.stat().st_atime - age, left.stat().st_mtime - age))
    with atomic_path(path) as one, atomic_path(path) as other:
        assert one != other
        one.write_text("1")
        other.write_text("2")
    assert sorted(each.name for each in tmp_path.iterdir()) == [".a.json.00000000.part", "a.json"]
    assert path.read_text() == "1"


def test_a_damaged_record_is_listed_and_the_others_are_found(tmp_path, capsys):
    publish(tmp_path, record())
    publish(tmp_path, replace(record(), run_id="f" * 12))
    damaged = tmp_path / "runs" / "default" / RUN / "record.json"
    damaged.write_text("")
    found = survey(tmp_path)
    assert [each.run_id for each in found.records] == ["f" * 12]
    assert len(found.damaged) == 1 and str(damaged) in found.damaged[0]
    assert finished(tmp_path, "default", RUN) is None and str(damaged) in capsys.readouterr().err
