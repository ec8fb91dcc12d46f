"""What is no export, is damaged, or belongs to something else is refused in one plain line."""

from __future__ import annotations

import json
import shutil

import pytest
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file, save_file

from ditbench.harness.build.export import RECIPE, TENSORS, load_quantized
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import file_sha256
from ditbench.harness.fitting.conformance import DYNAMIC, SMALL_DIT
from ditbench.harness.models.base import ModelSpec
from ditbench.harness.models.loading import load_model


@pytest.fixture
def folder(written, tmp_path):
    """An export of one's own."""
    return shutil.copytree(written("smoothquant", DYNAMIC).folder, tmp_path / "export")


@pytest.fixture
def refused(folder, own_model):
    """refused(words): loading it into a fresh model, or the given one, is a UserError of one line with these words."""

    def check(words: str, model=None) -> None:
        with pytest.raises(UserError, match=words) as error:
            load_quantized(folder, model or own_model.transformer)
        assert "\n" not in str(error.value)

    return check


def rewrite(folder, change) -> None:
    described = json.loads((folder / RECIPE).read_text())
    change(described)
    (folder / RECIPE).write_text(json.dumps(described))


def repack(folder, change) -> None:
    """Change the tensors and say so: the file is whole, its content is not."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
    path = folder / TENSORS
    rewrite(folder, lambda d: d["tensors"].update(file_bytes=path.stat().st_size, sha256=file_sha256(path)))


def test_a_truncated_file(folder, refused):
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[:-100])
    refused(rf"{TENSORS}: {len(data) - 100} bytes, expected {len(data)}; truncated\?")


def test_a_corrupt_file(folder, refused):
    data = bytearray((folder / TENSORS).read_bytes())
    data[-7] ^= 1
    (folder / TENSORS).write_bytes(data)
    refused("corrupt, its SHA-256 is not the one in recipe.json")


def test_no_tensors(folder, refused):
    (folder / TENSORS).unlink()
    refused(f"{TENSORS} cannot be read")


def test_a_folder_that_is_none(folder, refused):
    (folder / RECIPE).unlink()
    refused("is no export: recipe.json cannot be read")


@pytest.mark.parametrize("text", ["{", '{"format": "other"}', "[]", "\udcff"])
def test_a_recipe_that_is_none(folder, refused, text):
    (folder / RECIPE).write_bytes(text.encode(errors="surrogateescape"))
    refused("recipe.json: not (readable JSON|a ditbench export)")


def test_another_version(folder, refused):
    rewrite(folder, lambda d: d.update(version=2))
    refused("format version 2, this ditbench reads 1")


def test_a_recipe_with_a_part_missing(folder, refused):
    rewrite(folder, lambda d: d.pop("layers"))
    refused("recipe.json: layers missing")


@pytest.mark.parametrize("part", ["scale_OG", "codes_OC", "bias/rows", "pos_embed.proj.weight"])
def test_missing_tensors(folder, refused, part):
    repack(folder, lambda tensors: tensors.pop(next(name for name in tensors if name.endswith(part))))
    refused("does not fit its tensors")


def test_a_class_that_files_cannot_make(folder, refused):
    def change(described):
        next(iter(described["layers"].values()))["recipe"]["type"] = "Popen"

    rewrite(folder, change)
    refused("does not fit its tensors .*Popen")


def test_another_size_of_the_same_model(refused):
    wider = load_model(ModelSpec("wider", "dit", random=SMALL_DIT | {"num_layers": 3}))
    refused("an export of another DiTTransformer2DModel: num_layers is 2 there and 3 here", wider.transformer)


def test_another_model(refused):
    other = PixArtTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, num_layers=1, cross_attention_dim=8, sample_size=8,
        caption_channels=8, norm_num_groups=4,
    )  # fmt: skip
    refused("an export of a DiTTransformer2DModel, this pipeline has a PixArtTransformer2DModel", other)


def test_a_model_that_is_quantized_already(folder, refused, own_model):
    refused("is quantized already", load_quantized(folder, own_model.transformer))
