from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel, UNet2DModel
from safetensors.torch import load_file, save_file

from ditbench.harness.build.build import float_copy
from ditbench.harness.common.errors import UserError
from ditbench.harness.fitting.conformance import SMALL_DIT
from ditbench.harness.generation.generate import conditions, generate
from ditbench.harness.models.base import LoadedModel, ModelSpec, Sampler
from ditbench.harness.models.loading import load_model

TRANSFORMER = Path("transformer") / "diffusion_pytorch_model.safetensors"


def spec(source: Path | str, **more) -> ModelSpec:
    return ModelSpec("mine", "dit", source=str(source), **more)


def weights(model: LoadedModel) -> str:
    """Of a model of the same weights and nothing else: it was made in memory."""
    return replace(model, parts={}).fingerprint


@pytest.fixture
def own_folder(latent_folder, tmp_path) -> Path:
    """A copy of the saved pipeline to damage."""
    return Path(shutil.copytree(latent_folder, tmp_path / "copy"))


def test_a_saved_pipeline_loads_and_generates_through_its_vae(latent_folder, latent_model):
    """The same weights, the same images as the pipeline that was saved."""
    loaded = load_model(spec(latent_folder))
    assert weights(loaded) == weights(latent_model)
    assert not loaded.transformer.training and not any(p.requires_grad for p in loaded.transformer.parameters())
    found = []
    for model in (loaded, latent_model):
        transformer = float_copy(model.target(), dtype=torch.float32)
        found.append(generate(model, transformer, conditions(model, 3, seed=0), Sampler("ddim", 3, 1.5), batch_size=2))
    one, other = found
    assert one.images_NHWC.shape == (3, 16, 16, 3) and one.images_NHWC.dtype == torch.uint8
    assert one.latents.shape == (3, 4, 8, 8)
    assert torch.equal(one.images_NHWC, other.images_NHWC)


def test_a_pipeline_without_a_vae_loads_too(own_model, tmp_path):
    own_model.pipe.save_pretrained(tmp_path / "pixels")
    loaded = load_model(spec(tmp_path / "pixels"))
    assert weights(loaded) == weights(own_model) and loaded.pipe.vae is None


def test_a_pipeline_without_a_vae_draws_one_size():
    """Of model.size the pipeline would make latents an eighth as large, where the pixels are what it denoises."""
    asked = ModelSpec("tiny-t2i", "pixart", source="zoo:tiny-t2i", size={"height": 24, "width": 24})
    with pytest.raises(
        UserError,
        match="model tiny-t2i: a PixArtAlphaPipeline without a VAE draws the one size .*; leave model.size out",
    ):
        load_model(asked)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_loaded_in_the_dtype_asked_for(dtype, latent_folder):
    loaded = load_model(spec(latent_folder, dtype=dtype))
    assert {p.dtype for p in loaded.transformer.parameters()} == {getattr(torch, dtype)}


def test_random_weights_follow_their_seed_and_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    one, same, other = (
        load_model(ModelSpec("r", "dit", random=SMALL_DIT, seed=seed)).fingerprint for seed in (0, 0, 1)
    )
    assert one == same != other
    assert torch.equal(torch.get_rng_state(), before)


def test_random_weights_do_not_leave_adaln_inert():
    """adaLN-Zero would make a random model ignore its blocks."""
    transformer = load_model(ModelSpec("r", "dit", random=SMALL_DIT)).transformer
    assert float(transformer.transformer_blocks[0].norm1.linear.weight.std()) > 1e-2


def test_random_weights_are_not_in_training_mode():
    """In training, diffusers drops labels block by block."""
    assert not load_model(ModelSpec("r", "dit", random=SMALL_DIT)).transformer.training


def test_a_judge_beside_the_weights_is_found(own_folder):
    assert load_model(spec(own_folder)).extras == {}
    (own_folder / "judge").mkdir()
    assert load_model(spec(own_folder)).extras == {"judge": own_folder / "judge"}


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=f"model mine: no folder {tmp_path / 'nothing'}; set model.source"):
        load_model(spec(tmp_path / "nothing"))


def test_a_folder_without_a_pipeline_is_named(tmp_path):
    with pytest.raises(UserError, match="no diffusers pipeline folder .no model_index.json in it"):
        load_model(spec(tmp_path))


def test_a_zoo_model_that_was_not_trained_says_how_to_make_it():
    with pytest.raises(UserError, match="ditbench zoo train no-such-model"):
        load_model(spec("zoo:no-such-model"))


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.99])
def test_a_truncated_weight_file_is_said_to_be_unreadable(kept, own_folder):
    path = own_folder / TRANSFORMER
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if kept >= 1 or kept == 0 else int(kept * len(whole))])
    with pytest.raises(UserError) as error:
        load_model(spec(own_folder))
    assert "model mine" in str(error.value) and str(own_folder) in str(error.value)
    assert "corrupt or truncated" in str(error.value)


def test_a_missing_weight_file_is_named(own_folder):
    (own_folder / TRANSFORMER).unlink()
    with pytest.raises(UserError, match="model mine .*transformer"):
        load_model(spec(own_folder))


def test_a_garbled_index_is_refused_with_the_folder(own_folder):
    (own_folder / "model_index.json").write_text("{ not json")
    with pytest.raises(UserError, match="model mine: .*copy/model_index.json cannot be read"):
        load_model(spec(own_folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_a_number_is_named(value, own_folder):
    weights = load_file(own_folder / TRANSFORMER)
    weights["transformer_blocks.1.ff.net.2.bias"][5] = value
    save_file(weights, own_folder / TRANSFORMER, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"NaN or infinity in transformer_blocks.1.ff.net.2.bias; .* damaged"):
        load_model(spec(own_folder))


def test_a_weight_file_of_other_shapes_is_refused(own_folder):
    config = own_folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_head_dim": 32}))
    with pytest.raises(UserError, match="its transformer cannot be loaded: .*pos_embed.proj.bias"):
        load_model(spec(own_folder))


def test_a_pipeline_around_a_unet_is_refused(tmp_path):
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    with pytest.raises(UserError, match="not a checkpoint of family 'dit': .*; choose the matching model="):
        load_model(spec(tmp_path / "ddpm"))


def test_a_pipeline_around_another_transformer_is_refused_by_its_name(latent_pipe, tmp_path):
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        use_additional_conditions=False,
    )
    pipe = PixArtAlphaPipeline(None, None, latent_pipe.vae, transformer, latent_pipe.scheduler)
    pipe.save_pretrained(tmp_path / "pixart")
    with pytest.raises(UserError, match="not a checkpoint of family 'dit': .*PixArtTransformer2DModel"):
        load_model(spec(tmp_path / "pixart"))


def test_a_hub_id_without_a_network_says_how_to_fetch_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        load_model(spec("facebook/no-such-DiT-here"))
    assert time.monotonic() - start < 5
    message = str(error.value)
    assert "is no folder here, and cannot be downloaded" in message
    assert "`hf download facebook/no-such-DiT-here --local-dir ./weights/no-such-DiT-here`" in message
    assert "model.source=./weights/no-such-DiT-here" in message


def test_an_unknown_family_is_refused_with_those_there_are():
    with pytest.raises(UserError, match="no model family 'dti'; did you mean 'dit'"):
        load_model(ModelSpec("mine", "dti", random={}))
