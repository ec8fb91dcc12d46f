"""Damaged files and full or forbidden disks: one or two lines that name the file and say what to do; no traceback."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from outcomes import FAILED, REFUSED, assert_short, process, statuses
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ditbench.harness.records import hashed_json, record


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_unreadable_weights_are_named(run, zoo_copy, damage):
    file = zoo_copy / "transformer" / "diffusion_pytorch_model.safetensors"
    content = {"truncated": file.read_bytes()[:5000], "garbage": b"garbage\n" * 100, "empty": b""}[damage]
    file.write_bytes(content)
    outcome = run(f"model.source={zoo_copy}")
    assert outcome.code == REFUSED
    assert_short(outcome, "model tiny-dit", str(file), "fetch it again")


def test_weights_that_hold_nan_are_refused_with_the_tensors_name(run, zoo_copy):
    file = zoo_copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_out_1.weight"][0, 0] = float("nan")
    save_file(tensors, file)
    outcome = run(f"model.source={zoo_copy}")
    assert outcome.code == REFUSED
    assert_short(outcome, "model tiny-dit", "NaN or infinity in proj_out_1.weight", "fetch it again")


def test_a_checkpoint_of_another_architecture_is_refused(zoo_copy, tmp_path):
    index = zoo_copy / "model_index.json"
    index.write_text(index.read_text().replace("DiTTransformer2DModel", "UNet2DModel"))
    config = zoo_copy / "transformer" / "config.json"
    config.write_text(json.dumps({"_class_name": "UNet2DModel", "sample_size": 16}))
    done = process("run", "tracker=none", f"results_dir={tmp_path}", f"model.source={zoo_copy}")
    assert done.code == REFUSED
    assert "Traceback" not in done.err
    last = done.err.splitlines()[-1]  # diffusers warns on its own before
    assert last.startswith(f"ditbench: model tiny-dit ({zoo_copy}): not a checkpoint of family 'dit'")
    assert "UNet2DModel, not a DiTTransformer2DModel" in last and "choose the matching model=" in last


def test_weights_that_do_not_fit_the_architecture_are_refused(run, zoo_copy):
    config = zoo_copy / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_head_dim": 8}))
    outcome = run(f"model.source={zoo_copy}")
    assert outcome.code == REFUSED
    assert_short(outcome, "model tiny-dit", str(zoo_copy))


def test_a_folder_that_is_no_pipeline_is_refused(run, tmp_path):
    (tmp_path / "empty").mkdir()
    outcome = run(f"model.source={tmp_path / 'empty'}")
    assert outcome.code == REFUSED
    assert_short(outcome, "no diffusers pipeline folder", "model_index.json")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, ("No space left on device", "results_dir=")),
        (errno.EACCES, ("cannot be written", "results_dir=")),
        (errno.EROFS, ("cannot be written", "results_dir=")),
        (errno.EIO, ("Input/output error",)),
    ],
)
def test_a_disk_that_takes_no_record_is_named_and_leaves_nothing_half(run, tmp_path, monkeypatch, number, words):
    def refuse(values, folder):
        raise OSError(number, os.strerror(number), str(folder / "record.json"))

    monkeypatch.setattr(record, "write", refuse)
    outcome = run()
    assert outcome.code == REFUSED
    assert "Traceback" not in outcome.err
    assert str(tmp_path) in outcome.error_lines[-1]
    for word in words:
        assert word in outcome.error_lines[-1]
    assert list((tmp_path / "runs" / "default").iterdir()) == []


def test_a_disk_that_is_full_before_the_record_is_reached_stops_the_run_and_records_no_failure(
    run, tmp_path, monkeypatch
):
    """safetensors has an exception of its own for it."""

    def refuse(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("ditbench.harness.calibration.on_disk.save_tensors", refuse)
    outcome = run()
    assert outcome.code == REFUSED
    assert f"{tmp_path}: no room to write" in outcome.error_lines[-1] and "results_dir=" in outcome.error_lines[-1]
    assert statuses(tmp_path) == []


def test_a_report_that_cannot_be_written_is_one_line(ditbench, finished, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    outcome = ditbench("report", "--results-dir", str(tmp_path), "--out", str(tmp_path / "file" / "report.md"))
    assert outcome.code == REFUSED
    assert_short(outcome, "--out", f"{tmp_path / 'file'} is no folder")


@pytest.mark.parametrize("command", ["compare", "report"])
def test_values_per_sample_that_cannot_be_read_are_named(ditbench, finished, tmp_path, command):
    (finished.parent / "per_sample.npz").write_text("garbage")
    outcome = ditbench(command, "--results-dir", str(tmp_path))
    assert outcome.code == (REFUSED if command == "compare" else 0), "compare has nothing else"
    assert ("rtn" in outcome.out) == (command == "report")
    assert_short(outcome, str(finished.parent / "per_sample.npz"), "bytes, came 7", "the report goes without it")


def test_a_state_with_one_flipped_bit_is_not_exported(ditbench, run, tmp_path):
    assert run("method=smoothquant").code == 0
    (state,) = tmp_path.glob("runs/*/*/state.safetensors")
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    outcome = ditbench("export", str(state.parent), "--out", str(tmp_path / "out"))
    assert outcome.code == REFUSED
    assert_short(outcome, str(state), "SHA-256", "run it again with --force")


def test_a_results_folder_that_may_not_be_written_is_named(run, tmp_path, monkeypatch):
    if os.geteuid():
        tmp_path.chmod(0o500)
    else:  # root may write anywhere
        monkeypatch.setattr(Path, "mkdir", denied(tmp_path, Path.mkdir))
    outcome = run()
    tmp_path.chmod(0o700)
    assert outcome.code == REFUSED
    assert "Traceback" not in outcome.err
    assert f"{tmp_path}: cannot be written" in outcome.error_lines[-1]
    assert "results_dir=" in outcome.error_lines[-1]


def test_a_results_folder_that_is_a_file_is_named(ditbench, tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    outcome = ditbench("run", "model=tiny-dit", "tracker=none", f"results_dir={file}")
    assert outcome.code == REFUSED
    assert "Traceback" not in outcome.err
    assert str(file) in outcome.error_lines[-1] and "Not a directory" in outcome.error_lines[-1]


BROKEN_RECORDS = {
    "newer": ('{"schema": 99}', ("schema 99 is newer", "upgrade ditbench")),
    "cut off": ('{"schema": 1, "run_id": "7f', ("not a readable record", "move that folder away")),
    "binary": (b"\xff\xfe\x00", ("not a readable record", "move that folder away")),
    "foreign": ("[1, 2]", ("not a readable record", "expected an object", "move that folder away")),
    "deep": ("[" * 100_000, ("not a readable record", "nested without end", "move that folder away")),
    "deep in a field": (
        '{"schema": 1, "config": ' + '{"a": ' * 200 + "1" + "}" * 201,
        ("nested more than 40 deep", "move that folder away"),
    ),
    "not finite": ('{"schema": 1, "seed": 1e999}', ("a number that is not finite", "move that folder away")),
    "other json": ('{"loss": 1.0}', ("not a ditbench record", "schema", "move that folder away")),
    "edited": (
        '{"schema": 1, "run_id": "0", "status": "ok", "config": {}, "method": "rtn", "model": "m", "experiment": "e", '
        '"metrics": {"psnr": 31.2}}',
        ("metric psnr is 31.2", "move that folder away"),
    ),
    "emptied": ('{"schema": 1}', ("not a ditbench record", "run_id", "move that folder away")),
}


@pytest.mark.parametrize("kind", BROKEN_RECORDS)
@pytest.mark.parametrize("command", ["report", "compare", "export"])
def test_a_record_that_cannot_be_read_is_named(ditbench, finished, tmp_path, kind, command):
    content, words = BROKEN_RECORDS[kind]
    finished.write_bytes(content if isinstance(content, bytes) else content.encode())
    what = {"export": (str(finished.parent), "--out", str(tmp_path / "out"))}.get(command, ())
    outcome = ditbench(command, *what, "--results-dir", str(tmp_path))
    assert outcome.code == REFUSED
    assert_short(outcome, str(finished), *words)


def test_a_run_whose_record_is_damaged_is_named_and_done_again_but_not_one_of_a_newer_version(run, finished, tmp_path):
    whole = finished.read_text()
    finished.write_text(whole[:-100])
    outcome = run()
    assert outcome.code == 0 and f"{finished}: not a readable record" in outcome.err
    again = finished.parent.with_name(f"{finished.parent.name}.2") / "record.json"
    assert json.loads(again.read_text())["status"] == "ok" and finished.read_text() == whole[:-100]
    again.write_text(hashed_json.text_of(hashed_json.read(again) | {"schema": 99}))
    outcome = run()
    assert outcome.code == REFUSED and "schema 99 is newer" in outcome.error_lines[-1]


def test_a_record_that_takes_no_json_is_written_as_far_as_it_goes_and_has_failed(run, tmp_path, monkeypatch):
    monkeypatch.setattr("ditbench.harness.run.layer_table", lambda *_: {"proj": {"sqnr_db": object()}})
    outcome = run()
    assert outcome.code == FAILED and "could not be written whole" in outcome.err and "Traceback" not in outcome.err
    (path,) = tmp_path.glob("runs/*/*/record.json")
    kept = json.loads(path.read_text())
    assert kept["status"] == "failed" and "could not be written whole" in kept["error"]
    assert kept["layers"] == {} and kept["metrics"]["psnr"]["value"] > 0


def test_a_record_that_there_is_no_memory_for_is_tried_again_with_less(run, tmp_path, monkeypatch):
    original = hashed_json.text_of

    def full(values):
        if len(repr(values)) > 3000:
            raise MemoryError
        return original(values)

    monkeypatch.setattr(hashed_json, "text_of", full)
    outcome = run()
    assert outcome.code == FAILED and "out of memory: MemoryError" in outcome.err and "Traceback" not in outcome.err
    assert statuses(tmp_path) == ["failed"]


def denied(under: Path, original):
    def mkdir(path, *args, **kwargs):
        if str(path).startswith(str(under / "runs")):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path, *args, **kwargs)

    return mkdir
