"""`launcher=`: what its settings may be, what is said where an engine cannot be, and how workers share out the devices."""

from __future__ import annotations

import os
import select
import signal
from types import SimpleNamespace

import pytest
import torch

from ditbench.harness.cli import main
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.paths import CONF
from ditbench.harness.sweep import overrides
from ditbench.harness.sweep.engines import base, joblib, ray, slurm
from ditbench.harness.sweep.engines.base import Job, Outcome


def job(number: int = 0, **raw: object) -> Job:
    return Job({"device": "auto", "debug": False, **raw}, f"run {number}", number, (), os.getcwd())


def told(engine: str, **values: object) -> dict[str, object]:
    return {"engine": engine, **values}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (told("slrm"), "no launcher 'slrm'; did you mean 'slurm'?"),
        (told("joblib", partition="gpu"), "no setting of launcher 'partition'"),
        (told("joblib", workers="two"), "launcher.workers must be a whole number or auto, got 'two'"),
        (told("joblib", devices=0), "launcher.devices must be from 1 to 100,000, got 0"),
        (told("joblib", per_run=0), "launcher.per_run must be from 1 to 100,000, got 0"),
        (told("local", per_run=2), "launcher=local is one process"),
        (told("slurm", folder="x", array_parallelism=0), "launcher.array_parallelism must be from 1 to 100,000, got 0"),
        (told("ray", restarts=-1), "launcher.restarts must be from 0 to 100,000, got -1"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_a_line(section, words):
    with pytest.raises(UserError, match=words.replace("?", r"\?")) as refused:
        base.chosen(section)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("engine", "library"), [("joblib", "joblib"), ("slurm", "submitit"), ("ray", "ray")])
def test_an_engine_that_is_not_installed_is_said_with_what_to_install(engine, library, monkeypatch):
    def missing(name: str):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(base.importlib, "import_module", missing)
    with pytest.raises(
        UserError, match=rf"launcher={engine}: {library} is not installed; pip install 'ditbench\[{engine}\]'"
    ):
        base.library(library, engine)


def test_every_engine_has_its_file_with_all_of_its_settings():
    import yaml

    for path in sorted((CONF / "launcher").glob("*.yaml")):
        values = yaml.safe_load(path.read_text())
        engine, settings = base.chosen(values | ({"folder": "x"} if path.stem == "slurm" else {}))
        assert engine.__name__.endswith(f".{values['engine']}") and values["engine"] == path.stem
        assert set(values) - {"engine"} == set(vars(settings)), path.stem


@pytest.mark.parametrize("engine", [joblib, slurm, ray])
def test_a_job_that_names_its_own_device_is_refused(engine, monkeypatch):
    for module in (joblib, slurm, ray):
        monkeypatch.setattr(module, "library", lambda name, extra: SimpleNamespace())
    settings = engine.Settings(folder="x") if engine is slurm else engine.Settings()
    with pytest.raises(UserError, match="device=cuda:1: a launcher gives each worker its own devices"):
        next(engine.run([job(device="cuda:1")], settings))


@pytest.mark.parametrize(
    ("visible", "settings", "jobs", "devices"),
    [
        (None, {}, 8, ("0", "1", "2", "3")),
        (None, {"devices": 2}, 8, ("0,1", "2,3")),
        ("4,7,GPU-a,2", {}, 8, ("4", "7", "GPU-a", "2")),
        (None, {"workers": 6}, 8, ("0", "1", "2", "3", "0", "1")),
        (None, {}, 3, ("0", "1", "2")),
    ],
)
def test_each_worker_has_devices_of_its_own(visible, settings, jobs, devices, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    workers, share = joblib.shared(joblib.Settings(**settings), jobs, "x")
    assert share.devices == devices and workers == len(devices)


def test_without_devices_two_workers_share_out_the_cores(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert joblib.shared(joblib.Settings(), 12, "x") == (2, joblib.Share("x", (), 4, 2))
    assert joblib.shared(joblib.Settings(workers=4, threads=3), 12, "x") == (4, joblib.Share("x", (), 3, 4))


def test_a_worker_ends_soon_after_its_command_was_killed():
    reads, writes = os.pipe()
    if (command := os.fork()) == 0:
        if os.fork() == 0:
            parent = os.getppid()
            signal.alarm(30)
            os.write(writes, b"x")
            joblib.end_with(parent, every_s=0.01)
        signal.pause()
    os.close(writes)
    assert os.read(reads, 1) == b"x"
    os.kill(command, signal.SIGKILL)
    os.waitpid(command, 0)
    ended, _, _ = select.select([reads], [], [], 20)
    assert ended and os.read(reads, 1) == b"", "whoever held the other end is gone"
    os.close(reads)


def test_the_best_that_the_workers_of_one_run_say_counts_once_all_have_ended():
    said = [Outcome("lost", "killed"), Outcome("failed", "why"), Outcome("ok"), Outcome("refused", "no")]
    engine = SimpleNamespace(run=lambda jobs, settings: enumerate(said))
    heard = list(base.outcomes(engine, SimpleNamespace(per_run=2), [job(0), job(1)]))
    assert heard == [(0, said[1]), (1, said[2])]


def test_what_a_site_asks_for_is_passed_on_to_sbatch(monkeypatch):
    every = {"gpus": "gpus gpu:h100:8\n", None: "cpus* (null)\ngpus gpu:h100:8\n"}
    monkeypatch.setattr(slurm, "_asked", lambda *command: every["gpus" if "gpus" in command else None])
    settings = slurm.Settings(
        "x",
        partition="gpus",
        time="4:00:00",
        account="lab",
        array_parallelism=8,
        memory="64G",
        sbatch={"mail_type": "END"},
    )
    asked = slurm.options(settings)
    assert (asked["partition"], asked["account"], asked["mem"]) == ("gpus", "lab", "64G")
    assert (asked["gpus_per_node"], asked["array_parallelism"]) == (1, 8)
    assert asked["additional_parameters"] == {"requeue": True, "time": "4:00:00", "mail-type": "END"}
    assert slurm.options(slurm.Settings("x"))["gpus_per_node"] is None, "the usual partition has none"


def test_a_task_that_left_the_queue_without_an_outcome_is_lost_with_slurms_word(monkeypatch, tmp_path):
    paths = SimpleNamespace(result_pickle=tmp_path / "none", stderr=tmp_path / "log")
    tasks = [SimpleNamespace(job_id=f"7_{place}", paths=paths) for place in range(2)]
    queue = iter([{"7_0", "7_1"}, {"7_1"}, None, {"7_1"}, set(), set(), set()])
    monkeypatch.setattr(slurm, "in_queue", lambda array: next(queue))
    monkeypatch.setattr(slurm, "state_of", lambda task: "CANCELLED")
    monkeypatch.setattr(slurm, "sleep", lambda seconds: None)
    ended = list(slurm._ended(tasks, "7"))
    assert [place for place, _ in ended] == [0, 1]
    assert {each.status for _, each in ended} == {"lost"} and "SLURM says CANCELLED" in str(ended[0][1].error)


def test_jobs_that_name_several_engines_are_refused_before_anything_starts(sweep, quick, home, capsys):
    started = quick()
    assert sweep("method=rtn", "launcher=local,joblib") == 2
    assert "launcher: the jobs of a sweep are carried out by one" in capsys.readouterr().err
    assert not started and not home.exists()


def test_an_engine_of_an_experiments_file_wants_a_sweep(quick, tmp_path, capsys):
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - override /launcher: joblib\n"
    (tmp_path / "own" / "experiment" / "mine.yaml").write_text(text)
    started = quick()
    assert (
        main(["run", f"--config-dir={tmp_path}/own", "experiment=mine", f"results_dir={tmp_path}", "tracker=none"]) == 2
    )
    assert "launcher=joblib comes from an experiment's file; add -m" in capsys.readouterr().err and not started


def test_a_setting_that_only_the_site_knows_may_be_added():
    parsed = overrides.parsed(["+launcher.sbatch.nice=100"])
    overrides.check_overrides(parsed, {"launcher": ["local", "slurm"]})


def test_another_engine_of_a_retry_drops_the_settings_of_the_first(monkeypatch):
    from ditbench.harness.sweep.retry import _given

    assert _given("launcher.workers", {"launcher"}) and _given("launcher", {"launcher"})
    assert not _given("method", {"launcher"}) and not _given("launcher", {"launcher.workers"})
