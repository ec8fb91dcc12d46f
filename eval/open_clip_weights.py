"""A CLIP that open_clip trained, as transformers' `CLIPModel`: the same network under other names.

    open_clip                                   transformers
    visual.…, all else                          vision_model.… , text_model.…
    transformer.resblocks.N.attn.in_proj_…      encoder.layers.N.self_attn.{q,k,v}_proj.…, one below the other in one tensor
    ….mlp.c_fc, ….mlp.c_proj                    ….mlp.fc1, ….mlp.fc2
    visual.proj, text_projection (width, out)   visual_projection.weight, text_projection.weight (out, width)

So is its "ViT-H-14", of which HPSv2.1 is one: pre-norm, GELU (not the quick one), text read at the first end of text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # their spelling
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "logit_scale": "logit_scale",
}
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


def as_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict of open_clip's CLIP → one of `CLIPModel`; the tensors are views of the same.

    Raises:
        KeyError: a tensor that its CLIP does not have.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in TRANSPOSED:
            renamed[TRANSPOSED[name]] = tensor.T
        elif (block := BLOCK.fullmatch(name)) is not None:
            side, number, inner = block.groups()
            layer = f"{'vision_model' if side else 'text_model'}.encoder.layers.{number}"
            renamed |= _in_block(layer, inner, tensor, name)
        else:
            renamed[_renamed(name, NAMES, name)] = tensor
    return renamed


def _in_block(layer: str, inner: str, tensor: Tensor, name: str) -> dict[str, Tensor]:
    if inner in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = inner.rpartition("_")[2]
        return {f"{layer}.self_attn.{of}_proj.{kind}": part for of, part in zip("qkv", tensor.chunk(3), strict=True)}
    return {f"{layer}.{_renamed(inner, IN_BLOCK, name)}": tensor}


def _renamed(name: str, names: Mapping[str, str], whole: str) -> str:
    """By its whole name, or by the module's with weight or bias behind it."""
    if name in names:
        return names[name]
    module, _, kind = name.rpartition(".")
    if module not in names or kind not in ("weight", "bias"):
        raise KeyError(f"{whole} is no tensor of open_clip's CLIP")
    return f"{names[module]}.{kind}"
