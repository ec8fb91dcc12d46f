"""Whether a pipeline that was loaded has all that it draws with, in float: what it lacks would show only inside it, hours later."""

from __future__ import annotations

from typing import Any

from torch import nn

from ditbench.harness.common.errors import UserError
from ditbench.harness.models.checkpoint_files import already_quantized
from ditbench.harness.quant.layer_names import carries_adapters
from ditbench.harness.samples.conditions import PROMPTS

PIXELS = (1, 3)  # channels of a transformer that draws pixels and needs no VAE
READS_TEXT = ("text_encoder", "tokenizer")
DOES_WITHOUT = {
    "StableDiffusion3Pipeline": ("text_encoder_3", "tokenizer_3")
}  # it puts zeros where T5's words would be


def check_pipeline(pipe: Any, condition: str) -> None:
    """condition: what the family is told by.

    Raises:
        UserError: a library made weights that are codes, or left an adapter beside them; a part is missing.
    """
    for name, part in pipe.components.items():
        if not isinstance(part, nn.Module):
            continue
        if config := getattr(getattr(part, "config", None), "quantization_config", None):
            raise already_quantized(name, config)
        if carries_adapters(part):
            raise UserError(
                f"its {name} carries LoRA adapters that are not fused; take the plain weights and set model.lora"
            )
    _check_nothing_is_missing(pipe, condition)


def _check_nothing_is_missing(pipe: Any, condition: str) -> None:
    kind = type(pipe).__name__
    optional = {*pipe._optional_components, *DOES_WITHOUT.get(kind, ())}
    for name, part in pipe.components.items():
        needed = name not in optional or (condition == PROMPTS and name.startswith(READS_TEXT))
        if part is None and needed and name not in DOES_WITHOUT.get(kind, ()) and not (name == "vae" and _pixels(pipe)):
            raise UserError(f"its {name} is empty, and a {kind} draws nothing without it; take a whole checkpoint")
    config = pipe.config
    if config.get("boundary_ratio") is not None and getattr(pipe, "transformer_2", None) is None:
        raise UserError(
            f"a {kind} with boundary_ratio={config['boundary_ratio']} hands its last steps to a transformer_2, and that is empty; take a "
            "whole checkpoint"
        )


def _pixels(pipe: Any) -> bool:
    return getattr(getattr(pipe.transformer, "config", None), "in_channels", None) in PIXELS
