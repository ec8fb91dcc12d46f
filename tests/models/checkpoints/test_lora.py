"""LoRA: loaded and fused before anything is calibrated, or refused in a line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_cases import LAYER, load, refused, weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditbench.harness.common.errors import UserError
from ditbench.harness.models.lora import loras


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
    assert plain.fingerprint != fused.fingerprint and fused.parts.keys() - plain.parts.keys() == {"lora.0"}


def test_a_lora_of_another_model_is_refused(folders, adapter, tmp_path):
    save_adapter(load(folders["ltx"], "ltx").pipe, tmp_path, ["to_q"])
    said = refused(folders["flux"], lora=str(tmp_path))
    assert f"model.lora={tmp_path}: layers that the FluxPipeline does not have" in said


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
