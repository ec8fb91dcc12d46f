"""A file that is broken is named; the family is blamed only where it is another one."""

from __future__ import annotations

import json
import shutil

import pytest
from checkpoint_cases import WEIGHTS, edit, refused
from diffusers import FluxTransformer2DModel

FILES = [
    "model_index.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json",
    "scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
]  # fmt: skip
NO_OBJECT = ["{", "", "[]", '"x"', "null", "NaN", "3"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("text", NO_OBJECT)
def test_a_json_file_that_holds_no_object_is_named(file, text, own_flux, printed):
    (own_flux / file).write_text(text)
    said = refused(own_flux)
    assert f"{own_flux / file} cannot be" in said and "family" not in said and not printed


def test_a_json_file_of_other_bytes_is_named(own_flux):
    (own_flux / "transformer" / "config.json").write_bytes(b"\xff\xfe\x00" * 30)
    assert f"{own_flux / 'transformer' / 'config.json'} cannot be read" in refused(own_flux)


@pytest.fixture
def shards(own_flux):
    """The index of a transformer in several files."""
    transformer = FluxTransformer2DModel.from_pretrained(own_flux / "transformer")
    shutil.rmtree(own_flux / "transformer")
    transformer.save_pretrained(own_flux / "transformer", max_shard_size="100KB")
    return next((own_flux / "transformer").glob("*.index.json"))


@pytest.mark.parametrize("text", [*NO_OBJECT, "{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_an_index_of_shards_that_is_broken_is_named(text, shards, own_flux):
    shards.write_text(text)
    assert str(shards) in (said := refused(own_flux)) and "family" not in said


def test_an_index_of_shards_that_points_elsewhere_is_refused(shards, own_flux):
    weight_map = json.loads(shards.read_text())["weight_map"]
    edit(shards, weight_map={name: f"../../{file}" for name, file in weight_map.items()})
    assert "which is no file beside it" in refused(own_flux)


def test_a_shard_that_is_not_there_is_named(shards, own_flux):
    file = sorted(shards.parent.glob("*-00002-*"))[0]
    file.unlink()
    assert file.name in refused(own_flux)


@pytest.mark.parametrize("part", ["tokenizer", "scheduler", "vae", "text_encoder_2", "transformer"])
def test_a_part_that_the_index_names_and_is_not_there_is_named(part, own_flux):
    shutil.rmtree(own_flux / part)
    assert f"names a {part}, and no folder {own_flux / part} is there" in refused(own_flux)


def test_an_index_without_a_class_is_named(own_flux):
    index = json.loads((own_flux / "model_index.json").read_text())
    (own_flux / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "_class_name"}))
    assert f"{own_flux / 'model_index.json'} names no pipeline" in refused(own_flux)


@pytest.mark.parametrize(
    "file, values, part",
    [
        ("tokenizer_2/tokenizer.json", {"model": {"type": "BPE"}}, "tokenizer_2"),
        ("vae/config.json", {"block_out_channels": "x"}, "vae"),
    ],
)
def test_a_part_that_a_library_cannot_read_is_named(file, values, part, own_flux):
    edit(own_flux / file, **values)
    assert f"its {part} cannot be loaded: " in (said := refused(own_flux)) and "family" not in said


def test_weights_of_other_shapes_than_the_configurations_are_named(own_flux):
    edit(own_flux / "transformer" / "config.json", joint_attention_dim=12)
    assert "cannot be loaded" in (said := refused(own_flux)) and "context_embedder" in said and "family" not in said


def test_a_transformers_file_of_another_model_is_named(folders):
    file = folders["sd3"] / "transformer" / WEIGHTS
    said = refused(folders["flux"], transformer=str(file))
    assert f"model.transformer={file} cannot be read as a FluxTransformer2DModel (IndexError" in said
    assert "is it of another model?" in said


def test_only_a_pipeline_of_another_family_is_said_to_be_one(folders):
    said = refused(folders["flux"], "pixart")
    assert "not a checkpoint of family 'pixart': a FluxPipeline" in said and said.endswith("choose the matching model=")
