"""A run that fails, is interrupted or killed: what is recorded, what is left, and what the next start does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import ditbench
from ditbench.eval.base import known_metrics
from ditbench.harness import run as running
from ditbench.harness.cli import main
from ditbench.harness.common.errors import UserError
from ditbench.harness.stages.loaded import forget_models, left_alone

QUICK = ("metrics=fidelity", "generate.noise_floor_seeds=0")
WORKING = '''"""Flaky: rounds to nearest when it is in the mood."""
from dataclasses import dataclass
from pathlib import Path
from ditbench.methods import rtn

@dataclass(frozen=True)
class Params:
    mood: str = "good"

def fit(target, calibration, bits, params):
    if params.mood == "bad":
        raise ZeroDivisionError("not today\\nnor tomorrow")
    if params.mood == "lost":
        Path("/no/such/file").read_text()
    return rtn.fit(target, calibration, bits, rtn.Params())

def apply(target, state, bits, params):
    return rtn.apply(target, state, bits, rtn.Params())
'''


def test_a_failed_run_of_a_sweep_is_recorded_with_its_reason_and_the_sweep_goes_on(run, tmp_path, read_records, capsys):
    assert run("-m", "bits.weight.granularity=per_group", "bits.weight.group_size=40,48", *QUICK) == 3
    failed, good = read_records(tmp_path).values()
    assert (failed["status"], good["status"]) == ("failed", "ok")
    assert failed["error"].startswith("transformer_blocks.0.attn1.to_q: group_size 40 does not divide C=96")
    assert failed["metrics"] == {} and failed["env"]["packages"]["torch"], "what was known is kept"
    assert "calibrate" in failed["timings_s"]
    said = capsys.readouterr()
    assert "failed: tiny-dit rtn W8A8: transformer_blocks.0.attn1.to_q" in said.err
    assert "group_size 40" in said.out, "the table lists the failed run"


def test_a_broken_method_is_recorded_with_where_it_broke(run, tmp_path, plugin, read_records, capsys):
    plugin("flaky", WORKING)
    assert run("-m", "method=flaky", "method.mood=bad,good", *QUICK) == 3
    failed, good = read_records(tmp_path).values()
    assert (failed["status"], good["status"]) == ("failed", "ok")
    assert "ZeroDivisionError in flaky.py:12" in failed["error"] and "not today" in failed["error"]
    assert "\n" not in failed["error"]
    assert "Traceback" not in capsys.readouterr().err


def test_a_method_that_misses_a_file_is_a_failed_run(run, tmp_path, plugin, read_records):
    plugin("flaky", WORKING)
    assert run("method=flaky", "method.mood=lost", *QUICK) == 3
    (failed,) = read_records(tmp_path).values()
    assert failed["status"] == "failed" and "/no/such/file" in failed["error"]


def test_a_method_that_misses_a_file_does_not_stop_the_sweep_or_show_a_traceback(
    run, tmp_path, plugin, read_records, capsys
):
    plugin("flaky", WORKING)
    assert run("-m", "method=flaky", "method.mood=lost,good", *QUICK) in (2, 3)
    assert "ok" in [values["status"] for values in read_records(tmp_path).values()]
    said = capsys.readouterr().err
    assert "Traceback" not in said and "/no/such/file" in said


def test_a_metric_that_breaks_costs_the_run_its_number_and_nothing_else(
    run, tmp_path, read_records, monkeypatch, capsys
):
    def full(evidence):
        raise RuntimeError("CUDA out of memory")

    name, known = "torchmetrics/fid_judge", known_metrics()
    names = f"metrics.names=[psnr,accuracy,{name}]"
    with monkeypatch.context() as once:
        once.setitem(known, name, replace(known[name], compute=full))
        assert run(names) == 0
    assert f"{name} FAILED: out of memory: RuntimeError in test_failures.py" in capsys.readouterr().err
    assert run(names, "--force") == 0
    broken, whole = read_records(tmp_path).values()
    assert (broken["status"], broken["metrics"][name]["status"]) == ("ok", "failed")
    assert broken["metrics"]["psnr"]["value"] == whole["metrics"]["psnr"]["value"]
    assert broken["made_from"]["samples"] and broken["efficiency"]["latency_ms"]["median"] > 0
    assert whole["metrics"][name]["noise_floor"] > 0, "though the noise floors kept by the first run lack it"


SLOPPY = '''"""Sloppy: breaks the contract in the way it is told to."""
from dataclasses import dataclass, replace
import torch
from ditbench.harness.fitting.rounding import nearest
from ditbench.harness.quant.transforms import Transform

@dataclass(frozen=True)
class Params:
    way: str = "none"

def fit(target, calibration, bits, params):
    if params.way in ("mutates", "mutates_and_raises"):
        target.module(target.layers[0]).weight.data.mul_(2)
    if params.way == "mutates_and_raises":
        raise ValueError("too late")
    return {"no_state": None, "list": {"a": [1, 2]}}.get(params.way, {})

def apply(target, state, bits, params):
    if params.way == "short":
        return nearest(target, bits, state, {target.layers[0]: Transform(scale_C=torch.ones(5))})
    recipe = nearest(target, bits, state)
    renamed = replace(recipe, layers={"blocks.0": recipe.layers[target.layers[0]]})
    return {"no_recipe": None, "renamed": renamed}.get(params.way, recipe)
'''


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("no_state", "method sloppy: fit returned a NoneType, expected tensors by name"),
        ("list", "method sloppy: state['a'] of fit is a list, expected a tensor"),
        ("no_recipe", "method sloppy: apply returned a NoneType, expected a ModelRecipe"),
        ("renamed", "no layer (recipe of method sloppy) 'blocks.0'"),
        ("short", "called from sloppy.py:20: The size of tensor"),
    ],
)
def test_a_method_that_breaks_the_contract_is_told_how_before_anything_is_generated(
    run, tmp_path, plugin, read_records, way, words
):
    plugin("sloppy", SLOPPY)
    assert run("method=sloppy", f"method.way={way}", *QUICK) == 3
    (failed,) = read_records(tmp_path).values()
    assert words in failed["error"]
    assert "generate" not in failed["timings_s"]


@pytest.mark.parametrize("dim", [0, 1])
def test_a_method_that_only_reorders_a_weight_of_the_float_model_is_noticed_too(own_model, dim):
    weight = own_model.transformer.transformer_blocks[0].attn1.to_q.weight
    with (
        pytest.raises(UserError, match=r"method sloppy: changed the float model \(.*attn1.to_q.weight, 1 in all\)"),
        left_alone(own_model.transformer, "sloppy"),
    ):
        weight.copy_(weight.flip(dim))


def test_a_method_that_changes_the_float_model_fails_and_the_next_run_has_the_model_as_it_was(
    run, tmp_path, plugin, read_records
):
    plugin("sloppy", SLOPPY)
    assert run("-m", "method=sloppy", "method.way=mutates,mutates_and_raises,none", *QUICK) == 3
    mutated, raised, after = read_records(tmp_path).values()
    assert "method sloppy: changed the float model (transformer_blocks.0.attn1.to_q.weight" in mutated["error"]
    assert "too late" in raised["error"]
    assert run("method=rtn", "--force", *QUICK) == 0  # rounds as sloppy does when it is not sloppy
    alone = list(read_records(tmp_path).values())[-1]
    assert after["metrics"]["psnr"]["value"] == alone["metrics"]["psnr"]["value"]
    forget_models()
    assert run("method=rtn", "--force", f"cache_dir={tmp_path}/fresh", *QUICK) == 0
    fresh = list(read_records(tmp_path).values())[-1]
    assert after["metrics"]["psnr"]["value"] == fresh["metrics"]["psnr"]["value"]


@pytest.fixture(scope="module")
def smoothed_once(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smoothed")
    assert main(["run", *tiny, f"results_dir={folder}", "method=smoothquant"]) == 0
    return folder


@pytest.fixture
def smoothed(smoothed_once, tmp_path) -> None:
    """A run was made, and its results and cache copied to where this test may change them."""
    shutil.copytree(smoothed_once, tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_damaged_cache_files_are_made_again_and_named(run, tmp_path, read_records, capsys, smoothed, damage):
    files = [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".npz", ".json", ".safetensors")]
    files = [path for path in files if path.name != "manifest.json"]  # without one the folder is named, not its files
    kinds = {path.relative_to(tmp_path / "cache").parts[0] for path in files}
    assert {"recording", "statistics", "state", "samples", "values"} <= kinds
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if damage == "cut" else b"garbage")
    assert run("method=smoothquant", "--force") == 0
    before, after = read_records(tmp_path).values()
    values = [{name: (m["value"], m["noise_floor"]) for name, m in each["metrics"].items()} for each in (before, after)]
    assert values[0] == values[1]
    said = capsys.readouterr().err
    artifacts = {"/".join(path.relative_to(tmp_path / "cache").parts[:2]) for path in files}
    assert [name for name in artifacts if f"cache/{name}/" not in said] == [], "of an artifact its first damaged file"


def test_a_metric_that_was_skipped_when_the_noise_floor_was_cached_gets_one_later(
    run, tmp_path, read_records, smoothed
):
    shutil.rmtree(tmp_path / "cache" / "values")
    assert run("method=smoothquant", "--force") == 0
    first, second = (each["metrics"]["torchmetrics/fid_judge"] for each in read_records(tmp_path).values())
    assert first["noise_floor"] == second["noise_floor"] > 0


def test_a_failed_run_is_tried_again_and_the_failure_is_kept(run, tmp_path, read_records, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(running, "generate", fail)
        assert run(*QUICK) == 3
    assert run(*QUICK) == 0
    first, second = read_records(tmp_path).items()
    assert second[0] == f"{first[0]}.2"
    assert first[1]["status"] == "failed" and "out of luck" in first[1]["error"]
    assert first[1]["bits"]["label"] == "W8A8", "stages before the failure are recorded"
    assert second[1]["status"] == "ok" and second[1]["error"] is None
    assert run(*QUICK) == 0
    assert len(read_records(tmp_path)) == 2, "an ok attempt is not repeated"


@pytest.mark.parametrize("stage", ["calibrate", "save_artifacts"])
def test_an_interruption_leaves_no_record_and_the_next_start_works(
    run, tmp_path, read_records, monkeypatch, capsys, stage
):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running, stage, interrupt)
        assert run("-m", "bits=w8a8,w4a4", *QUICK) == 130
    assert "finished runs are recorded" in capsys.readouterr().err
    left = [path.name for path in (tmp_path / "runs" / "default").iterdir()]
    assert left == [".sweeps"], "nothing half, the second job did not start, and what the sweep was to do is known"
    assert run(*QUICK) == 0
    assert [values["status"] for values in read_records(tmp_path).values()] == ["ok"]


def test_an_interruption_keeps_the_runs_that_were_finished(run, tmp_path, read_records, monkeypatch):
    original, calls = running.measure, []

    def second_time(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(running, "measure", second_time)
    assert run("-m", "bits=w8a8,w4a4", *QUICK) == 130
    assert [values["bits"]["label"] for values in read_records(tmp_path).values()] == ["W8A8"]


def test_a_killed_run_leaves_no_record_and_the_next_start_cleans_up(run, tiny, tmp_path, read_records):
    code = (
        "import sys, time\n"
        "from ditbench.harness import run\n"
        "from ditbench.harness.cli import main\n"
        "def hang(*args, **kwargs):\n"
        "    print('hanging', flush=True)\n"
        "    time.sleep(600)\n"
        "run.save_artifacts = hang\n"
        "main(sys.argv[1:])"
    )
    root = str(Path(ditbench.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root}
    with subprocess.Popen(
        [sys.executable, "-c", code, "run", *tiny, f"results_dir={tmp_path}", *QUICK],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "hanging\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=30) == -signal.SIGKILL
    home = tmp_path / "runs" / "default"
    left = sorted(home.iterdir())
    assert {path.suffix for path in left} == {".lock", ".part"}, "only a hidden scratch folder is left, and locks"
    assert all(path.name.startswith(".") for path in left)
    assert read_records(tmp_path) == {}

    assert run(*QUICK) == 0
    (folder,) = home.iterdir()
    assert folder.name in read_records(tmp_path), "the scratch folder is gone, the record is there"


def test_a_run_that_another_process_published_meanwhile_is_found_and_not_recorded_twice(
    run, tmp_path, read_records, monkeypatch, capsys
):
    original, others = running.evaluate, []

    def somebody_is_faster(config, *args):
        if not others:
            others.append(config)
            assert running.run(config).status == "ok"
        return original(config, *args)

    monkeypatch.setattr(running, "evaluate", somebody_is_faster)
    assert run(*QUICK) == 0
    (folder,) = (tmp_path / "runs" / "default").iterdir()
    assert folder.name in read_records(tmp_path), "one record, and no scratch folder"
    assert "was published meanwhile" in capsys.readouterr().err


def test_the_same_command_completes_a_run_whose_metric_failed(run, tmp_path, read_records, monkeypatch, capsys):
    original, broken = running.evaluate, ["psnr", "sqnr"]

    def breaks(*args):
        entries, per_sample = original(*args)
        for name in broken:
            entries[name] |= {"value": None, "ci95": None, "status": "failed", "reason": "out of memory"}
        entries["lpips_alex"] |= {"value": None, "ci95": None, "status": "skipped", "reason": "no weights"}
        return entries, per_sample

    monkeypatch.setattr(running, "evaluate", breaks)
    arguments = ("metrics.names=[psnr,sqnr,lpips_alex]", "generate.noise_floor_seeds=0")
    assert run(*arguments) == 0
    assert run(*arguments) == 0
    ((first, _),) = read_records(tmp_path).items()
    said = capsys.readouterr().err
    assert "psnr, sqnr failed in" in said and "is as good and stays" in said, "done again, and no better"
    broken.remove("psnr")
    assert run(*arguments) == 0
    broken.clear()
    assert run(*arguments) == 0
    recorded = read_records(tmp_path)
    assert list(recorded) == [first, f"{first}.2", f"{first}.3"]
    failed = [[n for n, e in r["metrics"].items() if e["status"] == "failed"] for r in recorded.values()]
    assert failed == [["psnr", "sqnr"], ["sqnr"], []]
    capsys.readouterr()
    assert run(*arguments) == 0, "what was skipped is not tried again"
    assert f"already recorded in {tmp_path}/runs/default/{first}.3" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["calibrate", "measure", "save_artifacts"])
def test_a_run_out_of_memory_is_a_failed_record_with_that_reason_and_is_tried_again(
    run, tmp_path, read_records, monkeypatch, stage
):
    def full(*args, **kwargs):
        raise MemoryError

    with monkeypatch.context() as once:
        once.setattr(running, stage, full)
        assert run(*QUICK) == 3
    assert run(*QUICK) == 0
    failed, done = read_records(tmp_path).values()
    assert failed["status"] == "failed" and failed["error"].startswith("out of memory: MemoryError in test_failures.py")
    assert done["status"] == "ok"


def test_numbers_that_are_not_finite_are_null_in_the_record_and_named(run, tmp_path, read_records, monkeypatch):
    measured, table = running.measure, running.layer_table
    monkeypatch.setattr(running, "measure", lambda *a: measured(*a) | {"speedup": float("nan")})

    def odd(*args):
        layers = table(*args)
        next(iter(layers.values()))["sqnr_db"] = float("inf")
        return layers

    monkeypatch.setattr(running, "layer_table", odd)
    assert run(*QUICK) == 0
    (record,) = read_records(tmp_path).values()
    layer = next(iter(record["layers"]))
    assert record["status"] == "ok" and record["efficiency"]["speedup"] is None
    assert record["layers"][layer]["sqnr_db"] is None
    assert record["non_finite"] == ["efficiency/speedup: nan", f"layers/{layer}/sqnr_db: inf"]


def test_a_finished_run_is_found_without_doing_any_of_it(run, twice, capsys, monkeypatch):
    """A sweep that is started again must not pay for what it has."""
    monkeypatch.setattr(running, "carry_out", None)
    monkeypatch.setattr(running.attempts, "attempt", None)
    assert run("bits=w4a4", f"results_dir={twice}") == 0
    assert "already recorded" in capsys.readouterr().err
