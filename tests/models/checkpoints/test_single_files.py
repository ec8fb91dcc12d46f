"""Checkpoints in one file, in their authors' names."""

from __future__ import annotations

import pytest
import torch
from checkpoint_cases import WEIGHTS, load, refused, weights
from safetensors.torch import load_file, save_file
from torch import Tensor

IN_THE_TRANSFORMER = {"proj_in": "patchify_proj", "time_embed": "adaln_single", "norm_q": "q_norm", "norm_k": "k_norm"}
IN_THE_VAE = {  # the first that a name has
    "decoder.mid_block": "decoder.up_blocks.0",
    "decoder.up_blocks.0.": "decoder.up_blocks.1.",
    "decoder.up_blocks.1.": "decoder.up_blocks.3.",
    "decoder.up_blocks.2.upsamplers.0.": "decoder.up_blocks.5.",
    "decoder.up_blocks.2.": "decoder.up_blocks.6.",
    "decoder.up_blocks.3.upsamplers.0.": "decoder.up_blocks.8.",
    "decoder.up_blocks.3.": "decoder.up_blocks.9.",
    "encoder.down_blocks.0.downsamplers.0.": "encoder.down_blocks.1.",
    "encoder.down_blocks.1.downsamplers.0.": "encoder.down_blocks.4.",
    "encoder.down_blocks.1.": "encoder.down_blocks.3.",
    "encoder.down_blocks.2.": "encoder.down_blocks.6.",
    "encoder.down_blocks.3.": "encoder.down_blocks.8.",
    "encoder.mid_block": "encoder.down_blocks.9",
    "latents_mean": "per_channel_statistics.mean-of-means",
    "latents_std": "per_channel_statistics.std-of-means",
}


def in_the_authors_names(transformer: dict[str, Tensor], vae: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """LTX-Video's, as its file has them."""
    found = {}
    for name, tensor in transformer.items():
        for ours, theirs in IN_THE_TRANSFORMER.items():
            name = name.replace(ours, theirs)
        found[f"model.diffusion_model.{name}"] = tensor
    for name, tensor in (vae or {}).items():
        ours = next((each for each in IN_THE_VAE if name.startswith(each)), "")
        found[f"vae.{IN_THE_VAE.get(ours, '')}{name.removeprefix(ours)}".replace("resnets", "res_blocks")] = tensor
    return found


@pytest.mark.parametrize("family", ["flux", "pixart", "ltx"])
def test_a_transformer_in_one_file_takes_the_place_of_the_pipelines_own(family, folders, tmp_path, tried):
    """PixArt's class reads no files of others, LTX's is in its authors' names."""
    doubled = {name: 2 * tensor for name, tensor in load_file(folders[family] / "transformer" / WEIGHTS).items()}
    save_file(in_the_authors_names(doubled) if family == "ltx" else doubled, tmp_path / "x.safetensors")
    found = weights(load(folders[family], family, transformer=str(tmp_path / "x.safetensors")))
    assert all(torch.equal(found[name], tensor) for name, tensor in doubled.items()) and not tried


def test_a_pipeline_in_one_file_takes_its_text_encoder_from_its_folder(folders, tmp_path, tried):
    transformer, vae = (
        {name: 2 * tensor for name, tensor in load_file(folders["ltx"] / part / WEIGHTS).items()}
        for part in ("transformer", "vae")
    )
    save_file(in_the_authors_names(transformer, vae), tmp_path / "all.safetensors")
    found = load(tmp_path / "all.safetensors", "ltx", config=str(folders["ltx"]))
    text = load(folders["ltx"], "ltx").pipe.text_encoder.state_dict()
    for part, expected in ((found.transformer, transformer), (found.pipe.vae, vae), (found.pipe.text_encoder, text)):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in part.state_dict().items())
    assert not tried


def test_one_file_without_its_pipeline_says_what_to_set(folders):
    said = refused(folders["flux"] / "transformer" / WEIGHTS)
    assert "set model.config to the folder" in said and "model.transformer" in said


@pytest.mark.parametrize("family", ["flux", "ltx"])
def test_one_file_that_holds_a_transformer_only_says_where_it_belongs(family, folders):
    file = folders[family] / "transformer" / WEIGHTS
    said = refused(file, family, config=str(folders[family]))
    assert f"set model.transformer={file} and model.source={folders[family]}" in said


def test_a_pipeline_that_diffusers_reads_from_no_file_says_what_to_set(folders):
    file = folders["pixart"] / "transformer" / WEIGHTS
    said = refused(file, "pixart", config=str(folders["pixart"]))
    assert "reads no PixArtAlphaPipeline from a single file" in said and f"model.transformer={file}" in said


def test_a_file_of_another_model_is_refused(folders, tried):
    file = folders["ltx"] / "transformer" / WEIGHTS
    refused(folders["flux"], transformer=str(file))
    refused(folders["pixart"], "pixart", transformer=str(file))
    assert not tried


@pytest.mark.parametrize("name", ["x.ckpt", "x.pt", "x.bin"])
def test_pickled_files_are_refused(name, folders, tmp_path):
    (tmp_path / name).touch()
    assert "nothing is unpickled" in refused(folders["flux"], transformer=str(tmp_path / name))


def test_a_configuration_beside_a_folder_is_refused(folders):
    assert "model.config belongs to a model.source that is one .safetensors file" in refused(
        folders["flux"], config=str(folders["flux"])
    )
