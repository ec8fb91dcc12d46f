"""`ditbench export` and records that are damaged or say odd things: named in one line, and nothing is written outside --out."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditbench.harness.build.export import RECIPE, TENSORS, read_recipe
from ditbench.harness.cli.export import folder_name
from ditbench.harness.common.artifacts import Damaged
from ditbench.harness.common.tensor_files import load_hashed, save_hashed
from ditbench.harness.records.record import Record

STATE = "state.safetensors"
ODD = ("../../x", "/etc/x", "a/b", "..", ".", "", "-rf", "x\n y", "CON:", "名前", "x" * 400, "a\\b", "~", "$HOME", "\0")


@pytest.fixture
def smoothed(smoothed_once, tmp_path):
    """The folder of a recorded run that saved a state, one's own."""
    shutil.copytree(smoothed_once, tmp_path, dirs_exist_ok=True)
    return next(tmp_path.glob("runs/smooth/*/record.json")).parent


def say(folder, change) -> None:
    """Let the record say something else."""
    record = json.loads((folder / "record.json").read_text())
    change(record)
    record.pop("sha256", None)  # records of before have none
    (folder / "record.json").write_text(json.dumps(record))


def listing(root) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if "cache" not in path.parts}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("of", ["model", "method", "label", "run_id"])
def test_the_folder_of_a_run_is_one_name_whatever_its_record_says(odd, of):
    values = {"model": "m", "method": "rtn", "label": "W4A8", "run_id": "0123456789ab"} | {of: odd}
    run = Record(values["run_id"], "ok", {}, values["method"], values["model"], "e", bits={"label": values["label"]})
    name = folder_name(run)
    assert not set(name) & set("/\\\0\n:$~") and name[0] not in ".-" and len(name.encode()) <= 255
    assert all(str(value).lower() in name.lower() for key, value in values.items() if key != of)


def test_several_runs_with_odd_names_stay_inside_out(ditbench, smoothed, tmp_path):
    other = smoothed.with_name("0" * 12)
    other.mkdir()
    for path in smoothed.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    say(other, lambda r: r.update(model="../../../outside", run_id="../" * 3))
    before = listing(tmp_path)
    out = tmp_path / "deep" / "out"
    done = ditbench("export", str(smoothed), str(other), "--out", str(out))
    assert done.code == 0, done.err
    new = listing(tmp_path) - before - {"deep", "deep/out"}
    assert {name.split("/")[:2] == ["deep", "out"] for name in new} == {True}
    assert len(list(out.iterdir())) == 2


def test_a_damaged_state_is_named_and_not_exported(ditbench, smoothed, tmp_path):
    whole, draw = (smoothed / STATE).read_bytes(), random.Random(0)
    for place in (0, 9, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(9))):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        (smoothed / STATE).write_bytes(damaged)
        done = ditbench("export", str(smoothed), "--out", str(tmp_path / "out"))
        assert done.code == 2 and len(done.error_lines) == 1, (place, done.err)
        assert STATE in done.err and "run it again" in done.err
        assert not (tmp_path / "out").exists()
    (smoothed / STATE).unlink()
    done = ditbench("export", str(smoothed), "--out", str(tmp_path / "out"))
    assert done.code == 2 and f"{STATE}: is missing" in done.err


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "grid.png", "", "."])
def test_a_state_that_is_none_of_the_runs_files_is_refused(ditbench, smoothed, tmp_path, name):
    say(smoothed, lambda r: r["artifacts"].update(state=name))
    done = ditbench("export", str(smoothed), "--out", str(tmp_path / "out"))
    assert done.code == 2 and len(done.error_lines) == 1 and "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


SAYS = {
    "bits": lambda r: r.update(bits=[]),
    "no label": lambda r: r["bits"].pop("label"),
    "artifacts": lambda r: r.update(artifacts=7),
    "a file": lambda r: r["artifacts"].update(state=7),
    "env": lambda r: r.update(env=None),
    "config": lambda r: r.update(config="x"),
    "no config": lambda r: r.update(config={}),
    "no section": lambda r: r["config"].pop("bits"),
    "seed": lambda r: r["config"].update(seed=[1]),
    "model": lambda r: r["config"].update(model=None),
    "the name of the model": lambda r: r["config"]["model"].update(name="../../x"),
    "method": lambda r: r["config"].update(method={"name": "nothing"}),
    "params": lambda r: r["config"]["method"].update(unheard_of=1),
    "plan": lambda r: (r["config"]["bits"].update(label="mixed"), r["bits"].update(mixed=[1])),
    "layers in float": lambda r: r["bits"].update(unreached_layers=7),
    "steps": lambda r: r["config"]["protocol"].update(steps=-1),
}


@pytest.mark.parametrize("case", SAYS)
def test_whatever_a_record_says_is_refused_in_a_line_or_exported_inside(ditbench, smoothed, tmp_path, case):
    say(smoothed, SAYS[case])
    before = listing(tmp_path)
    done = ditbench("export", str(smoothed), "--out", str(tmp_path / "out"))
    assert "Traceback" not in done.err
    if done.code == 0:
        read_recipe(tmp_path / "out")
    else:
        assert done.code == 2 and len(done.error_lines) <= 2
    assert {name.split("/")[0] for name in listing(tmp_path) - before} <= {"out"}


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_what_is_written_has_the_mode_that_the_umask_gives(ditbench, run, tmp_path, mask):
    before = os.umask(mask)
    try:
        assert run("method=smoothquant", "bits=w4a8", "name=smooth").code == 0
        folder = next(tmp_path.glob("runs/smooth/*/record.json")).parent
        assert ditbench("export", str(folder), "--out", str(tmp_path / "out")).code == 0
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in written} >= {STATE, RECIPE, TENSORS, "record.json"}
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in written}
    assert set(modes.values()) == {oct(0o666 & ~mask)}, modes


def test_a_hashed_file_notices_each_flipped_bit_and_older_ones_are_read(tmp_path):
    path, tensors = tmp_path / "a.safetensors", {"x": torch.arange(4.0), "y": torch.tensor([True, False])}
    save_hashed(tensors | {"z": tensors["x"]}, path)
    assert {name: value.tolist() for name, value in load_hashed(path).items()} == {
        "x": [0, 1, 2, 3], "y": [True, False], "z": [0, 1, 2, 3]
    }  # fmt: skip
    whole = path.read_bytes()
    unseen = []
    for place in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                again = load_hashed(path)
            except Damaged as damage:
                assert str(path) in str(damage)
            else:
                assert {name: value.tolist() for name, value in again.items()} == {
                    "x": [0, 1, 2, 3], "y": [True, False], "z": [0, 1, 2, 3]
                }, (place, bit)  # fmt: skip
                unseen.append(place)
    assert not unseen, [whole[place - 8 : place + 8] for place in unseen]
    save_file(tensors, path)
    assert load_hashed(path).keys() == load_file(path).keys()
