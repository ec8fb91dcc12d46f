"""`ditbench status` and `ditbench retry`: how a sweep stands, and what of it is done again."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace

import pytest

from ditbench.harness.cli import main
from ditbench.harness.records import attempts, sweeps
from ditbench.harness.records.status import FILE, Status, StatusFile, reported
from ditbench.harness.stages.identity import title
from ditbench.harness.sweep.overview import Overview, Row, as_text


def status(tmp_path, *arguments) -> int:
    return main(["status", "swept", "--results-dir", str(tmp_path), *arguments])


def test_status_says_of_every_run_how_it_stands(sweep, quick, home, tmp_path, capsys):
    seen = {}

    def happens(config):
        if title(config) == "tiny-dit quarot W8A8":
            folder = next(home.glob(".*.part"))
            with reported(folder, folder.name[1:13], "tiny-dit quarot W8A8", "a chip"):
                capsys.readouterr()
                assert status(tmp_path) == 0
                seen["text"] = capsys.readouterr().out
                assert status(tmp_path, "--format", "json") == 0
                seen["json"] = json.loads(capsys.readouterr().out)
        return "failed" if config.method == "gptq" else "ok"

    quick(happens)
    assert sweep("method=rtn,gptq,quarot,smoothquant,ptq4dit", "bits=w8a8,fp8") == 2
    lines = [line.split() for line in seen["text"].splitlines()]
    assert "10 runs: 2 done, 2 failed, 1 refused, 1 running, 4 not there; about" in seen["text"]
    of = {tuple(line[1:3]): line for line in lines if line[:1] == ["tiny-dit"]}
    assert of["rtn", "W8A8"][4] == "done" and of["gptq", "W8A8"][4] == "failed" and "it was to fail" in seen["text"]
    assert of["quarot", "W8A8"][4] == "running" and "a chip" in seen["text"]
    assert of["smoothquant", "W8A8"][4:6] == ["not", "there"] and "refused" in of["ptq4dit", "fp8"]
    counts = seen["json"]["counts"]
    assert sum(counts.values()) == len(seen["json"]["runs"]) == len(of) and counts["running"] == 1
    (running,) = [row for row in seen["json"]["runs"] if row["state"] == "running"]
    assert running["under_way"]["device"] == "a chip" and running["under_way"]["pid"]
    assert seen["json"]["left_s"] is not None


def test_who_is_killed_is_not_running_whatever_it_said(sweep, quick, home, tmp_path, capsys):
    quick()
    assert sweep("method=rtn", "bits=w8a8") == 0
    (record,) = home.glob("*/record.json")
    left = home / f".{record.parent.name}.00000000.part"
    shutil.move(record.parent, left)
    StatusFile(left, record.parent.name, "tiny-dit rtn W8A8", "a chip")
    left.with_suffix(".lock").touch()
    assert status(tmp_path) == 0
    said = capsys.readouterr().out
    assert "not there" in said and "running" not in said and "a chip" not in said
    assert left.exists(), "looking clears nothing"


@pytest.mark.parametrize(
    "said",
    [
        {"done": "many"},
        {"started": None},
        {"total": [1]},
        {"updated": 1e400},
        {"updated": -1e300},
        {"done": 10**400},
        {"title": 7},
        {"stage": "\x1b[2J"},
        {"what": "x" * 5000},
        {"run_id": "another"},
        {"more": 1},
        "[]",
        "{",
        "[" * 100_000,
    ],
    ids=lambda each: str(each)[:30],
)
def test_a_status_file_that_no_run_wrote_is_as_good_as_none(said, sweep, quick, home, tmp_path, capsys):
    def happens(config):
        folder = next(home.glob(".*.part"))
        with reported(folder, folder.name[1:13], "somebody", "a chip"):
            whole = json.loads((folder / FILE).read_text())
            (folder / FILE).write_text(said if isinstance(said, str) else json.dumps(whole | said))
            capsys.readouterr()
            assert status(tmp_path) == 0
        return "ok"

    quick(happens)
    assert sweep("method=rtn", "bits=w8a8") == 0
    out = capsys.readouterr().out
    assert "1 running" in out and "begins" in out and "a chip" not in out


def test_what_a_run_says_of_itself_is_no_part_of_its_record(tmp_path):
    with (
        attempts.attempt(tmp_path, "swept", "0123456789ab") as attempt,
        reported(attempt.folder, "0123456789ab", "t", "d"),
    ):
        assert (attempt.folder / FILE).exists()
    with attempts.attempt(tmp_path, "swept", "0123456789ab") as attempt:
        with reported(attempt.folder, "0123456789ab", "t", "d"):
            pass
        assert not (attempt.folder / FILE).exists()


def test_a_status_file_counts_what_was_done_since_the_part_began(tmp_path):
    file = StatusFile(tmp_path, "0123456789ab", "t", "d")
    file.stage("generate")
    file.advance("draw", 100, 400, "img")  # an earlier process drew 100
    file.advance("draw", 200, 400, "img")
    file.status = replace(file.status, since=0.0, updated=10.0)
    assert (file.status.pace.rate, file.status.pace.left_s) == (10.0, 20.0)
    assert str(file.status.pace) == "200/400 img, 10/s, 20 s left"
    file.stage("evaluate")
    assert file.status.pace is None


def test_what_is_left_of_a_sweep_is_reckoned_from_its_runs():
    running = Status("1", "t", "d", "h", 1, time.time() - 40, time.time())
    rows = [Row("a", "done", "0", seconds=100.0), Row("b", "running", "1", status=running), Row("c", "missing", "2")]
    found = Overview("swept", None, rows)
    assert 159 <= found.left_s <= 161, "60 of the one under way, 100 of the one to come"
    assert "about 2:40 min to go" in as_text(found)
    assert Overview("swept", None, rows[:1] + rows[2:]).left_s is None, "nobody is at it"


def test_rows_of_one_title_say_in_which_settings_they_differ():
    rows = [
        Row("tiny-dit rtn W8A8", "done", "0", settings={"method": "rtn", "seed": "0"}),
        Row("tiny-dit rtn W8A8", "done", "1", settings={"method": "rtn", "seed": "1"}),
        Row("tiny-dit gptq W8A8", "done", "2", settings={"method": "gptq", "seed": "1"}),
    ]
    lines = as_text(Overview("swept", None, rows)).splitlines()
    assert [line.split("  ")[0] for line in lines[3:]] == [
        "tiny-dit rtn W8A8 seed=0",
        "tiny-dit rtn W8A8 seed=1",
        "tiny-dit gptq W8A8",
    ]


def test_retry_does_again_what_failed_and_what_never_came(sweep, quick, home, tmp_path, capsys):
    def happens(config):
        if config.method == "quarot":
            raise KeyboardInterrupt
        return "failed" if config.method == "gptq" else "ok"

    quick(happens)
    assert sweep("method=rtn,gptq,quarot,smoothquant", "bits=w8a8") == 130
    again = quick()
    stamp = sweeps.newest(home).stamp
    capsys.readouterr()
    assert main(["retry", "swept", "--results-dir", str(tmp_path), "--failed"]) == 3, "two are missing still"
    assert again == ["tiny-dit gptq W8A8"]
    said = capsys.readouterr().err
    assert "1 of 4 jobs again" in said and "failed: tiny-dit gptq W8A8: it was to fail" in said
    assert main(["retry", "swept", "--results-dir", str(tmp_path)]) == 0
    assert again[1:] == ["tiny-dit quarot W8A8", "tiny-dit smoothquant W8A8"]
    assert [path.name for path in (home / ".sweeps").iterdir()] == [stamp], "it is the same sweep"
    assert {each.state for each in sweeps.outcomes(sweeps.newest(home))} == {"done"}
    assert main(["retry", "swept", "--results-dir", str(tmp_path)]) == 0
    assert "nothing failed or missing" in capsys.readouterr().err


def test_retry_of_a_sweep_that_lacks_only_what_was_refused_ends_as_the_sweep_did(sweep, quick, tmp_path, capsys):
    quick()
    assert sweep("method=rtn,ptq4dit", "bits=fp8") == 2
    capsys.readouterr()
    assert main(["retry", "swept", "--results-dir", str(tmp_path)]) == 2
    assert "nothing failed or missing" in capsys.readouterr().err


def test_retry_takes_more_overrides_in_the_place_of_earlier_ones(sweep, quick, home, tmp_path):
    quick(lambda config: "failed")
    assert sweep("method=rtn", "bits=w8a8", "memory=resident") == 3
    seen = []
    quick(lambda config: seen.append(config.memory) or "ok")
    assert main(["retry", "swept", "memory=offload", "--results-dir", str(tmp_path)]) == 0
    assert seen == ["offload"]


def test_mistakes_are_said_in_a_line(sweep, quick, tmp_path, capsys):
    quick()
    assert sweep("method=rtn", "bits=w8a8") == 0
    for arguments, said in (
        (["status", "no-such"], "no-such: no experiment in"),
        (["retry", "no-such"], "known: swept"),
        (["status", "swept", "--sweep", "x"], "no sweep x; known: 2"),
        (["retry", "swept", "--failed", "--missing"], "not allowed with"),
    ):
        capsys.readouterr()
        assert main([*arguments, "--results-dir", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err
