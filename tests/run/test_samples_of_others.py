"""A row of samples that somebody else drew: which file shows what, what can be said of them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ditbench.harness.common.errors import UserError
from ditbench.harness.records.record import Record
from ditbench.harness.report import compare
from ditbench.harness.report.table import table
from ditbench.harness.run import run
from ditbench.harness.samples.conditions import Conditions
from ditbench.harness.samples.noise import GIVEN, Noise
from ditbench.harness.samples.others import LINES, given
from ditbench.harness.samples.pixels import encoded
from ditbench.harness.samples.samples import Prompt, Samples
from ditbench.harness.samples.store import found_store
from ditbench.harness.stages.config import RunConfig, parse
from ditbench.harness.stages.identity import run_id
from ditbench.harness.stages.loaded import model_of
from ditbench.harness.stages.others_samples import _read
from ditbench.harness.sweep.compose import composed

N = 4


def configuration(results: Path, *more: str) -> RunConfig:
    (raw,) = composed([[
        "model=tiny-dit", f"protocol.n={N}", "protocol.steps=2", "calibration.n=2", "generate.noise_floor_seeds=0",
        "metrics.names=[psnr,accuracy,collapse,torchmetrics/fid_judge]", "measure.samples=1", "measure.repeats=1", "measure.warmup=0",
        "measure.layer_errors=false", "tracker=none", "device=cpu", f"results_dir={results}", *more,
    ]])  # fmt: skip
    return parse(raw)


def theirs(results: Path, folder: Path, *more: str) -> RunConfig:
    return configuration(results, "method=external", f"method.path={folder}", *more)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def ours(results) -> Record:
    return run(configuration(results, "method=rtn", "bits=w8a8"))


@pytest.fixture(scope="module")
def drawn(results, ours) -> tuple[np.ndarray, list[dict]]:
    """Our run's images (N, H, W, 3), and what the store says of each."""
    (folder,) = (results / "cache" / "samples").glob(ours.made_from["samples"])
    store = found_store(folder)
    return torch.stack(list(store.samples().pixels)).numpy(), store.about()


@pytest.fixture
def folder(tmp_path, drawn) -> Path:
    """Our images as files whose names are in another order than the samples, and no word of what they show."""
    place = tmp_path / "theirs"
    place.mkdir()
    for row, image in enumerate(drawn[0]):
        Image.fromarray(image).save(place / f"{N - row}.png")
    return place


def described(folder: Path, drawn, *keys: str) -> None:
    lines = [{"file": f"{N - row}.png"} | {key: line[key] for key in keys} for row, line in enumerate(drawn[1])]
    (folder / LINES).write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))


def test_with_the_run_s_noise_they_have_the_numbers_of_the_run_that_drew_them(results, ours, folder, drawn):
    described(folder, drawn, "label", "seed")
    found = run(theirs(results, folder))
    assert found.status == "ok", found.error
    for name in ("psnr", "accuracy", "collapse", "torchmetrics/fid_judge"):
        assert found.metrics[name]["value"] == ours.metrics[name]["value"], name


def test_without_its_noise_they_are_not_held_against_the_float_model_s_one_by_one(results, ours, folder, drawn):
    described(folder, drawn, "label")
    found = run(theirs(results, folder))
    assert found.metrics["psnr"]["status"] == "skipped" and "noise" in found.metrics["psnr"]["reason"]
    assert found.metrics["accuracy"]["value"] == ours.metrics["accuracy"]["value"]


def test_what_cannot_be_known_of_them_is_not_said(results, folder, drawn):
    described(folder, drawn, "label")
    found = run(theirs(results, folder))
    assert found.bits["label"] == "not known" and found.bits["weight_bits_effective"] is None
    assert not found.efficiency and found.cost["fit_s"] is None


def test_the_table_has_them_among_the_others(results, ours, folder, drawn):
    described(folder, drawn, "label")
    (group,) = compare.groups([run(theirs(results, folder)), ours])
    rows = {row.cells[0].text: [cell.text for cell in row.cells] for row in table(group, ["psnr", "accuracy"]).rows}
    assert rows["external"][1] == "not known" and rows["rtn"][1] == "W8A8"


def test_they_are_the_same_run_wherever_they_lie_and_another_if_a_pixel_or_a_line_changes(results, folder, drawn):
    config = theirs(results, folder)
    model, before = model_of(config.model), run_id(config, model_of(config.model))
    moved = folder.rename(folder.with_name("elsewhere"))
    assert run_id(theirs(results, moved), model) == before
    described(moved, drawn, "label")
    told = run_id(theirs(results, moved), model)
    assert told != before
    Image.fromarray(255 - drawn[0][0]).save(moved / f"{N}.png")
    assert run_id(theirs(results, moved), model) != told


# which file shows what


def made(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return folder


def lines(folder: Path, *each: dict) -> Path:
    (folder / LINES).write_text("".join(json.dumps(line) + "\n" for line in each))
    return folder


PROMPTS = Conditions((10, 11, 12), prompts=(Prompt("a"), Prompt("b"), Prompt("a")))


def test_without_a_word_they_are_in_the_order_of_their_names(tmp_path):
    found = given(made(tmp_path, "c.png", "a/z.png", "b.mp4", "note.txt"), PROMPTS)
    assert [each.file.relative_to(tmp_path).as_posix() for each in found] == ["a/z.png", "b.mp4", "c.png"]
    assert {each.seed for each in found} == {None}


def test_of_two_of_one_prompt_the_one_of_that_noise_is_taken_else_the_first(tmp_path):
    made(tmp_path, "1.png", "2.png", "3.png", "4.png")
    lines(
        tmp_path,
        {"file": "1.png", "prompt": "a"},
        {"file": "2.png", "prompt": "a", "seed": 10},
        {"file": "3.png", "prompt": "b", "seed": 10},
        {"file": "4.png", "prompt": "c"},
    )
    found = given(tmp_path, PROMPTS)
    assert [(each.file.name, each.seed) for each in found] == [("2.png", 10), ("3.png", None), ("1.png", None)]


@pytest.mark.parametrize(
    "content, words",
    [
        ({"file": "1.png", "prompt": "a"}, "no sample is left for sample 1 of the run, 'b'"),
        ({"file": "../1.png", "prompt": "a"}, "line 1: no file '../1.png'"),
        ({"file": "9.png", "prompt": "a"}, "line 1: no file '9.png'"),
        ({"file": "1.png"}, 'line 1: expected {"file"'),
        ({"file": "1.png", "label": True}, 'line 1: expected {"file"'),
        ({"file": "1.png", "prompt": "a", "seed": "0"}, 'line 1: expected {"file"'),
        ({"file": "a\0.png", "prompt": "a"}, "line 1: no file"),
        ([], 'line 1: expected {"file"'),
    ],
)
def test_a_line_that_says_nothing_useful_is_named(tmp_path, content, words):
    made(tmp_path.parent, "1.png")
    with pytest.raises(UserError) as refused:
        given(lines(made(tmp_path, "1.png"), content), PROMPTS)
    assert words in str(refused.value)


def test_bytes_that_are_no_text_are_a_line_that_says_nothing(tmp_path):
    (made(tmp_path, "1.png") / LINES).write_bytes(b"\xff\xfe{" + b"[" * 100_000)
    with pytest.raises(UserError, match="line 1: expected"):
        given(tmp_path, PROMPTS)


def test_a_file_may_be_a_link_to_another_folder_s(tmp_path):
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    for folder in (elsewhere, here):
        folder.mkdir()
    (here / "1.png").symlink_to(made(elsewhere, "1.png") / "1.png")
    (each,) = given(lines(here, {"file": "1.png", "label": 0}), Conditions((0,), torch.tensor([0])))
    assert each.file == here / "1.png"


def test_where_the_noise_is_a_file_s_no_seed_makes_it_known(tmp_path):
    lines(made(tmp_path, "1.png"), {"file": "1.png", "label": 0, "seed": 5})
    for noise, seed in ((Noise(), 5), (Noise(GIVEN), None)):
        (each,) = given(tmp_path, Conditions((5,), torch.tensor([0]), noise=noise))
        assert each.seed == seed


def test_a_file_is_taken_once(tmp_path):
    made(tmp_path, "1.png", "2.png")
    lines(tmp_path, {"file": "1.png", "prompt": "a"}, {"file": "2.png", "prompt": "b"})
    with pytest.raises(UserError, match="no sample is left for sample 2 of the run, 'a'"):
        given(tmp_path, PROMPTS)


def test_another_number_of_files_than_samples_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected 3 images or videos.*came 1; set protocol.n=1"):
        given(made(tmp_path, "1.png"), PROMPTS)


# pixels


def test_a_video_s_frames_are_read_as_they_are(tmp_path, normal):
    frames = (normal(3, 16, 16, 3).sigmoid() * 255).to(torch.uint8)
    (tmp_path / "a.mkv").write_bytes(encoded(frames, 8.0))
    (each,) = given(tmp_path, Conditions((0,), torch.tensor([0])))
    assert torch.equal(_read(each, Samples(frames[None])), frames)


@pytest.mark.parametrize("name", ["a.png", "a.mp4"])
def test_a_file_that_is_none_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"nothing of the kind")
    (each,) = given(tmp_path, Conditions((0,), torch.tensor([0])))
    with pytest.raises(UserError, match=f"{name}: expected"):
        _read(each, Samples(torch.zeros(1, 8, 8, 3, dtype=torch.uint8)))


def test_another_size_is_refused_not_resized(tmp_path):
    Image.new("RGB", (9, 8)).save(tmp_path / "a.png")
    (each,) = given(tmp_path, Conditions((0,), torch.tensor([0])))
    with pytest.raises(UserError, match="expected 8×8 .* came 8×9"):
        _read(each, Samples(torch.zeros(1, 8, 8, 3, dtype=torch.uint8)))
