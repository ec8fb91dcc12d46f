"""What is seen of runs under way, and what an interrupt leaves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from ditbench.harness.common import watch
from ditbench.harness.common.interrupts import Terminated, terminable
from ditbench.harness.common.pace import Pace, duration
from ditbench.harness.common.progress import progress
from ditbench.harness.common.watch import watching
from ditbench.harness.records import sweeps
from ditbench.harness.sweep import live
from ditbench.harness.sweep.live import Live


def told(shown: Live) -> None:
    """Two runs of two stages; the second stage of each lasts."""
    with shown, watching(shown):
        for title in ("first", "second"):
            watch.begins("0123456789ab", title, Path())
            watch.stage("calibrate")
            watch.stage("noise_floor")
            for _ in progress(range(4), desc="draw", unit="img"):
                time.sleep(0.05)
            watch.ends("ok", None)


def test_piped_there_is_a_line_per_stage_that_lasts_and_one_per_run(monkeypatch, capsys):
    monkeypatch.setattr(live, "TICK_S", 0.01)
    monkeypatch.setattr(live, "SAID_AFTER_S", 0.05)
    told(Live(of=2))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines if "noise floor" not in line] == [
        "[1/2] first: run 0123456789ab",
        "[1/2] first: ok in 0 s; 1 to go",
        "[2/2] second: run 0123456789ab",
        "[2/2] second: ok in 0 s",
    ]
    stages = [line for line in lines if "noise floor" in line]
    assert len(stages) == 2 and re.match(r"\[1/2\] first: noise floor \d/4 img", stages[0]), (
        "how many, a busy machine decides"
    )
    assert not any("calibrate" in line for line in lines), "what takes no time is not said"


def test_piped_a_long_stage_is_said_again_every_minute(monkeypatch, capsys):
    monkeypatch.setattr(live, "TICK_S", 0.01)
    monkeypatch.setattr(live, "SAID_AFTER_S", 0.02)
    monkeypatch.setattr(live, "AGAIN_S", 0.1)
    told(Live(of=2))
    assert sum("noise floor" in line for line in capsys.readouterr().err.splitlines()) >= 3


def test_a_run_that_takes_longer_than_the_others_is_not_said_to_end_in_no_time():
    shown = Live(of=2)
    shown.took, shown.begun = [10.0], 2
    assert shown._left(4.0, 1) == "; 1 to go, about 6 s"
    assert shown._left(30.0, 1) == "; 1 to go"


def test_in_a_terminal_there_is_one_line_that_changes(monkeypatch, capsys):
    monkeypatch.setattr(live, "TICK_S", 0.01)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    told(Live(of=2))
    err = capsys.readouterr().err
    kept = [line.rsplit("\r", 1)[-1].strip() for line in err.split("\n")]
    assert [line for line in kept if line] == [
        "[1/2] first: run 0123456789ab",
        kept[1],
        "[2/2] second: run 0123456789ab",
        kept[3],
    ]
    assert kept[1].startswith("[1/2] first: ok in") and "\r[1/2] first: noise floor " in err


def test_one_run_has_no_count(capsys):
    shown = Live()
    with shown, watching(shown):
        watch.begins("0123456789ab", "only", Path())
        watch.ends("failed", "why")
    assert capsys.readouterr().err.splitlines() == ["only: run 0123456789ab", "only: failed in 0 s"]


def test_durations_and_paces_are_words():
    assert [duration(s) for s in (4.4, 200, 7500, 400000)] == ["4 s", "3:20 min", "2:05 h", "5 days"]
    assert str(Pace(0, 0, 5, 5, 10, "it")) == "5/10", "nothing can be said yet"
    assert str(Pace(0, 10, 0, 5, None, "it")) == "5, 0.5/s"


def test_an_interrupted_sweep_shows_what_is_done_and_how_to_go_on(sweep, quick, home, capsys):
    def happens(config):
        if config.method == "gptq":
            raise Terminated
        return "ok"

    quick(happens)
    assert sweep("method=rtn,gptq,quarot", "bits=w8a8") == 143
    said = capsys.readouterr()
    assert "rtn" in said.out and "gptq" not in said.out
    assert "1 of 3 runs are done; `ditbench retry swept` does the others" in said.err and "Traceback" not in said.err
    assert {each.state for each in sweeps.outcomes(sweeps.newest(home))} == {"done", "missing"}


def test_sigterm_is_an_interrupt_only_inside_the_block():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with terminable():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        raise AssertionError("nobody ended")
    except Terminated:
        pass
    assert signal.getsignal(signal.SIGTERM) == before


def test_who_listens_to_sigterm_already_keeps_it():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with terminable():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_a_terminated_run_ends_with_143_keeps_its_pieces_and_goes_on_from_there(tmp_path):
    """The command as a user starts it, asked to end while it draws; then given again."""
    command = [sys.executable, "-m", "ditbench", "run", "-m", "model=tiny-dit", "method=fp", "protocol.n=6"]
    command += ["generate.batch_size=2", "protocol.steps=30", "metrics.names=[psnr]", "tracker=none", "calibration.n=2"]
    command += ["measure.samples=1", "measure.repeats=1", "measure.warmup=0", "measure.layer_errors=false"]
    command += [f"results_dir={tmp_path}", "name=swept"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    deadline = time.monotonic() + 300
    while not (drawn := list(tmp_path.glob("cache/samples/*/pieces/0.json"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 143 and "Traceback" not in err, err
    assert "asked to end" in err and "0 of 1 runs are done" in err
    first = drawn[0].read_bytes()
    again = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, timeout=600)
    assert again.returncode == 0, again.stderr
    assert drawn[0].read_bytes() == first, "no piece is drawn twice"
