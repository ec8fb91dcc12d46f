"""Checkpoints in the forms in which people have them: what each loads, or the line that says why not. Nothing needs a network."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_pipelines import SMALL
from torch import Tensor

from ditbench.harness.common.errors import UserError
from ditbench.harness.models.base import LoadedModel, ModelSpec
from ditbench.harness.models.loading import load_model
from ditbench.harness.models.lora import loras

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture(autouse=True)
def tried(monkeypatch) -> list[str]:
    """Addresses that somebody tried to reach."""
    found: list[str] = []

    def refuse(*arguments: object, **more: object) -> None:
        found.append(str(arguments))
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Small pipelines as diffusers saves them. Not to be changed: copy them first."""
    root = tmp_path_factory.mktemp("folders")
    for name in ("flux", "pixart", "ltx"):
        torch.manual_seed(0)
        pipe = SMALL[name]()
        pipe.save_pretrained(root / name)
        pipe.save_pretrained(root / f"{name}-fp16", variant="fp16")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def own_flux(folders, tmp_path) -> Path:
    return Path(shutil.copytree(folders["flux"], tmp_path / "flux"))


@pytest.fixture(scope="module")
def another(folders, tmp_path_factory) -> Path:
    """A transformer's folder: flux with other weights."""
    folder = Path(shutil.copytree(folders["flux"] / "transformer", tmp_path_factory.mktemp("another") / "transformer"))
    weights = load_file(folder / WEIGHTS)
    save_file({name: tensor * 2 for name, tensor in weights.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def spec(source: Path | str, family: str = "flux", **more) -> ModelSpec:
    return ModelSpec("mine", family, source=str(source), **more)


def load(source: Path | str, family: str = "flux", **more) -> LoadedModel:
    return load_model(spec(source, family, **more))


def refused(source: Path | str, family: str = "flux", **more) -> str:
    """The one line that is said."""
    with pytest.raises(UserError) as error:
        load(source, family, **more)
    said = str(error.value)
    assert said.startswith("model mine") and "\n" not in said
    return said


def weights(model: LoadedModel) -> dict[str, Tensor]:
    return model.transformer.state_dict()


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


# single files


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


# LoRA


def save_adapter(pipe, folder: Path, layers: list[str], alpha: int = 8, text: bool = False) -> dict[str, Tensor]:
    """An adapter of rank 4 as diffusers saves it → what it adds to each layer's weight, by hand."""
    peft = pytest.importorskip("peft")
    pipe.transformer.add_adapter(peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=layers), adapter_name="x")
    generator, added = torch.Generator().manual_seed(1), {}
    for name, module in pipe.transformer.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            down, up = module.lora_A["x"].weight, module.lora_B["x"].weight
            down.data, up.data = (torch.randn(each.shape, generator=generator) / 4 for each in (down, up))
            added[name] = (up.data @ down.data) * alpha / 4
    tensors = peft.get_peft_model_state_dict(pipe.transformer, adapter_name="x")
    more = {} if text else {"transformer_lora_adapter_metadata": pipe.transformer.peft_config["x"].to_dict()}
    more |= {"text_encoder_lora_layers": text_adapter(pipe.text_encoder)} if text else {}
    pipe.save_lora_weights(
        folder,
        transformer_lora_layers=tensors,
        **more,
    )
    return added


def text_adapter(text_encoder) -> dict[str, Tensor]:
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, text_encoder, adapter_name="x")
    names = (name for name, _ in text_encoder.named_parameters() if "lora_" in name)
    return {name.replace(".x.", "."): text_encoder.get_parameter(name).data for name in names}


@pytest.fixture(scope="module")
def adapter(folders, tmp_path_factory):
    """(its folder, what it adds): of flux, on some layers of both kinds of block."""
    folder = tmp_path_factory.mktemp("lora")
    return folder, save_adapter(load(folders["flux"]).pipe, folder, ["to_q", "to_add_out", "proj_mlp", "ff.net.2"])


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_lora_is_fused_into_the_weights(scale, folders, adapter, tried):
    folder, added = adapter
    plain, fused = load(folders["flux"]), load(folders["flux"], lora={"path": str(folder), "scale": scale})
    assert len(added) == 10 and weights(plain).keys() == weights(fused).keys()
    for name, tensor in weights(plain).items():
        expected = tensor + scale * added.get(name.removesuffix(".weight"), torch.zeros(()))
        torch.testing.assert_close(weights(fused)[name], expected, rtol=1e-6, atol=1e-6)
    assert not any("lora" in name for name, _ in fused.transformer.named_modules())
    assert not any(p.requires_grad for p in fused.transformer.parameters()) and not tried


def test_several_loras_add_up(folders, adapter):
    folder, added = adapter
    file = str(folder / "pytorch_lora_weights.safetensors")
    plain = weights(load(folders["flux"]))
    found = weights(load(folders["flux"], lora=[file, {"path": file, "scale": -0.5}]))
    for name, delta in added.items():
        torch.testing.assert_close(found[f"{name}.weight"], plain[f"{name}.weight"] + delta / 2, rtol=1e-5, atol=1e-6)


def test_a_lora_of_the_text_encoder_is_fused_too(folders, tmp_path):
    save_adapter(load(folders["flux"]).pipe, tmp_path, ["to_q"], text=True)
    try:
        plain, fused = (load(folders["flux"], lora=lora).pipe.text_encoder for lora in (None, str(tmp_path)))
    except UserError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))  # transformers wants a newer one than diffusers does
    changed = [n for n, t in plain.state_dict().items() if not torch.equal(t, fused.state_dict()[n])]
    assert [name.rpartition(".layers.")[2] for name in changed] == ["0.self_attn.q_proj.weight"]


def test_a_lora_and_its_scale_are_in_the_fingerprint(folders, adapter):
    folder, _ = adapter
    loras = (None, str(folder), {"path": str(folder), "scale": 0.5})
    assert len({load(folders["flux"], lora=lora).fingerprint for lora in loras}) == 3


def test_a_lora_that_adds_nothing_is_another_model_all_the_same(folders, adapter):
    """Its file is part of what was asked for."""
    folder, _ = adapter
    plain, fused = load(folders["flux"]), load(folders["flux"], lora={"path": str(folder), "scale": 0.0})
    assert plain.fingerprint != fused.fingerprint and list(fused.parts) == ["lora.0"]


def test_a_lora_of_another_model_is_refused(folders, adapter, tmp_path):
    save_adapter(load(folders["ltx"], "ltx").pipe, tmp_path, ["to_q"])
    assert f"model.lora={tmp_path} cannot be loaded into a FluxPipeline" in refused(folders["flux"], lora=str(tmp_path))


def test_a_lora_of_which_some_layers_do_not_fit_is_refused_with_one_of_them(folders, adapter, tmp_path):
    tensors = load_file(adapter[0] / "pytorch_lora_weights.safetensors")
    for side in "AB":
        tensors[f"transformer.transformer_blocks.7.attn.to_q.lora_{side}.weight"] = tensors[
            f"transformer.{LAYER}.lora_{side}.weight"
        ].clone()
    save_file(tensors, tmp_path / "x.safetensors")
    said = refused(folders["flux"], lora=str(tmp_path))
    assert "does not have (transformer.transformer_blocks.7.attn.to_q, 1 of 11)" in said


def test_a_pipeline_that_takes_no_lora_says_so(folders, adapter):
    assert "loads no LoRA into a PixArtAlphaPipeline" in refused(folders["pixart"], "pixart", lora=str(adapter[0]))


def test_a_folder_of_several_loras_asks_which(folders, adapter, tmp_path):
    for name in ("one", "two"):
        shutil.copy(adapter[0] / "pytorch_lora_weights.safetensors", tmp_path / f"{name}.safetensors")
    assert "it has one.safetensors, two.safetensors; set weight_name" in refused(folders["flux"], lora=str(tmp_path))
    load(folders["flux"], lora={"path": str(tmp_path), "weight_name": "two.safetensors"})


def test_without_peft_a_lora_says_what_to_install(folders, adapter, monkeypatch):
    monkeypatch.setattr("ditbench.harness.models.lora.importlib.util.find_spec", lambda name: None)
    assert "pip install 'ditbench[lora]'" in refused(folders["flux"], lora=str(adapter[0]))


@pytest.mark.parametrize(
    "value, words",
    [
        (3, "expected a path or"),
        ([{"scale": 1.0}], "expected a path or"),
        ({"path": "x", "scale": "much"}, "model.lora.scale must be a number"),
        ({"path": "x", "strength": 1.0}, "no setting of model.lora 'strength'"),
    ],
)
def test_what_is_no_lora_is_refused_before_anything_is_loaded(value, words):
    with pytest.raises(UserError, match=words):
        loras(value)


def test_a_transformer_with_adapters_beside_its_layers_is_never_quantized_by_half(folders, adapter):
    model = load(folders["flux"])
    model.pipe.load_lora_weights(str(adapter[0]))
    with pytest.raises(UserError, match="carries LoRA adapters, .* fuse and unload them first"):
        model.target()
    model.pipe.fuse_lora(components=["transformer"])
    with pytest.raises(UserError, match="carries LoRA adapters"):
        model.target()
    model.pipe.unload_lora_weights()
    assert model.target().layers == load(folders["flux"]).target().layers
