"""The public checkpoints of Open-Sora 1.2 as their authors publish them, read into our modules.

The transformer's folder has transformers' `config.json` and one `model.safetensors`. Our modules have its names, but for
`rope.freqs`, a constant that is computed here. The VAE's file has both VAEs; their encoding halves in time are left where they are.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch import Tensor, nn

from ditbench.harness.models.families.opensora.pipeline import OpenSoraPipeline
from ditbench.harness.models.families.opensora.stdit3 import STDiT3, inverse_frequencies
from ditbench.harness.models.families.opensora.vae import OpenSoraVAE

CONFIG, WEIGHTS = "config.json", "model.safetensors"
EXPECTED = {"qk_norm": True, "skip_y_embedder": False}  # what STDiT3 takes for granted
ROTATION = "rope.freqs"
ENCODING = ("temporal_vae.encoder.", "temporal_vae.quant_conv.")
TEXT_ENCODER = "DeepFloyd/t5-v1_1-xxl"
VAE = "hpcai-tech/OpenSora-VAE-v1.2"


def pipeline_of(transformer: Path, vae: Path, text_encoder: Path, dtype: torch.dtype) -> OpenSoraPipeline:
    """The pipeline of three folders, each as downloaded."""
    from transformers import AutoTokenizer, T5EncoderModel

    return OpenSoraPipeline(
        tokenizer=AutoTokenizer.from_pretrained(text_encoder),
        text_encoder=T5EncoderModel.from_pretrained(text_encoder, dtype=dtype),
        transformer=read_transformer(transformer, dtype),
        vae=read_vae(vae, dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def read_transformer(folder: Path, dtype: torch.dtype) -> STDiT3:
    """Raises ValueError for a checkpoint of another STDiT, RuntimeError for other names or shapes."""
    config = json.loads((folder / CONFIG).read_text())
    for name, value in EXPECTED.items():
        if config.get(name, value) != value:
            raise ValueError(f"{CONFIG}: {name} must be {value}, as in Open-Sora 1.2; got {config[name]}")
    weights = load_file(folder / WEIGHTS)
    wanted = set(inspect.signature(STDiT3.__init__).parameters) - {"self"}
    with torch.device("meta"):
        model = STDiT3(**{name: config[name] for name in wanted if name in config})
    _check_rotation(weights.pop(ROTATION, None), model)
    return _filled(model, weights, dtype)


def read_vae(folder: Path, dtype: torch.dtype) -> OpenSoraVAE:
    """Raises RuntimeError for other names or shapes than the public ones."""
    weights = load_file(folder / WEIGHTS)
    weights = {
        name.replace("spatial_vae.module.", "spatial_vae."): tensor
        for name, tensor in weights.items()
        if not name.startswith(ENCODING)
    }
    with torch.device("meta"):
        model = OpenSoraVAE()
    return _filled(model, weights, dtype)


def _filled(model: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """The weights in place of those on the meta device, in dtype."""
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _check_rotation(saved: Tensor | None, model: STDiT3) -> None:
    """The saved frequencies, which may have been rounded to bf16, must be the ones that `rotated` computes."""
    ours = inverse_frequencies(model.config.hidden_size // model.config.num_heads, "cpu")
    if saved is not None and not (saved.shape == ours.shape and torch.allclose(saved.double(), ours, rtol=2**-8)):
        raise ValueError(f"{ROTATION} holds other frequencies than 10000^(−2i / D), i < {len(ours)}")
