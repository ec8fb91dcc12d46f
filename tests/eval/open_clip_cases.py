"""A small CLIP in open_clip's layout, and what it says of pictures and texts, computed head by head in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, normalize

VISION: dict[str, int] = {"width": 32, "heads": 4, "layers": 2, "mlp": 96, "side": 24, "patch": 8}
TEXT: dict[str, int] = {"width": 24, "heads": 3, "layers": 3, "mlp": 72, "words": 54, "positions": 12}
OUT = 20
State = dict[str, Tensor]


def random_state(seed: int = 0) -> State:
    """All tensors of open_clip's CLIP, large enough that pictures and texts differ."""
    random = torch.Generator().manual_seed(seed)

    def drawn(*size: int) -> Tensor:
        return 0.2 * torch.randn(size, generator=random)

    state = {
        "positional_embedding": drawn(TEXT["positions"], TEXT["width"]),
        "text_projection": drawn(TEXT["width"], OUT),
        "logit_scale": torch.tensor(4.6),
        "visual.class_embedding": drawn(VISION["width"]),
        "visual.positional_embedding": drawn(1 + (VISION["side"] // VISION["patch"]) ** 2, VISION["width"]),
        "visual.proj": drawn(VISION["width"], OUT),
        "visual.conv1.weight": drawn(VISION["width"], 3, VISION["patch"], VISION["patch"]),
        "token_embedding.weight": drawn(TEXT["words"], TEXT["width"]),
    }
    norms = [("visual.ln_pre", VISION), ("visual.ln_post", VISION), ("ln_final", TEXT)]
    for prefix, sizes in (("visual.transformer", VISION), ("transformer", TEXT)):
        width, mlp = sizes["width"], sizes["mlp"]
        for layer in range(sizes["layers"]):
            block = f"{prefix}.resblocks.{layer}"
            norms += [(f"{block}.ln_1", sizes), (f"{block}.ln_2", sizes)]
            state |= {
                f"{block}.attn.in_proj_weight": drawn(3 * width, width), f"{block}.attn.in_proj_bias": drawn(3 * width),
                f"{block}.attn.out_proj.weight": drawn(width, width), f"{block}.attn.out_proj.bias": drawn(width),
                f"{block}.mlp.c_fc.weight": drawn(mlp, width), f"{block}.mlp.c_fc.bias": drawn(mlp),
                f"{block}.mlp.c_proj.weight": drawn(width, mlp), f"{block}.mlp.c_proj.bias": drawn(width),
            }  # fmt: skip
    for name, sizes in norms:
        state |= {f"{name}.weight": 1 + drawn(sizes["width"]), f"{name}.bias": drawn(sizes["width"])}
    return state


def config() -> Any:
    """transformers' configuration of the same network."""
    from transformers import CLIPConfig

    def of(sizes: dict[str, int]) -> dict[str, Any]:
        return {
            "hidden_size": sizes["width"], "intermediate_size": sizes["mlp"], "num_hidden_layers": sizes["layers"],
            "num_attention_heads": sizes["heads"], "hidden_act": "gelu",
        }  # fmt: skip

    text = of(TEXT) | {"vocab_size": TEXT["words"], "max_position_embeddings": TEXT["positions"]}
    text |= {"bos_token_id": 0, "eos_token_id": 1}
    vision = of(VISION) | {"image_size": VISION["side"], "patch_size": VISION["patch"]}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=OUT)


def seen(state: State, pixels_3HW: Tensor) -> Tensor:
    """The unit vector of a picture that is prepared already, float64 (OUT,)."""
    state, pixels = doubled(state), pixels_3HW.double()
    patch, kernel = VISION["patch"], state["visual.conv1.weight"]
    places = range(0, VISION["side"], patch)
    tokens = [state["visual.class_embedding"]]
    tokens += [(kernel * pixels[:, y : y + patch, x : x + patch]).sum(dim=(1, 2, 3)) for y in places for x in places]
    x_TC = norm(state, "visual.ln_pre", torch.stack(tokens) + state["visual.positional_embedding"])
    x_TC = blocks(state, "visual.transformer", VISION, x_TC, causal=False)
    return normalize(norm(state, "visual.ln_post", x_TC[0]) @ state["visual.proj"], dim=0)


def read(state: State, ids: list[int]) -> Tensor:
    """The unit vector of a text's tokens, the last of which ends it, float64 (OUT,)."""
    state = doubled(state)
    x_TC = state["token_embedding.weight"][ids] + state["positional_embedding"][: len(ids)]
    x_TC = blocks(state, "transformer", TEXT, x_TC, causal=True)
    return normalize(norm(state, "ln_final", x_TC[-1]) @ state["text_projection"], dim=0)


def blocks(state: State, prefix: str, sizes: dict[str, int], x_TC: Tensor, causal: bool) -> Tensor:
    for layer in range(sizes["layers"]):
        block = f"{prefix}.resblocks.{layer}"
        x_TC = x_TC + attention(state, f"{block}.attn", sizes, norm(state, f"{block}.ln_1", x_TC), causal)
        inner = gelu(linear(state, f"{block}.mlp.c_fc", norm(state, f"{block}.ln_2", x_TC)))
        x_TC = x_TC + linear(state, f"{block}.mlp.c_proj", inner)
    return x_TC


def attention(state: State, name: str, sizes: dict[str, int], x_TC: Tensor, causal: bool) -> Tensor:
    width, each = sizes["width"], sizes["width"] // sizes["heads"]
    qkv = x_TC @ state[f"{name}.in_proj_weight"].T + state[f"{name}.in_proj_bias"]
    heads = []
    for head in range(sizes["heads"]):
        q, k, v = (qkv[:, at + head * each : at + (head + 1) * each] for at in (0, width, 2 * width))
        rows = []
        for t in range(len(x_TC)):
            upto = t + 1 if causal else len(x_TC)
            weights = (k[:upto] @ q[t] / math.sqrt(each)).softmax(dim=0)
            rows.append(weights @ v[:upto])
        heads.append(torch.stack(rows))
    return linear(state, f"{name}.out_proj", torch.cat(heads, dim=1))


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state: State, name: str, x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)


def doubled(state: State) -> State:
    return {name: tensor.double() for name, tensor in state.items()}
