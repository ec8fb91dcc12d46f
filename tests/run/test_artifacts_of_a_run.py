"""Every stage leaves an artifact: what is there is not made again, whatever happened to the run that made it."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest

from ditbench.harness import run as running
from ditbench.harness.cli import main
from ditbench.harness.generation import generate as generation
from ditbench.harness.records import hashed_json
from ditbench.harness.records.attempts import alone_with, read_all
from ditbench.harness.report.whole import values_with
from ditbench.harness.scoring.later_metrics import evaluate
from ditbench.harness.stages import evaluate as evaluating

W4 = ("bits=w4a4", "name=kept")


@pytest.fixture
def drawn(monkeypatch):
    """Titles of the sets of which pieces were drawn, in turn."""
    titles, real = [], generation._drawn

    def counting(model, transformer, wanted, rows, sampler, correct, title, seen):
        titles.append(title)
        return real(model, transformer, wanted, rows, sampler, correct, title, seen)

    monkeypatch.setattr(generation, "_drawn", counting)
    return titles


@pytest.fixture
def computed(monkeypatch):
    """Names of the metrics that were computed, in turn."""
    names, real = [], evaluating._of_one
    monkeypatch.setattr(evaluating, "_of_one", lambda name, evidence: (names.append(name), real(name, evidence))[1])
    return names


@pytest.fixture(scope="module")
def made_once(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    assert main(["run", *tiny, f"results_dir={folder}", *W4]) == 0
    return folder


@pytest.fixture
def no_second_draw(made_once, tmp_path, drawn, computed):
    """A run was made, and its results and cache copied to where this test may change them; its record says so."""
    shutil.copytree(made_once, tmp_path, dirs_exist_ok=True)
    (path,) = tmp_path.glob("runs/kept/*/record.json")
    moved = json.dumps(hashed_json.read(path)).replace(str(made_once), str(tmp_path))
    path.write_text(hashed_json.text_of(json.loads(moved)))


def test_a_run_draws_its_own_set_the_float_models_and_those_of_two_seeds_of_the_noise_floor(run, drawn, computed):
    assert run(*W4) == 0
    assert len(drawn) == 4 and set(computed) == {"psnr", "sqnr", "torchmetrics/fid_judge"}


def the_record(results_dir: Path):
    (record,) = read_all(results_dir, "kept")
    return record


def test_a_record_lists_what_it_was_made_from(run, tmp_path, no_second_draw):
    made_from = the_record(tmp_path).made_from
    assert (tmp_path / "cache" / "recording" / made_from["recording"]).is_dir()
    for key in (made_from["samples"], made_from["float_samples"], *made_from["noise_samples"]):
        assert (tmp_path / "cache" / "samples" / key / "store.json").is_file()


def test_the_same_run_with_force_draws_and_scores_nothing_again(run, drawn, computed, no_second_draw):
    assert run("--force", *W4) == 0
    assert drawn == [] and computed == []


def test_another_setting_of_metrics_costs_metrics_and_no_drawing(run, drawn, computed, no_second_draw):
    assert run(*W4, "metrics.resamples=6") == 0
    assert drawn == [] and set(computed) == {"psnr", "sqnr", "torchmetrics/fid_judge"}


def test_another_seed_or_method_is_drawn_again_and_the_float_model_is_not(run, drawn, no_second_draw):
    assert run(*W4, "method=smoothquant") == 0
    assert [title for title in drawn if "smoothquant" in title] == drawn and len(drawn) == 1


@pytest.mark.parametrize("stage", ["evaluate", "measure", "layer_errors", "save_artifacts"])
def test_a_failure_after_drawing_loses_no_sample(run, tmp_path, drawn, monkeypatch, stage):
    def fail(*args, **kwargs):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(running, stage, fail)
        assert run(*W4) == 3
    drawn.clear()
    assert run(*W4) == 0
    assert [title for title in drawn if "rtn" in title or "float32" in title] == []
    assert the_record(tmp_path).status == "ok"


def test_one_damaged_image_is_named_and_its_piece_alone_drawn_again(run, tmp_path, drawn, no_second_draw, capsys):
    store = tmp_path / "cache" / "samples" / the_record(tmp_path).made_from["samples"]
    path = store / "000002.webp"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    assert run("--force", *W4) == 0
    assert len(drawn) == 1 and str(path) in capsys.readouterr().err


def test_a_finished_run_is_scored_with_another_metric(run, tmp_path, drawn, computed, no_second_draw, capsys):
    assert main(["evaluate", "kept", "--metrics", "ssim", "accuracy", "psnr", "--results-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    record = the_record(tmp_path)
    assert drawn == [] and set(computed) == {"ssim", "accuracy"} and "psnr: recorded already" in said
    assert 0 < record.metrics["ssim"]["value"] <= 1 and record.metrics["accuracy"]["noise_floor"] is not None
    assert values_with(record, "ssim").run["ssim"].values_N.shape == (4,), "for paired tests"
    assert values_with(record, "accuracy").float_model["accuracy"].yes_no
    assert main(["evaluate", "kept", "--metrics", "ssim", "--results-dir", str(tmp_path)]) == 0
    assert "ssim: recorded already" in capsys.readouterr().out


def test_what_is_scored_again_after_a_mend_counts_from_then_on(run, tmp_path, drawn, no_second_draw, monkeypatch):
    before = the_record(tmp_path).metrics["psnr"]["value"]
    real = evaluating._of_one

    def mended(name, evidence):
        entry, values = real(name, evidence)
        return entry | {"value": entry["value"] + 1}, values

    monkeypatch.setattr(evaluating, "_of_one", mended)
    shutil.rmtree(tmp_path / "cache" / "values")  # as a change of the metric's source makes them those of another key
    assert main(["evaluate", "kept", "--again", "--metrics", "psnr", "--results-dir", str(tmp_path)]) == 0
    record = the_record(tmp_path)
    assert drawn == [] and record.metrics["psnr"]["value"] == before + 1
    assert values_with(record, "psnr").run["psnr"].values_N.shape == (4,), "those that were computed now"


def test_who_scores_a_run_waits_for_who_does_and_finds_its_value(run, tmp_path, computed, no_second_draw):
    said = []
    with alone_with(the_record(tmp_path)):
        second = threading.Thread(target=lambda: said.append(evaluate("kept", ["ssim"], tmp_path)))
        second.start()
        second.join(1)
        assert second.is_alive() and computed == []
    second.join()
    assert not said[0].failed and computed == ["ssim"]
    assert "recorded already" in evaluate("kept", ["ssim"], tmp_path).text and computed == ["ssim"]
    assert not list(tmp_path.rglob(".*.metrics.lock"))


def test_a_metric_computed_later_is_the_one_that_the_run_would_have_recorded(run, tmp_path, no_second_draw):
    assert main(["evaluate", "kept", "--metrics", "ssim", "accuracy", "--results-dir", str(tmp_path)]) == 0
    later = the_record(tmp_path).metrics
    names = "metrics.names=[ssim,accuracy]"
    assert run("bits=w4a4", "name=again", names, "cache_dir=" + str(tmp_path / "other")) == 0
    (again,) = read_all(tmp_path, "again")
    for name in ("ssim", "accuracy"):
        assert later[name] == again.metrics[name]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["kept", "--metrics", "psnrr"], "psnr"),
        (["other", "--metrics", "psnr"], "expected a run's folder"),
        (["kept", "bits=w8a8", "--metrics", "ssim"], "only device and metrics"),
    ],
)
def test_what_cannot_be_scored_is_said_in_a_line(run, tmp_path, no_second_draw, capsys, arguments, said):
    capsys.readouterr()
    assert main(["evaluate", *arguments, "--results-dir", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_samples_that_were_deleted_are_said_with_what_to_do(run, tmp_path, no_second_draw, capsys):
    assert main(["cache", "--results-dir", str(tmp_path), "prune", "--all"]) == 0
    capsys.readouterr()
    assert main(["evaluate", "kept", "--metrics", "ssim", "--results-dir", str(tmp_path)]) == 2
    assert "are not there" in capsys.readouterr().err


def cache(results_dir: Path, *arguments: str) -> int:
    return main(["cache", "--results-dir", str(results_dir), *arguments])


def test_the_cache_says_what_it_holds_and_that_it_is_whole(run, tmp_path, no_second_draw, capsys):
    capsys.readouterr()
    assert cache(tmp_path, "ls") == cache(tmp_path, "size") == cache(tmp_path, "verify") == 0
    said = capsys.readouterr().out
    assert "samples of tiny-dit rtn W4A4" in said and "in all" in said and "0 damaged files" in said


def test_every_kind_of_file_with_one_flipped_bit_is_named_by_verify(run, tmp_path, no_second_draw, capsys):
    files = {}
    for path in sorted((tmp_path / "cache").rglob("*")):
        if path.is_file() and not {"locks", "hydra"} & set(path.parts):
            numbered = path.stem.isdigit()
            files.setdefault((path.relative_to(tmp_path).parts[1], path.suffix if numbered else path.name), path)
    assert len(files) >= 14
    for path in files.values():
        content = path.read_bytes()
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 4]) + content[-1:])
        capsys.readouterr()
        assert cache(tmp_path, "verify") == 3
        assert str(path) in capsys.readouterr().out
        path.write_bytes(content)
    assert cache(tmp_path, "verify") == 0


def test_the_folder_stands_before_or_behind_what_is_asked_of_the_cache(run, tmp_path, no_second_draw, capsys):
    said = []
    for arguments in (["--results-dir", str(tmp_path), "ls"], ["ls", "--results-dir", str(tmp_path)]):
        capsys.readouterr()
        assert main(["cache", *arguments]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_pruning_keeps_what_records_were_made_from(run, tmp_path, no_second_draw, capsys):
    unfinished = tmp_path / "cache" / "samples" / ("f" * 32)
    unfinished.mkdir()
    (unfinished / ".000001.webp.x.part").touch()
    record = the_record(tmp_path)
    assert cache(tmp_path, "prune", "--older-than", "0", "--dry-run") == 0
    assert unfinished.exists(), "nothing goes in a dry run"
    assert cache(tmp_path, "prune", "--older-than", "0") == 0
    assert not unfinished.exists()
    assert (tmp_path / "cache" / "samples" / record.made_from["samples"]).is_dir()
    assert list((tmp_path / "cache" / "values").iterdir()), "values of its samples stay as well"
    assert cache(tmp_path, "prune", "--all") == 0
    assert not (tmp_path / "cache" / "samples" / record.made_from["samples"]).exists()
