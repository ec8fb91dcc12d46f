"""What a run tells whoever watches it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditbench.harness.common import watch
from ditbench.harness.common.progress import progress
from ditbench.harness.common.timer import Timer
from ditbench.harness.common.watch import Watcher, say, watching


class Noted(Watcher):
    def __init__(self) -> None:
        self.heard: list[tuple] = []

    def begins(self, run_id, title, folder):
        self.heard.append(("begins", run_id, title))

    def stage(self, name):
        self.heard.append(("stage", name))

    def advance(self, what, done, total, unit):
        self.heard.append((what, done, total, unit))

    def pictures(self, read):
        self.heard.append(("pictures", read()))

    def ends(self, status, error):
        self.heard.append(("ends", status, error))


def test_a_watcher_hears_a_run_in_its_order():
    noted = Noted()
    with watching(noted):
        watch.begins("abc", "tiny rtn", Path("x"))
        with Timer()("generate"):
            for _ in progress(range(2), desc="draw", unit="img"):
                pass
            watch.pictures(lambda: "grid")
        watch.ends("failed", "why")
    watch.stage("evaluate")
    assert noted.heard == [
        ("begins", "abc", "tiny rtn"),
        ("stage", "generate"),
        ("draw", 0, 2, "img"),
        ("draw", 1, 2, "img"),
        ("draw", 2, 2, "img"),
        ("pictures", "grid"),
        ("ends", "failed", "why"),
    ]


def test_only_the_outermost_part_is_counted():
    noted = Noted()
    with watching(noted):
        for _ in progress(range(2), desc="blocks"):
            for _ in progress(range(5), desc="rounds"):
                pass
        with progress(total=3, desc="rounds") as bar:
            bar.at(3)
    assert [heard[:2] for heard in noted.heard] == [
        ("blocks", 0),
        ("blocks", 1),
        ("blocks", 2),
        ("rounds", 0),
        ("rounds", 3),
    ]


def test_a_part_that_broke_does_not_hide_those_of_the_next_stage():
    noted = Noted()
    with watching(noted):
        broken = iter(progress(range(3), desc="broken"))
        next(broken)
        watch.stage("evaluate")
        for _ in progress(range(1), desc="next"):
            pass
    assert ("next", 1, 1, "it") in noted.heard


def test_what_a_watcher_raises_is_said_once_and_harms_nobody(capsys):
    class Broken(Watcher):
        def stage(self, name):
            raise OSError("no disk")

    noted = Noted()
    with watching(Broken(), noted):
        watch.stage("calibrate")
        watch.stage("quantize")
    assert noted.heard == [("stage", "calibrate"), ("stage", "quantize")]
    assert capsys.readouterr().err.splitlines() == ["Broken hears no more of this: OSError: no disk"]


def test_an_interrupt_goes_through_a_watcher():
    class Impatient(Watcher):
        def stage(self, name):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watching(Impatient()):
        watch.stage("generate")


def test_a_watcher_that_shows_progress_takes_the_place_of_bars(monkeypatch, capsys):
    class Shows(Watcher):
        shows_progress = True

    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with watching(Shows()):
        for _ in progress(range(3), desc="hidden"):
            pass
    assert "hidden" not in capsys.readouterr().err
    for _ in progress(range(3), desc="drawn"):
        say("a line")
    err = capsys.readouterr().err
    assert "drawn" in err and "a line\n" in err
