"""What is no export, is damaged, is written wrong, or belongs to something else is refused in one plain line."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file, save_file

from ditbench.harness.build.export import RECIPE, TENSORS, load_quantized, read_recipe
from ditbench.harness.common.artifacts import write_manifest
from ditbench.harness.common.errors import UserError
from ditbench.harness.common.files import file_sha256
from ditbench.harness.fitting.conformance import DYNAMIC, SMALL_DIT, STATIC
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
        assert "\n" not in str(error.value) and len(str(error.value)) < 700

    return check


def rewrite(folder, change) -> None:
    """Change the recipe and hash it again: the file is whole, what it says is wrong."""
    described = json.loads((folder / RECIPE).read_text())
    described.pop("sha256")
    change(described)
    write_manifest(folder / RECIPE, described)


def edit(folder, change) -> None:
    """Change the recipe as an editor would."""
    described = json.loads((folder / RECIPE).read_text())
    change(described)
    (folder / RECIPE).write_text(json.dumps(described))


def first_layer(described) -> dict:
    return next(iter(described["layers"].values()))


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
    rewrite(folder, lambda d: d.update(version=3))
    refused("format version 3, this ditbench reads 1 and 2")


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


def fewer_bits(described) -> None:
    first_layer(described)["recipe"]["act"]["spec"]["bits"] = 4


@pytest.mark.parametrize("change", [fewer_bits, lambda d: d.update(ditbench="0"), lambda d: d.pop("sha256")])
def test_an_edited_recipe_is_named(folder, refused, change):
    """Activations of 4 bits instead of 8 fit every tensor: only the hash tells."""
    edit(folder, change)
    refused("recipe.json: damaged or edited, it does not have the SHA-256 that it was written with")


def test_an_edited_recipe_cannot_pass_for_an_older_one(folder, refused):
    edit(folder, lambda d: d.update(version=1))
    refused("recipe.json: unknown field '(schedule|sha256)'")


def in_weight(name, value):
    return lambda d: first_layer(d)["recipe"]["weight"].update({name: value})


def in_spec(name, value):
    return lambda d: first_layer(d)["recipe"]["weight"]["spec"].update({name: value})


def in_codes(name, value):
    return lambda d: first_layer(d)["recipe"]["weight"]["codes_OC"].update({name: value})


WRONG = {
    "bits of the format": (in_spec("bits", 8), "codes of this weight have 8 bits from -127; these are said to have 4 bits from -7"),
    "bits of the codes": (in_codes("bits", 8), r"48 codes of 8 bits are uint8 \(O, 48\), got torch.uint8 \(48, 24\)"),
    "no bits": (in_codes("bits", 0), "no codes of 0 bits"),
    "bits of no width": (in_spec("bits", 9), "a quantized side has 2 to 8 bits, got 9"),
    "bits in words": (in_spec("bits", "4"), "weight/spec/bits: expected int, got '4'"),
    "bits true": (in_spec("bits", True), "weight/spec/bits: expected int, got True"),
    "granularity": (in_spec("granularity", "per_row"), "granularity 'per_row' is none of"),
    "groups": (lambda d: first_layer(d)["recipe"]["weight"]["spec"].update(granularity="per_group", group_size=-1),
               "group_size: expected a divisor of 48, got -1"),
    "groups of 16": (lambda d: first_layer(d)["recipe"]["weight"]["spec"].update(granularity="per_group", group_size=16),
                     r"scale_OG: expected shape \(48, 3\), got \(48, 1\)"),
    "a dynamic weight": (in_spec("dynamic", True), "spec/dynamic: expected false"),
    "width": (in_codes("width", 47), r"codes_OC: expected shape \(48, 48\), got \(48, 47\)"),
    "the least code": (in_codes("least", 5), "no codes of 4 bits from 5"),
    "the lowest code": (in_codes("least", -9), "4 bits from -7; these are said to have 4 bits from -9"),
    "sign": (in_codes("unsigned", True), "expected codes of 4 bits in torch.int8, got torch.uint8"),
    "an unknown field": (in_weight("zeros", 1), "recipe/weight: unknown field 'zeros'; known: codes_OC"),
    "a scale that is none": (in_weight("scale_OG", None), "scale_OG: expected Tensor, got None"),
    "a scale in JSON": (in_weight("scale_OG", [1.0]), "scale_OG: expected Tensor, got a tuple"),
    "a scale of another": (in_weight("scale_OG", {"tensor": "float/pos_embed.proj.weight"}), "scale_OG: expected shape"),
    "a tensor without a name": (in_weight("scale_OG", {"tensor": 7}), "tensor: expected str, got 7"),
    "a zero point": (lambda d: first_layer(d)["recipe"]["weight"].update(
        zero_point_OG=first_layer(d)["recipe"]["weight"]["scale_OG"]), "zero_point_OG: expected null of a symmetric weight"),
    "a class in another's place": (in_weight("type", "LowRank"), "weight: unknown field"),
    "a list for a class": (in_weight("type", ["LowRank"]), "no class"),
    "clip": (lambda d: first_layer(d)["recipe"]["act"].update(clip=-1), "clip is in"),
    "shape": (lambda d: first_layer(d).update(shape=[48, 24]), r"shape: expected the model's \[48, 48\], got \[48, 24\]"),
    "no shape": (lambda d: first_layer(d).update(shape=[]), r"shape: expected the model's"),
    "shape in words": (lambda d: first_layer(d).update(shape="48"), "shape: expected list.int., got '48'"),
    "no steps": (lambda d: d.update(num_steps=-1), "num_steps: expected at least 1, or null, got -1"),
    "steps in words": (lambda d: d.update(num_steps="4"), r"num_steps: expected int \| None, got '4'"),
    "starts": (lambda d: d.update(starts=[0, 0]), "starts: expected the first step of each range"),
    "no starts": (lambda d: d.update(starts=[]), "starts: expected the first step of each range"),
    "dtype": (lambda d: d.update(dtype="Tensor"), "dtype: expected one of float64"),
    "dtype of another kind": (lambda d: d.update(dtype=16), "dtype: expected str, got 16"),
    "layers": (lambda d: d.update(layers=[]), r"layers: expected dict\[str, dict\], got a list"),
    "a layer": (lambda d: d["layers"].update(x={}), "layers/x: shape, weight_OC, bias, recipe missing"),
    "a layer of no model": (lambda d: d["layers"].update(x=first_layer(d)), "layers/x: the model has no module 'x'"),
    "a layer that is a block": (lambda d: d["layers"].update({"transformer_blocks.0": first_layer(d)}),
                                "transformer_blocks.0: expected the name of a linear layer, got BasicTransformerBlock"),
    "variants": (lambda d: d["layers"].update({next(iter(d["layers"])): {"variants": [first_layer(d)], "of_range": [1]}}),
                 "of_range: expected one of 1 variants for each of 1 ranges"),
    "no variant": (lambda d: d["layers"].update({next(iter(d["layers"])): {"variants": [], "of_range": []}}), "of_range"),
    "folds": (lambda d: d.update(folds={"transformer_blocks.0": {}}), "folds/transformer_blocks.0: no class None"),
    "attention": (lambda d: d.update(attention={"pos_embed": first_layer(d)["recipe"]}), "expected an AttentionRecipe"),
    "the class of the model": (lambda d: d["transformer"].update({"class": 7}), "transformer/class: expected str, got 7"),
    "the hash of the tensors": (lambda d: d["tensors"].update(sha256=None), "tensors/sha256: expected str, got None"),
    "an unknown section": (lambda d: d.update(code="x"), "unknown field 'code'"),
    "method": (lambda d: d.update(method=7), "method: expected str, got 7"),
    "a huge rotation": (lambda d: first_layer(d)["recipe"]["transform"].update(
        rotations=[{"type": "Hadamard", "size": 2**40, "signs_C": None, "block_size": None}]), "rotations of 48 channels"),
    "deep": (lambda d: first_layer(d).update(recipe=nested(400)), "RecursionError|unknown field|no class|expected"),
}  # fmt: skip


def nested(depth: int) -> dict:
    found: dict = {}
    for _ in range(depth):
        found = {"recipe": found}
    return found


@pytest.mark.parametrize("case", WRONG)
def test_what_is_written_wrong_says_where_and_what_was_expected(folder, refused, case):
    change, words = WRONG[case]
    rewrite(folder, change)
    refused(words)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"format": NaN}', '{"num_steps": 1e999}', "9" * 5_000]
)
def test_json_that_no_one_can_read_is_one_line(folder, refused, text):
    (folder / RECIPE).write_text(text)
    refused("recipe.json: not (readable JSON|a ditbench export)")


@pytest.mark.parametrize("part", ["scale_OG", "bias/rows", "weight_OC", "codes_OC"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, "shorter", "flat"])
def test_tensors_that_cannot_be(folder, refused, part, value):
    """Packed codes have no NaN."""

    def change(tensors):
        name = next(name for name in tensors if name.endswith(part) and not name.startswith("float/"))
        if isinstance(value, str):
            tensors[name] = tensors[name][:-1].clone() if value == "shorter" else tensors[name].flatten()[None, None]
        elif tensors[name].is_floating_point():
            tensors[name].view(-1)[0] = value
        else:
            tensors[name] = torch.full(tensors[name].shape, value)

    repack(folder, change)
    refused(f"does not fit its tensors .*{part.split('/')[0]}")


@pytest.fixture(params=["htg", "lrq_dit", "svdquant", "quarot"])
def kinds(request, written, tmp_path):
    """An export of every kind of part: tables by step, look-up levels, low-rank branches, rotations."""
    bits, params = (STATIC, {"groups": 2}) if request.param == "htg" else (DYNAMIC, {})
    return shutil.copytree(written(request.param, bits, **params).folder, tmp_path / "export")


def test_no_flipped_bit_loads_in_silence(kinds, own_model):
    draw = random.Random(0)
    for name in (RECIPE, TENSORS):
        whole = (kinds / name).read_bytes()
        for place in [0, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(12))]:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << draw.randrange(8)
            (kinds / name).write_bytes(damaged)
            with pytest.raises(UserError, match=name) as error:
                load_quantized(kinds, own_model.transformer)
            assert "\n" not in str(error.value), (name, place)
        (kinds / name).write_bytes(whole)
    load_quantized(kinds, own_model.transformer)


JUNK = (None, True, -1, 10**30, 1.5, "", "x", [], [[]], {}, {"type": "Popen"}, {"tensor": "x"}, [1, "a"])


def test_no_junk_in_any_field_ends_in_a_traceback(kinds, own_model):
    """Each replaced value is refused in one line, or it may stand there: what is only told (method, params, …), a part that may be
    missing, another flag.
    """
    draw, described = random.Random(1), read_recipe(kinds)
    told = {"ditbench", "method", "params", "bits", "size", "model", "notes", "sampler", "run_id", "folded"}
    for _ in range(60):
        mutated, junk = json.loads(json.dumps(described)), draw.choice(JUNK)
        path = replace_one(mutated, junk, draw)
        write_manifest(kinds / RECIPE, mutated)
        try:
            load_quantized(kinds, own_model.transformer)
        except UserError as error:
            assert "\n" not in str(error), path
        else:
            assert mutated == described or path[0] in told or junk is None or junk is True, (path, junk)


def replace_one(described: dict, junk, draw: random.Random) -> list:
    """Walk to a random field and put junk there → its path."""
    here, path = described, []
    while True:
        key = draw.choice(list(here) if isinstance(here, dict) else range(len(here)))
        path.append(key)
        inside = here[key]
        if not isinstance(inside, dict | list) or not inside or draw.random() < 0.15:
            here[key] = junk
            return path
        here = inside
