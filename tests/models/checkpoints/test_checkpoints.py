"""Checkpoints in the forms in which people have them: what each loads, or the line that says why not. Nothing needs a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_cases import LAYER, WEIGHTS, load, refused, spec, weights
from safetensors.torch import load_file, save_file

from ditbench.harness.common.errors import UserError
from ditbench.harness.models.base import ModelSpec
from ditbench.harness.models.loading import load_model

# variants


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_a_folder_with_files_of_a_variant_only_is_loaded_when_asked_for(family, folders, tried):
    plain, half = load(folders[family], family), load(folders[f"{family}-fp16"], family, variant="fp16")
    assert half.fingerprint == plain.fingerprint and not tried


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_a_folder_with_files_of_a_variant_only_says_what_to_ask_for(family, folders):
    assert "files of a variant only; add model.variant=fp16" in refused(folders[f"{family}-fp16"], family)


def test_one_part_with_files_of_a_variant_only_is_enough_to_say_it(own_flux):
    (own_flux / "vae" / WEIGHTS).rename(own_flux / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert f"{own_flux / 'vae'} has files of a variant only" in refused(own_flux)
    assert load(own_flux, variant="fp16").fingerprint == load_model(spec(own_flux, variant="fp16")).fingerprint


def test_a_variant_that_is_not_there_is_refused_with_those_that_are(folders):
    assert "no part of" in (said := refused(folders["flux-fp16"], variant="bf16")) and "those of fp16" in said
    assert "leave it out" in refused(folders["flux"], variant="fp16")


def test_files_of_a_variant_in_several_pieces_are_known(own_flux):
    for path in (own_flux / "transformer").glob("*.safetensors"):
        path.unlink()
    (own_flux / "transformer" / "diffusion_pytorch_model.fp16-00001-of-00002.safetensors").touch()
    assert "add model.variant=fp16" in refused(own_flux)


# the hub's cache stands for the hub


@pytest.fixture
def cached_hub(folders, tmp_path, monkeypatch):
    """cached_hub(folder) → the id under which it lies in the cache of a hub that cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for module in ("huggingface_hub.constants", "diffusers.pipelines.pipeline_utils", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)

    def keep(folder: Path) -> str:
        repository = tmp_path / "hub" / f"models--someone--{folder.name}"
        shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        return f"someone/{folder.name}"

    return keep


def test_a_variant_of_the_hub_is_loaded(cached_hub, folders):
    assert load(cached_hub(folders["flux-fp16"]), variant="fp16").fingerprint == load(folders["flux"]).fingerprint


def test_a_transformer_of_the_hub_takes_the_place_of_the_pipelines_own(cached_hub, folders, another):
    expected = load(folders["flux"], transformer=str(another)).fingerprint
    assert load(folders["flux"], transformer=cached_hub(another)).fingerprint == expected


def test_a_transformer_that_the_hub_does_not_give_is_the_one_that_is_named(cached_hub, folders):
    with pytest.raises(UserError, match="someone/nothing is no folder here") as error:
        load(folders["flux"], transformer="someone/nothing")
    assert "then add model.transformer=./weights/nothing" in str(error.value)


# a transformer beside a pipeline


def test_a_transformers_folder_takes_the_place_of_the_pipelines_own(folders, another, tried):
    plain, changed = load(folders["flux"]), load(folders["flux"], transformer=str(another))
    assert torch.equal(weights(changed)[f"{LAYER}.weight"], 2 * weights(plain)[f"{LAYER}.weight"])
    assert changed.fingerprint != plain.fingerprint and not tried


def test_the_pipelines_own_transformer_need_not_be_there(own_flux, another):
    shutil.rmtree(own_flux / "transformer")
    assert load(own_flux, transformer=str(another)).transformer is not None


def test_a_whole_pipeline_gives_its_transformer(folders, own_flux):
    assert torch.equal(
        weights(load(folders["flux"], transformer=str(own_flux)))[f"{LAYER}.weight"],
        weights(load(folders["flux"]))[f"{LAYER}.weight"],
    )


def test_what_a_transformers_folder_says_besides_its_weights_is_in_the_fingerprint(folders, another, tmp_path):
    folder = Path(shutil.copytree(another, tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"axes_dims_rope": [6, 4, 6]}))
    one, other = (load(folders["flux"], transformer=str(each)).fingerprint for each in (another, folder))
    assert one != other


def test_a_transformer_of_another_class_is_refused_by_name(folders):
    said = refused(folders["flux"], transformer=str(folders["ltx"] / "transformer"))
    assert "is a LTXVideoTransformer3DModel, the pipeline has a FluxTransformer2DModel" in said


def test_a_transformers_folder_given_for_a_pipelines_says_where_it_belongs(another):
    assert f"set model.transformer={another} and model.source to the pipeline" in refused(another)


def test_a_transformers_folder_with_files_of_a_variant_only_says_so(folders):
    transformer = str(folders["flux-fp16"] / "transformer")
    assert "add model.variant=fp16" in refused(folders["flux"], transformer=transformer)
    assert load(folders["flux-fp16"], variant="fp16", transformer=transformer).transformer is not None


def test_a_folder_without_a_model_is_refused(folders, tmp_path):
    assert "is no folder of a diffusers model" in refused(folders["flux"], transformer=str(tmp_path))


# already quantized


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "quanto", "gguf"])
@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_a_checkpoint_that_others_quantized_is_refused_by_their_name(method, part, own_flux):
    path = own_flux / part / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": method, "load_in_4bit": True}}
    path.write_text(json.dumps(config))
    assert f"its {part} is already quantized ({method}); ditbench quantizes float weights" in refused(own_flux)


def test_a_gguf_file_is_refused(folders, tmp_path):
    (tmp_path / "x.gguf").touch()
    assert "quantized weights (gguf)" in refused(folders["flux"], transformer=str(tmp_path / "x.gguf"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_a_file_that_holds_codes_is_refused_by_its_header(dtype, folders, tmp_path):
    tensors = load_file(folders["flux"] / "transformer" / WEIGHTS)
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].to(dtype)
    save_file(tensors, tmp_path / "x.safetensors")
    said = refused(folders["flux"], transformer=str(tmp_path / "x.safetensors"))
    assert f"already quantized ({LAYER}.weight is stored as" in said


# what is not whole


@pytest.mark.parametrize("part, file", [("transformer", WEIGHTS), ("text_encoder", "model.safetensors")])
def test_weights_that_are_not_there_are_not_drawn_at_random(part, file, own_flux):
    tensors = load_file(own_flux / part / file)
    name = next(name for name in tensors if name.endswith("q_proj.weight") or name == f"{LAYER}.weight")
    del tensors[name]
    save_file(tensors, own_flux / part / file, metadata={"format": "pt"})
    assert f"no weights for {name}" in refused(own_flux)


def test_a_file_without_an_ending_costs_no_traceback(own_flux):
    """Diffusers looks at the endings of all files when it is asked for a variant."""
    (own_flux / "vae" / "LICENSE").touch()
    for part in ("vae", "transformer"):
        shutil.copy(own_flux / part / WEIGHTS, own_flux / part / "diffusion_pytorch_model.fp16.safetensors")
    refused(own_flux, variant="fp16")


# what looks like a path


@pytest.mark.parametrize("option", ["source", "transformer", "config", "lora"])
@pytest.mark.parametrize("name", ["./x", "~/x/y", "weights/x", "x.safetensors", "owner/x.safetensors", "a/b/c"])
def test_a_path_that_is_not_there_is_never_asked_of_the_hub(option, name, folders, tmp_path, monkeypatch, tried):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    source = folders["ltx"] / "transformer" / WEIGHTS if option == "config" else folders["flux"]
    values = {"source": str(source), option: name}
    with pytest.raises(UserError, match="no (file|folder) "):
        load_model(ModelSpec("mine", "flux", **values))
    assert not tried


def test_random_weights_take_nothing_that_is_loaded():
    for option in ("variant", "transformer", "lora"):
        with pytest.raises(UserError, match=f"model.{option} needs weights to load"):
            load_model(ModelSpec("mine", "dit", random={}, **{option: "x"}))
