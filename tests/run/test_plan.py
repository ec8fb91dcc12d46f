"""`ditbench run … --plan`: says what a run takes before it, knows what is there already, and leaves nothing behind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from ditbench.harness.cli import main
from ditbench.harness.models.counts import Counts
from ditbench.harness.stages.config import parse
from ditbench.harness.sweep import plan as planning
from ditbench.harness.sweep import rates
from ditbench.harness.sweep.compose import composed
from ditbench.harness.sweep.estimate import batch_size
from ditbench.harness.sweep.plan import amount, configurations, duration, size

STAGES = ("load", "calibrate", "quantize", "generate", "reference", "evaluate", "noise floor", "layer errors")


@pytest.fixture
def plan(tmp_path, tiny, capsys) -> Callable[..., str]:
    """plan("bits=w4a4", …) → what is printed, of runs whose results are in tmp_path."""

    def planned(*arguments: str) -> str:
        capsys.readouterr()
        assert main(["run", *tiny, f"results_dir={tmp_path}", *arguments, "--plan"]) == 0
        return capsys.readouterr().out

    return planned


def states(text: str) -> dict[str, str]:
    """{stage: state} of a plan of one run."""
    return {stage: found[1] for stage in STAGES if (found := re.search(rf"^{stage}  +(\S+)", text, re.MULTILINE))}


def test_a_plan_has_every_stage_in_a_narrow_table_and_writes_nothing(plan, tmp_path):
    text = plan("method=smoothquant")
    assert all(len(line) <= 120 for line in text.splitlines()), text
    assert states(text).keys() == set(STAGES)
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_left_is_cached_and_the_run_itself_recorded(plan, run):
    assert states(plan())["calibrate"] == states(plan())["reference"] == "to"
    assert run() == 0
    assert "already recorded in" in plan()
    found = states(plan("bits=w4a4"))
    assert found["calibrate"] == found["reference"] == found["noise floor"] == "cached"
    assert found["quantize"] == "to"


def test_a_plan_names_the_run_that_is_then_done(plan, run, tmp_path):
    (its_id,) = re.findall(r"· run ([0-9a-f]{12})", plan("bits=w4a4"))
    assert run("bits=w4a4") == 0
    assert (tmp_path / "runs" / "default" / its_id / "record.json").exists()


def test_runs_of_a_sweep_share_what_one_of_them_makes(plan):
    text = plan("-m", "method=rtn,smoothquant", "bits=w8a8,w4a4")
    assert len(re.findall(r"· run [0-9a-f]{12}", text)) == 4
    assert len(re.findall(r"^calibrate +to do", text, re.MULTILINE)) == 1
    assert len(re.findall(r"^reference +shared", text, re.MULTILINE)) == 3
    assert "the sweep: 4 of 4 runs to do" in text


def test_an_earlier_record_says_how_long_stages_take(plan, run):
    assert "earlier records" not in plan("method=smoothquant") and "≥" in plan("method=smoothquant")
    assert run("method=smoothquant") == 0
    text = plan("method=smoothquant", "seed=1")
    assert "earlier records of this model on this device" in text
    assert re.search(r"^evaluate +to do +– +[\d.]+ s", text, re.MULTILINE)
    assert not re.search(r"^quantize .*≥", text, re.MULTILINE)


def test_an_experiments_runs_are_those_of_its_sweep():
    found, refused = configurations(["experiment=demo", "tracker=none"])
    assert len(found) == 15 and not refused
    assert {config.name for config in found} == {"demo"} and {config.protocol.n for config in found} == {128}


def test_a_run_that_would_be_refused_is_named_beside_the_others(plan):
    text = plan("-m", "model=tiny-dit,dit-xl-2-512")
    assert "plan of 1 run on" in text and "left out: model dit-xl-2-512: " in text


def test_a_plan_of_nothing_but_refused_runs_is_an_error(tmp_path, capsys):
    assert main(["run", "model=dit-xl-2-512", f"results_dir={tmp_path}", "--plan"]) == 2
    assert capsys.readouterr().err.startswith("ditbench: model dit-xl-2-512: ")


def test_what_does_not_fit_is_said_with_the_batch_that_does(plan, monkeypatch):
    monkeypatch.setattr(rates, "SMALL_MACS", 1e8)  # of a probe's step, for the rates, which are not asked here
    monkeypatch.setattr(planning, "_held_bytes", lambda: 0.0)
    monkeypatch.setattr(planning, "free_memory", lambda device: 40e6)
    assert "does not fit" not in plan()
    text = plan("protocol.n=1000", "generate.batch_size=1000", "generate.noise_floor_seeds=0")
    (batch,) = re.findall(r"does not fit: host memory .* generate.batch_size=(\d+)", text)
    again = plan("protocol.n=1000", f"generate.batch_size={batch}", "generate.noise_floor_seeds=0")
    assert "does not fit" not in again


def test_a_full_disk_is_said(plan, monkeypatch):
    monkeypatch.setattr(planning, "_free_disk", lambda folder: 1000.0)
    assert re.search(r"does not fit: disk: .* of 1 kB free; protocol.n", plan())


def test_a_model_of_which_nothing_fits_is_planned_without_its_weights(capsys, tmp_path, monkeypatch):
    """FLUX.1 dev's shapes with fewer layers, 5,000 pictures of 1024²: its set is within the 8 GB of true runs."""
    monkeypatch.setattr(rates, "ROWS", 8)
    monkeypatch.setattr(rates, "BUSY_S", 0.1)
    few = ("model.random.num_layers=1", "model.random.num_single_layers=1", "protocol.n=5000", "protocol.steps=28")
    assert main(["run", "model=flux.1-dev-random", *few, f"results_dir={tmp_path}", "--plan"]) == 0
    text = capsys.readouterr().out
    disk = re.findall(r"^generate .* ([\d.]+) GB$", text, re.MULTILINE)
    assert len(disk) == 1 and 4 < float(disk[0]) < 8
    assert "random weights alone draw nothing" in text


def test_a_batch_that_is_left_to_memory_is_planned_by_its_tokens():
    config = parse(composed([["protocol.n=1000"]])[0])
    found = [
        batch_size(config, Counts(shapes=Counter({(tokens, 8, 8): 1})), "generate", 1000) for tokens in (16, 256, 4608)
    ]
    assert found == [64, 64, 2], "tiny-dit's, DiT-XL/2's, FLUX's"


def test_blocks_that_are_guests_take_less_of_a_device_and_more_of_the_host(plan):
    (line,) = [line for line in plan().splitlines() if line.startswith("on an accelerator")]
    found = re.findall(r"host ([\d.]+ \wB), device ([\d.]+ \wB) \(memory=(\w+)\)", line)
    (host, device), (host_of_guests, device_of_guests) = [[in_bytes(each) for each in sizes] for *sizes, _ in found]
    assert [way for *_, way in found] == ["resident", "offload"]
    assert (
        device_of_guests < device and host_of_guests >= host
    )  # a small model's copy is lost in the three digits that are printed


def in_bytes(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


def test_numbers_are_short():
    assert [amount(value) for value in (0, 12, 999.7, 1.234e15)] == ["0 ", "12 ", "1 k", "1.23 P"]
    assert [size(value) for value in (0, 12, 1.5e9)] == ["–", "12 B", "1.5 GB"]
    assert [duration(value) for value in (0.25, 59, 90, 7200, 86400 * 1234)] == [
        "0.25 s", "59 s", "1.5 min", "2 h", "1,234 days",
    ]  # fmt: skip


def test_hydras_note_of_a_sweep_is_not_left_where_a_plan_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(configurations(["-m", "bits=w8a8,w4a4"])[0]) == 2
    assert list(Path(tmp_path).iterdir()) == []
