"""A LoRA is fused whole or not at all: both halves of each layer, in that layer's shape, every tensor taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checkpoint_cases import LAYER, load, refused, weights
from safetensors.torch import save_file
from torch import Tensor

pytest.importorskip("peft")

TEXT = "text_encoder.text_model.encoder.layers.{}.self_attn.q_proj"
OTHER = LAYER.replace("blocks.0", "blocks.1")


def pair(layer: str, outs: int = 32, ins: int = 32, rank: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"{layer}.lora_A.weight": torch.randn(rank, ins, generator=generator) / 10,
        f"{layer}.lora_B.weight": torch.randn(outs, rank, generator=generator) / 10,
    }


def of_transformer(layer: str, **shape: int) -> dict[str, Tensor]:
    return pair(f"transformer.{layer}", **shape)


@pytest.fixture
def said(folders, tmp_path) -> Callable[[dict[str, Tensor]], str]:
    """said(tensors) → how a file of them is refused: by its name."""

    def of(tensors: dict[str, Tensor]) -> str:
        save_file(tensors, tmp_path / "x.safetensors")
        line = refused(folders["flux"], lora=str(tmp_path / "x.safetensors"))
        assert f"model.lora={tmp_path / 'x.safetensors'}" in line and "the checkpoint is damaged" not in line
        return line

    return of


@pytest.mark.parametrize("side, other", ["AB", "BA"])
@pytest.mark.parametrize("layer", [f"transformer.{OTHER}", TEXT.format(0)])
def test_a_layer_with_one_half_is_refused(side, other, layer, said):
    """Diffusers leaves the other half as it was in memory."""
    tensors = of_transformer(LAYER) | pair(layer, outs=16 if "text" in layer else 32, ins=16 if "text" in layer else 32)
    del tensors[f"{layer}.lora_{other}.weight"]
    line = said(tensors)
    assert f"has a lora_{side} and no lora_{other}" in line and layer.removeprefix("text_encoder.text_model.") in line


def test_a_tensor_that_no_layer_takes_is_refused(said):
    assert "lora_mid fits no layer" in said(
        of_transformer(LAYER) | {f"transformer.{LAYER}.lora_mid.weight": torch.ones(2, 2)}
    )


def test_a_bias_of_one_layer_is_not_made_up_for_the_others(said):
    tensors = of_transformer(LAYER) | of_transformer(OTHER) | {f"transformer.{LAYER}.lora_B.bias": torch.ones(32)}
    assert f"it lacks transformer.{OTHER}.lora_B.bias, which would be random" in said(tensors)


def test_a_text_encoders_lora_for_layers_that_are_not_there_is_refused(said):
    tensors = pair(TEXT.format(0), 16, 16) | pair(TEXT.format(7), 16, 16)
    assert "layers.7.self_attn.q_proj, 1 of 2" in said(tensors)


def test_a_text_encoders_lora_is_fused_under_the_name_that_clip_had(folders, tmp_path):
    tensors = pair(TEXT.format(0), 16, 16)
    save_file(tensors, tmp_path / "x.safetensors")
    plain, fused = (load(folders["flux"], lora=lora).pipe.text_encoder for lora in (None, str(tmp_path)))
    changed = {
        n: t - plain.state_dict()[n] for n, t in fused.state_dict().items() if not torch.equal(t, plain.state_dict()[n])
    }
    down, up = tensors.values()
    assert len(changed) == 1
    torch.testing.assert_close(next(iter(changed.values())), up @ down, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ins", [7, 64])
@pytest.mark.parametrize("layer", [LAYER, "x_embedder"])
def test_a_lora_of_other_widths_is_refused(ins, layer, said):
    """Diffusers pads the narrow one with zeros, and widens the model for the wide one (control LoRAs)."""
    assert f"lora_A (2, {ins}) and lora_B (32, 2) are for another layer than" in said(of_transformer(layer, ins=ins))


def test_a_lora_with_other_outputs_or_ranks_is_refused_with_both_shapes(said):
    assert "lora_B (7, 2) are for another layer than the pipeline's, which is (32, 32)" in said(
        of_transformer(LAYER, outs=7)
    )
    tensors = of_transformer(LAYER)
    tensors[f"transformer.{LAYER}.lora_A.weight"] = torch.ones(1, 32)
    assert "its lora_A has rank 1, its lora_B 2" in said(tensors)


def test_a_dora_that_diffusers_reads_without_its_scales_is_refused(said):
    assert "is of a DoRA" in said(of_transformer(LAYER) | {f"transformer.{LAYER}.dora_scale": torch.ones(32, 1)})


def test_numbers_that_are_none_are_the_adapters_not_the_checkpoints(said):
    tensors = of_transformer(LAYER)
    tensors[f"transformer.{LAYER}.lora_B.weight"][3] = float("nan")
    assert f"NaN or infinity in transformer.{LAYER}.lora_B.weight; the file is corrupt" in said(tensors)


@pytest.mark.parametrize("kept", [2, -20])
def test_a_damaged_adapter_is_said_to_be_that(kept, folders, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(of_transformer(LAYER), file)
    file.write_bytes(file.read_bytes()[:kept])
    line = refused(folders["flux"], lora=str(file))
    assert f"model.lora={file}" in line and "the file is corrupt or truncated" in line


def test_an_adapter_in_other_tools_names_is_fused(folders, tmp_path):
    """Kohya's: q, k and v in one, down and up, with an alpha of half the rank."""
    generator = torch.Generator().manual_seed(1)
    down, up = torch.randn(2, 32, generator=generator), torch.randn(96, 2, generator=generator)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "x.safetensors")
    plain, fused = (weights(load(folders["flux"], lora=lora)) for lora in (None, str(tmp_path)))
    added = [fused[f"{LAYER[:-1]}{letter}.weight"] - plain[f"{LAYER[:-1]}{letter}.weight"] for letter in "qkv"]
    torch.testing.assert_close(torch.cat(added), up @ down / 2, rtol=1e-4, atol=1e-5)


def test_the_libraries_say_nothing_of_parts_that_an_adapter_has_nothing_for(folders, tmp_path, printed):
    save_file(of_transformer(LAYER), tmp_path / "x.safetensors")
    load(folders["flux"], lora=str(tmp_path))
    assert not printed
