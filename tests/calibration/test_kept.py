"""Recordings, statistics and sensitivities are artifacts: found again, checked, and keyed by the sources that make them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ditbench.harness.calibration import channel_statistics, recording
from ditbench.harness.calibration.channel_statistics import channel_stats
from ditbench.harness.calibration.recording import Calibration, calibrate, key_of, selected
from ditbench.harness.common import code_identity as code
from ditbench.harness.common.artifacts import read_manifest
from ditbench.harness.common.paths import HARNESS
from ditbench.harness.models.base import Sampler

SAMPLER = Sampler("ddim", steps=2, guidance=1.5)


def flip_a_float(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def all_rows(calibration: Calibration) -> list[torch.Tensor]:
    return [call[name] for _, call in calibration.batches() for name in call]


@pytest.fixture
def cached(small_model, tmp_path):
    return lambda: calibrate(small_model, SAMPLER, n=3, seed=0, batch_size=2, cache=tmp_path)


def test_a_recording_is_found_again_and_its_seconds_are_told(cached, small_model, tmp_path):
    first, second = cached(), cached()
    assert first.saved_s == {"calibration": 0.0} and second.saved_s["calibration"] > 0
    uncached = calibrate(small_model, SAMPLER, n=3, seed=0, batch_size=2)
    assert uncached.key == first.key and uncached.cache is None
    for one, other in ((first, second), (first, uncached)):
        assert all(torch.equal(a, b) for a, b in zip(all_rows(one), all_rows(other), strict=True))


def test_a_flipped_float_in_a_recording_is_named_and_it_is_made_again(cached, tmp_path, capfd):
    before = all_rows(cached())
    file = next((tmp_path / "recording").glob("*/0.safetensors"))
    flip_a_float(file)
    again = cached()
    said = capfd.readouterr().err
    assert f"{file}: does not have the SHA-256" in said and "the recording of small-random-dit is made again" in said
    assert again.saved_s["calibration"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, all_rows(again), strict=True))


def test_a_recording_with_nan_is_not_kept(cached, own_model, tmp_path):
    own_model.transformer.proj_out_2.bias.data[:] = torch.nan
    with pytest.raises(Exception, match="NaN in the float model's own samples"):
        calibrate(own_model, SAMPLER, n=2, seed=0, cache=tmp_path)
    assert list((tmp_path / "recording").iterdir()) == []


def test_statistics_are_made_once_and_say_what_recording_they_are_of(cached, small_target, tmp_path, monkeypatch):
    calibration = cached()
    made = channel_stats(small_target, calibration)
    (folder,) = (tmp_path / "statistics").iterdir()
    assert read_manifest(folder / "manifest.json")["made_from"] == {"recording": calibration.key}
    monkeypatch.setattr(channel_statistics, "_observe", None)
    again = cached()
    found = channel_stats(small_target, again)
    assert all(torch.equal(made[name].sumsq_SC, found[name].sumsq_SC) for name in made)
    assert sum(seconds for what, seconds in again.saved_s.items() if what.startswith("statistics")) > 0


def test_what_a_run_made_itself_saves_it_nothing_when_it_finds_it_again(cached, small_target):
    calibration = cached()
    for _ in range(2):
        channel_stats(small_target, calibration)
    assert sum(calibration.saved_s.values()) == 0


def test_a_flipped_float_in_statistics_is_named_and_they_are_made_again(cached, small_target, tmp_path, capfd):
    made = channel_stats(small_target, cached())
    file = next((tmp_path / "statistics").glob("*/statistics.safetensors"))
    flip_a_float(file)
    found = channel_stats(small_target, cached())
    assert str(file) in capfd.readouterr().err
    assert all(torch.equal(made[name].count_S, found[name].count_S) for name in made)


def test_statistics_of_selected_rows_are_their_own(cached, small_target, tmp_path):
    calibration = cached()
    whole = channel_stats(small_target, calibration)
    half = selected(calibration, [torch.tensor([0, 1])] * 2, "two rows")
    some = channel_stats(small_target, half)
    name = small_target.layers[0]
    assert some[name].count_S.sum() < whole[name].count_S.sum()
    assert {
        read_manifest(f / "manifest.json")["made_from"]["recording"] for f in (tmp_path / "statistics").iterdir()
    } == {calibration.key}


@pytest.fixture
def edit(tmp_path, monkeypatch):
    """edit("eval/fid.py"): in a copy of the sources, which is what is looked at from now on."""
    root = tmp_path / "sources"
    for folder in ("harness", "eval"):
        shutil.copytree(HARNESS.parent / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code, "HARNESS", root / "harness")
    code.code_identity.cache_clear()

    def edit(place: str) -> None:
        file = root / place
        file.write_text(file.read_text() + "\n# edited\n")
        code.code_identity.cache_clear()

    yield edit
    code.code_identity.cache_clear()


def test_a_recording_is_made_again_for_what_makes_it_and_for_nothing_else(small_model, edit):
    def key() -> str:
        return key_of(small_model, SAMPLER, 3, 0)

    before = key()
    for place in (
        "eval/fidelity.py",
        "harness/report/table.py",
        "harness/fitting/rounding.py",
        "harness/stages/evaluate.py",
    ):
        edit(place)
        assert key() == before, place
    for place in ("harness/models/families/dit.py", "harness/calibration/recorder.py", "harness/common/devices.py"):
        edit(place)
        assert key() != before, place
        before = key()


def test_every_room_that_artifacts_depend_on_is_part_of_the_whole(edit):
    for rooms in (code.RECORDING, code.STATISTICS, code.STATE, code.SAMPLES, code.VALUES, code.LAYER_ERRORS):
        assert all(room in code.COMPUTING or room.split("/")[0] in code.COMPUTING for room in rooms)
    before = code.code_identity()
    edit("eval/fidelity.py")
    assert code.code_identity() != before


def test_libraries_of_metrics_count_for_metrics_alone():
    assert "torchmetrics" in code.code_identity(*code.VALUES)["packages"]
    assert code.code_identity(*code.RECORDING)["packages"].keys() == {
        "torch",
        "diffusers",
        "transformers",
        "numpy",
        "scipy",
    }


@pytest.mark.parametrize("change", [{"size": {"height": 16, "width": 24}}, {"dtype": "bfloat16"}])
def test_another_size_or_dtype_of_the_same_weights_is_another_recording(small_model, change):
    other = replace(small_model, spec=replace(small_model.spec, **change))
    assert recording.key_of(other, SAMPLER, 3, 0) != recording.key_of(small_model, SAMPLER, 3, 0)
