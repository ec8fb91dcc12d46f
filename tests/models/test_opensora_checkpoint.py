"""Open-Sora's weights as its authors publish them become a pipeline."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_pipelines import SIZES, SMALL, SMALL_STDIT3, SMALL_VAE
from torch import Tensor

from ditbench.harness.common.errors import UserError
from ditbench.harness.models.base import ModelSpec
from ditbench.harness.models.families.opensora import checkpoint
from ditbench.harness.models.families.opensora.vae import OpenSoraVAE
from ditbench.harness.models.loading import load_model


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """A small pipeline, and three folders with it as the authors publish theirs."""
    monkeypatch.setattr(checkpoint, "OpenSoraVAE", functools.partial(OpenSoraVAE, **SMALL_VAE))
    torch.manual_seed(0)
    pipe = SMALL["opensora"]()
    for part in ("transformer", "vae", "text_encoder"):
        (tmp_path / part).mkdir()
    weights = pipe.transformer.state_dict() | {"rope.freqs": 10000 ** (-torch.arange(0, 8, 2) / 8)}
    save_file(weights, tmp_path / "transformer" / "model.safetensors")
    public = SMALL_STDIT3 | {"model_type": "STDiT3", "architectures": ["STDiT3"], "qk_norm": True, "drop_path": 0.0}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(public))
    both = {re.sub(r"^spatial_vae\.", "spatial_vae.module.", k): v for k, v in pipe.vae.state_dict().items()}
    both |= {
        "temporal_vae.encoder.conv_in.conv.weight": torch.ones(1),
        "temporal_vae.quant_conv.conv.bias": torch.ones(1),
    }
    save_file({name: tensor.contiguous() for name, tensor in both.items()}, tmp_path / "vae" / "model.safetensors")
    (tmp_path / "vae" / "config.json").write_text("{}")
    pipe.text_encoder.save_pretrained(tmp_path / "text_encoder")
    pipe.tokenizer.save_pretrained(tmp_path / "text_encoder")
    return pipe, tmp_path


def load(folder: Path | str, **more):
    return load_model(ModelSpec("mine", "opensora", source=str(folder), size=SIZES["opensora"], **more))


def changed(folder: Path, **weights: Tensor | None) -> None:
    path = folder / "transformer" / "model.safetensors"
    kept = {name: tensor for name, tensor in (load_file(path) | weights).items() if tensor is not None}
    save_file(kept, path)


def test_three_downloads_are_the_pipeline(downloads):
    pipe, folder = downloads
    loaded = load(folder)
    frames = []
    for each in (pipe, loaded.pipe):
        each.set_progress_bar_config(disable=True)
        generator = [torch.Generator().manual_seed(0)]
        frames.append(each(["a red circle"], **SIZES["opensora"], num_inference_steps=2, generator=generator).frames)
    torch.testing.assert_close(*frames, rtol=0, atol=1e-5)
    assert {p.dtype for p in load(folder, dtype="bfloat16").transformer.parameters()} == {torch.bfloat16}


def test_frequencies_that_were_saved_in_bf16_are_taken(downloads):
    _, folder = downloads
    changed(folder, **{"rope.freqs": (10000 ** (-torch.arange(0, 8, 2) / 8)).bfloat16()})
    load(folder)


def test_other_frequencies_are_refused(downloads):
    _, folder = downloads
    changed(folder, **{"rope.freqs": 100 ** (-torch.arange(0, 8, 2) / 8)})
    with pytest.raises(UserError, match="cannot be loaded: rope.freqs"):
        load(folder)


def test_a_missing_tensor_is_refused(downloads):
    _, folder = downloads
    changed(folder, **{"temporal_blocks.1.attn.q_norm.weight": None})
    with pytest.raises(UserError, match='cannot be loaded: .*"temporal_blocks.1.attn.q_norm.weight"'):
        load(folder)


def test_a_transformer_without_normed_queries_is_refused(downloads):
    """As STDiT2 can be; its names would be missing, and the reason hard to see."""
    _, folder = downloads
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"qk_norm": False}))
    with pytest.raises(UserError, match="qk_norm must be True, as in Open-Sora 1.2; got False"):
        load(folder)


def test_a_download_that_is_missing_is_named_with_the_command_that_fetches_it(downloads):
    _, folder = downloads
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(
        UserError, match="no config.json in vae; .*hf download hpcai-tech/OpenSora-VAE-v1.2 --local-dir"
    ):
        load(folder)
    (folder / "transformer" / "config.json").unlink()
    with pytest.raises(UserError, match="no transformer/config.json in it"):
        load(folder)


def test_a_hub_id_without_a_network_says_how_to_fetch_all_three(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        load("hpcai-tech/OpenSora-STDiT-v3")
    for source in ("hpcai-tech/OpenSora-STDiT-v3", "hpcai-tech/OpenSora-VAE-v1.2", "DeepFloyd/t5-v1_1-xxl"):
        assert f"`hf download {source}" in str(error.value) or f"; hf download {source}" in str(error.value)
    assert "model.source=./weights/opensora" in str(error.value)


def test_outliers_in_value_rows_leave_queries_and_keys_alone(downloads):
    """One layer makes all three: what the fold and the stress rescale are its last rows."""
    _, folder = downloads
    plain, stressed = load(folder), load(folder, stress={"channels": 3, "log2_factor": 4, "seed": 0})
    name = "temporal_blocks.0.attn.qkv"
    before, after = (each.transformer.get_submodule(name).weight for each in (plain, stressed))
    values = 2 * before.shape[1]  # where they begin, after queries and keys
    assert torch.equal(before[:values], after[:values]) and not torch.equal(before[values:], after[values:])
    inputs = plain.step_inputs(2)
    with torch.no_grad():
        torch.testing.assert_close(stressed.transformer(**inputs).sample, plain.transformer(**inputs).sample)
