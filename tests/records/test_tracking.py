"""A run and its tracker: the run never waits for it, and whatever it does harms nothing."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock

from ditbench.harness.common.errors import UserError
from ditbench.harness.records import told, tracking
from ditbench.harness.records.record import Record
from ditbench.harness.records.trackers import known_trackers, tracker
from ditbench.harness.records.trackers.base import Table
from ditbench.harness.records.trackers.wandb import _shown
from ditbench.harness.records.tracking import Rate, Tracked, claim_of, is_told

RUN = "0123456789ab"


class Noted:
    """A tracker that notes what it hears."""

    def __init__(self) -> None:
        self.cards: list[Any] = []
        self.heard: list[dict[str, Any]] = []
        self.ended: list[tuple[str, str | None]] = []
        self.one_came = threading.Event()

    def begin(self, settings, card):
        self.cards.append(card)
        return self

    def log(self, values):
        self.heard.append(dict(values))
        self.one_came.set()

    def finish(self, status, error):
        self.ended.append((status, error))


@pytest.fixture
def record() -> Record:
    method = {"name": "rtn", "form": "default"}
    config = {
        "method": method,
        "bits": {"label": "w4a8"},
        "protocol": {"name": "default", "n": 4, "steps": 10},
        "seed": 3,
    }
    return Record(RUN, "failed", config, "rtn", "tiny-dit", "default", env={"git": "abc"})


@pytest.fixture
def tracked(record, tmp_path, monkeypatch):
    """tracked(module) → a `Tracked` of it; EVERY_S is short, and nothing has been given up."""
    monkeypatch.setattr(tracking, "_gave_up", set())
    monkeypatch.setattr(tracking, "EVERY_S", 0.01)

    def make(module: Any) -> Tracked:
        monkeypatch.setattr(tracking, "tracker", lambda settings: module)
        return Tracked({"kind": "noted", "mode": "auto"}, record, torch.device("cpu"))

    return make


def test_a_tracker_hears_where_a_run_is_and_at_the_end_what_it_found(tracked, record, tmp_path):
    noted = Noted()
    with tracked(noted) as watched:
        watched.begins(RUN, "tiny-dit rtn W4A8", tmp_path / "scratch")
        watched.stage("calibrate")
        watched.stage("generate")
        watched.advance("generate", 10, 40, "img·step")
        wait_for(lambda: noted.heard and noted.heard[-1].get("live/share"))
        record.metrics = {"psnr": {"value": 30.0, "ci95": [29.0, 31.0], "n": 4}}
        record.status, watched.recorded = "ok", record
    (card,) = noted.cards
    assert (card.id, card.title, card.group) == (RUN, "tiny-dit rtn W4A8 seed 3", "default")
    assert card.config["run"]["git"] == "abc" and card.config["run"]["n"] == 4
    live, last = noted.heard[-2], noted.heard[-1]
    assert live["live/stage"] == "generate" and live["live/stage_number"] == 2
    assert (live["live/done"], live["live/total"], live["live/share"]) == (10, 40, 0.25)
    assert (last["metrics/psnr"], last["metrics/psnr/ci95_low"], last["metrics/psnr/n"]) == (30.0, 29.0, 4)
    assert noted.ended == [("ok", None)]


def test_a_run_that_is_interrupted_says_so_and_leaves_no_lock(tracked, tmp_path):
    noted = Noted()
    with pytest.raises(KeyboardInterrupt), tracked(noted) as watched:
        watched.begins(RUN, "", tmp_path / "scratch")
        raise KeyboardInterrupt
    assert noted.ended == [("interrupted", None)]
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_hangs_is_left_behind_and_not_tried_again(tracked, record, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "LAST_S", 0.2)
    hung = SimpleNamespace(begin=lambda settings, card: time.sleep(120))
    began_s = time.monotonic()
    with tracked(hung) as watched:
        watched.begins(RUN, "tiny-dit rtn W4A8", tmp_path / "scratch")
        watched.recorded = record
    assert time.monotonic() - began_s < 60
    assert "not tracked by noted: it took longer than 0.2 s" in capsys.readouterr().err
    assert tracked(Noted()).module is None


def test_a_tracker_that_breaks_half_way_is_closed_and_the_run_goes_on(tracked, tmp_path, capsys):
    class Broken(Noted):
        def log(self, values):
            super().log(values)
            raise ValueError("no room")

    broken = Broken()
    with tracked(broken) as watched:
        watched.begins(RUN, "tiny-dit rtn W4A8", tmp_path / "scratch")
        broken.one_came.wait(120)
        watched.stage("generate")
    assert len(broken.heard) == 1 and len(broken.ended) == 1
    assert capsys.readouterr().err.count("not tracked by noted: ValueError") == 1


def test_of_processes_that_do_the_same_run_one_tells_of_it(tracked, tmp_path):
    other = FileLock(claim_of(tmp_path, RUN))
    with other.acquire():
        assert is_told(tmp_path, RUN)
        noted = Noted()
        with tracked(noted) as watched:
            watched.begins(RUN, "", tmp_path / "scratch")
        assert noted.cards == []
    assert not is_told(tmp_path, RUN)


def test_the_next_attempt_is_another_run_and_a_killed_one_is_not(tracked, tmp_path):
    ids = []
    for _ in range(2):  # nothing is left of the first
        noted = Noted()
        with tracked(noted) as watched:
            watched.begins(RUN, "", tmp_path / "scratch")
        ids += [card.id for card in noted.cards]
    (tmp_path / RUN).mkdir()
    noted = Noted()
    with tracked(noted) as watched:
        watched.begins(RUN, "", tmp_path / "scratch")
    assert [*ids, noted.cards[0].id] == [RUN, RUN, f"{RUN}.2"]


def test_a_part_of_which_nobody_knows_how_long_it_is_has_no_share(tracked, tmp_path):
    watched = tracked(Noted())
    watched.stage("quantize")
    watched.advance("blocks", 3, 5, "blocks")
    watched.advance("rounds", 7, None, "it")
    assert watched.news == {"live/stage": "quantize", "live/stage_number": 1, "live/done": 7}


def test_a_column_with_cells_of_two_kinds_does_not_break_the_tracker():
    pytest.importorskip("wandb")
    table = _shown(Table(("layer", "bits"), [["a", 8], ["b", "fp8"], ["c", None]]))
    assert table.data == [["a", 8], ["b", "fp8"], ["c", None]]


def test_nothing_is_sent_while_latency_is_measured(tracked, tmp_path):
    noted = Noted()
    with tracked(noted) as watched:
        watched.begins(RUN, "", tmp_path / "scratch")
        watched.stage("measure")
        wait_for(lambda: noted.heard and noted.heard[-1].get("live/stage") == "measure")
        before = len(noted.heard)
        time.sleep(0.2)
        assert len(noted.heard) == before
        watched.stage("parity")
        wait_for(lambda: noted.heard[-1].get("live/stage") == "parity")


def test_what_an_earlier_process_drew_does_not_count_as_speed():
    rate = Rate()
    assert rate.at(900, 10.0) is None
    assert rate.at(920, 12.0) == 10.0


def test_a_name_says_the_seed_and_what_is_not_as_the_methods_form_has_it(record):
    record.config["method"] = {"name": "smoothquant", "form": "default", "strength": 0.7}
    record.method = "smoothquant"
    assert told.what_differs(record) == ["seed 3", "strength 0.7"]
    record.config["method"] = {"name": "smoothquant", "form": "default"}
    assert told.what_differs(record) == ["seed 3"]


def test_a_tracker_that_is_not_installed_is_refused_before_the_run(monkeypatch):
    monkeypatch.setattr("ditbench.harness.records.trackers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ditbench\[trackio\]', or tracker=none"):
        tracker({"kind": "trackio", "mode": "auto"})


def test_trackers_are_the_files_of_their_folder():
    assert {"wandb", "trackio", "none"} <= set(known_trackers()) and "base" not in known_trackers()


def wait_for(what: Any, longest_s: float = 120.0) -> None:
    until = time.monotonic() + longest_s
    while not what():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.005)
