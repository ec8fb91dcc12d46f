"""A model's fingerprint is known from its files without loading it, and changes with all that is loaded and with nothing else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from checkpoint_cases import WEIGHTS, load, spec

from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.conformance import SMALL_DIT
from ditbench.harness.models.base import ModelSpec
from ditbench.harness.models.families import dit
from ditbench.harness.models.loading import fingerprint_without_loading, load_model


def of(folder: Path, **more) -> str:
    return fingerprint_without_loading(spec(folder, **more))


def edit(path: Path) -> None:
    """Another value in a configuration, another byte elsewhere; the size stays, or nearly so."""
    if path.suffix == ".json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"edited": 1}))
    else:
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 64]))


def loaded_files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_every_file_that_diffusers_saves_of_a_pipeline_is_in_the_fingerprint(folders, own_flux):
    names = loaded_files_of(own_flux)
    kinds = {"model_index.json", "scheduler", "tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"}
    assert {name.split("/")[0] for name in names} == kinds | {"transformer", "vae"}
    found = {"": of(own_flux)}
    for name in names:
        edit(own_flux / name)
        found[name] = of(own_flux)
        shutil.copyfile(folders["flux"] / name, own_flux / name)
    assert len(set(found.values())) == len(found) and of(own_flux) == found[""]


def test_what_is_not_loaded_is_not_in_the_fingerprint(folders, own_flux, tmp_path):
    before = of(own_flux)
    for name in ("README.md", "LICENSE.txt", ".gitattributes", "vae/README.md", "vae/.hidden.json", "vae/LICENSE.txt"):
        (own_flux / name).write_text("words")
    (own_flux / ".git").mkdir()
    (own_flux / ".git" / "config.json").write_text("{}")
    (own_flux / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant")
    (own_flux / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle beside it")
    (own_flux / "assets").mkdir()
    (own_flux / "assets" / "config.json").write_text("{}")
    for path in own_flux.rglob("*"):
        os.utime(path, (1, 1))
    assert of(own_flux) == before
    assert of(own_flux.rename(tmp_path / "elsewhere")) == before


def test_where_a_part_was_loaded_from_before_it_was_saved_is_not_in_the_fingerprint(own_flux):
    before = of(own_flux)
    config = own_flux / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_name_or_path": "/somewhere/else"}, indent=7))
    assert of(own_flux) == before


@pytest.mark.parametrize(
    "setting",
    [
        {"size": {"height": 32, "width": 32}},
        {"size": {"height": 32, "width": 48}},
        {"dtype": "bfloat16"},
        {"stress": {"channels": 2, "log2_factor": 3, "seed": 0}},
        {"stress": {"channels": 2, "log2_factor": 3, "seed": 1}},
        {"fuse_qkv": True},
    ],
    ids=str,
)
def test_settings_that_change_what_a_model_computes_are_in_the_fingerprint(folders, setting):
    assert of(folders["flux"], **setting) != of(folders["flux"])


def test_what_a_model_is_called_is_not_in_the_fingerprint(folders):
    one, other = (
        ModelSpec(name, "flux", source=str(folders["flux"]), note=name, revision=revision)
        for name, revision in (("one", None), ("other", "main"))
    )
    assert fingerprint_without_loading(one) == fingerprint_without_loading(other)


def test_the_fingerprint_without_loading_is_that_of_the_loaded_model(folders, another, tmp_path):
    whole = {"size": {"height": 32, "width": 32}, "stress": {"channels": 2, "log2_factor": 3, "seed": 0}}
    file = shutil.copyfile(another / WEIGHTS, tmp_path / "x.safetensors")
    cases = [
        (folders["flux"], whole),
        (folders["flux-fp16"], {"variant": "fp16"}),
        (folders["flux"], {"transformer": str(another)}),
        (folders["flux"], {"transformer": str(file)}),
    ]
    assert [of(folder, **more) for folder, more in cases] == [load(*case, **more).fingerprint for *case, more in cases]
    assert len({of(folder, **more) for folder, more in cases}) == 4


def test_a_hub_id_that_is_not_here_has_no_fingerprint_yet(tried):
    with pytest.raises(UserError, match="someone/nothing is not on this machine"):
        of("someone/nothing")
    assert not tried


def test_random_weights_are_known_by_what_they_are_drawn_from_and_are_not_drawn(monkeypatch):
    drawn = load_model(ModelSpec("r", "dit", random=SMALL_DIT)).fingerprint
    monkeypatch.setattr(dit, "random_pipeline", None)
    specs = [ModelSpec("other name", "dit", random=SMALL_DIT), ModelSpec("r", "dit", random=SMALL_DIT, seed=1)]
    specs += [ModelSpec("r", "dit", random=SMALL_DIT | {"num_layers": 3})]
    specs += [ModelSpec("r", "dit", random=SMALL_DIT, dtype="bfloat16")]
    same, *others = (fingerprint_without_loading(each) for each in specs)
    assert same == drawn and len({drawn, *others}) == 4


def test_another_version_of_what_draws_random_weights_makes_other_weights(monkeypatch):
    before = fingerprint_without_loading(ModelSpec("r", "dit", random=SMALL_DIT))
    monkeypatch.setattr("ditbench.harness.models.identity.package_version", lambda name: "0")
    assert fingerprint_without_loading(ModelSpec("r", "dit", random=SMALL_DIT)) != before
