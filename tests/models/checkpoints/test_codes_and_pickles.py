"""What is in a weight file: floats, and nothing that runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_cases import LAYER, WEIGHTS, edit_weights, load, refused
from safetensors.torch import load_file, save_file

WEIGHT = f"{LAYER}.weight"
PARTS = {"transformer": WEIGHTS, "text_encoder": "model.safetensors", "vae": WEIGHTS}
PICKLED = {WEIGHTS: "diffusion_pytorch_model.bin", "model.safetensors": "pytorch_model.bin"}
CODES = [
    torch.int8,
    torch.uint8,
    torch.float8_e4m3fn,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
]


def pickled(folder: Path, part: str, change=lambda tensors: None) -> Path:
    """A part's weights as .bin alone."""
    file = folder / part / PARTS[part]
    tensors = dict(load_file(file))
    change(tensors)
    file.unlink()
    torch.save(tensors, file.with_name(PICKLED[file.name]))
    return file.with_name(PICKLED[file.name])


@pytest.mark.parametrize("dtype", CODES)
def test_weights_that_are_no_floats_are_refused(dtype, own_flux):
    def change(tensors):
        tensors[WEIGHT] = (20 * tensors[WEIGHT]).to(dtype)

    edit_weights(own_flux / "transformer" / WEIGHTS, change)
    assert f"({WEIGHT} is stored as " in (said := refused(own_flux)) and "quantizes float weights" in said


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int32])
def test_weights_that_are_no_floats_are_refused_in_pickles_too(dtype, own_flux):
    def change(tensors):
        tensors[WEIGHT] = (20 * tensors[WEIGHT]).to(dtype)

    file = pickled(own_flux, "transformer", change)
    assert f"{file} is already quantized ({WEIGHT} is stored as " in refused(own_flux)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_any_width_are_weights(dtype, own_flux):
    edit_weights(
        own_flux / "transformer" / WEIGHTS,
        lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}),
    )
    load(own_flux)


def test_tables_of_positions_are_integers_and_no_codes(own_flux):
    edit_weights(
        own_flux / "text_encoder" / PARTS["text_encoder"],
        lambda tensors: tensors.update({"text_model.embeddings.position_ids": torch.arange(16)[None]}),
    )
    load(own_flux)


def test_files_of_another_variant_than_the_one_asked_for_are_not_looked_at(own_flux, folders):
    tensors = load_file(own_flux / "transformer" / WEIGHTS)
    tensors[WEIGHT] = tensors[WEIGHT].to(torch.float8_e4m3fn)
    save_file(tensors, own_flux / "transformer" / "diffusion_pytorch_model.fp8.safetensors")
    (own_flux / "transformer" / "pytorch_model.bin").write_bytes(b"beside safetensors, and not read")
    assert load(own_flux).fingerprint == load(folders["flux"]).fingerprint
    assert "fp8.safetensors is already quantized" in refused(own_flux, variant="fp8")


@pytest.mark.parametrize("part", PARTS)
def test_pickled_tensors_are_read_where_there_is_nothing_else(part, own_flux, folders):
    """Some of the first checkpoints are published only so. Torch's reader of tensors alone runs nothing of them."""
    pickled(own_flux, part)
    plain, found = (load(each).pipe.components[part].state_dict() for each in (folders["flux"], own_flux))
    assert all(torch.equal(tensor, found[name]) for name, tensor in plain.items())


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("part", PARTS)
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(part, own_flux, tmp_path):
    file = pickled(own_flux, part, lambda tensors: tensors.update({"x": Evil(tmp_path / "mark")}))
    assert f"{file} holds something else than tensors" in refused(own_flux)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("kept", [0, 100, -100])
def test_a_damaged_pickle_is_refused_by_its_name(kept, own_flux):
    file = pickled(own_flux, "text_encoder")
    file.write_bytes(file.read_bytes()[:kept])
    assert str(file) in refused(own_flux)


def test_the_hubs_files_are_looked_at_when_they_are_here(own_flux, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for module in ("huggingface_hub.constants", "diffusers.pipelines.pipeline_utils", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    edit_weights(
        own_flux / "transformer" / WEIGHTS,
        lambda tensors: tensors.update({WEIGHT: (20 * tensors[WEIGHT]).to(torch.int8)}),
    )
    repository = tmp_path / "hub" / "models--someone--flux"
    shutil.copytree(own_flux, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert f"({WEIGHT} is stored as I8)" in refused("someone/flux")
